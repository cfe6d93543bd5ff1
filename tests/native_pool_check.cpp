// How a team of threads shares out work, without Python: every piece once, whoever runs it.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "shares.hpp"

namespace {

using native::Pool;
using native::Range;
using native::Shares;
using native::Team;

int failures = 0;

void expect(bool good, const char* what) {
  if (!good) ++failures;
  std::printf("%s %s\n", good ? "ok" : "FAILED", what);
}

void sleep_us(int us) { std::this_thread::sleep_for(std::chrono::microseconds(us)); }

// Rows and columns of all shares tile the grid, whatever does not divide whatever.
bool shares_tile(int64_t rows, int64_t columns, int threads) {
  const Shares shares(rows, threads);
  std::vector<int> seen(static_cast<size_t>(rows * columns));
  for (int64_t share = 0; share < shares.count(); ++share) {
    const Range down = shares.rows(share), across = shares.columns(share, {0, columns});
    for (int64_t r = down.begin; r < down.end; ++r) {
      for (int64_t c = across.begin; c < across.end; ++c) ++seen[static_cast<size_t>(r * columns + c)];
    }
  }
  for (const int count : seen) {
    if (count != 1) return false;
  }
  return true;
}

// Phases of all sizes, in some of which a thread is slow, so that threads begin to help each other and leave off again.
bool every_cell_once(int threads) {
  Pool pool(threads);
  std::atomic<int> wrong{0};
  std::vector<std::atomic<int>> seen(600);
  pool.run([&](Team& team, int thread) {
    for (int phase = 0; phase < 600; ++phase) {
      const int64_t rows = phase % 200 + 1, columns = phase % 3 + 1, most = phase % 2 ? 7 : rows * columns;
      const Shares shares(rows, team.size());
      for_each_cell(team, thread, shares, columns, most, [&](int64_t share) { return shares.rows(share); },
                    [&](int64_t r, int64_t c) {
                      if (phase % 150 < 4 && thread == team.size() - 1) sleep_us(20);
                      ++seen[static_cast<size_t>(r * columns + c)];
                    });
      team.for_each(rows * columns, 5, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) wrong += seen[static_cast<size_t>(i)].exchange(0) != 1;
      });
    }
  });
  return wrong == 0;
}

struct Found {
  int whole = 0;   // phases in which every share was one piece, of its owner
  int helped = 0;  // phases in which a thread took a piece of another's share
};

// Phases of four items for each thread, in which those of the first share take `us` microseconds each.
Found phases(Pool& pool, int count, int us) {
  Found found;
  pool.run([&](Team& team, int thread) {
    static std::atomic<int> pieces, foreign;
    for (int phase = 0; phase < count; ++phase) {
      team.for_each_share(thread, team.size(), 4, [](int64_t) { return int64_t{4}; },
                          [&](int64_t share, int64_t begin, int64_t end) {
                            ++pieces;
                            foreign += share != thread;
                            if (share == 0 && us) sleep_us(static_cast<int>(end - begin) * us);
                          });
      if (thread == 0) {
        found.whole += pieces == team.size() && foreign == 0;
        found.helped += foreign > 0;
        pieces = foreign = 0;
      }
      team.barrier();
    }
  });
  return found;
}

}  // namespace

int main() {
  bool tile = true;
  for (const int threads : {1, 2, 3, 5, 8, 24}) {
    for (const int64_t rows : {1, 5, 32, 127, 128, 500, 1024}) {
      for (const int64_t columns : {1, 7, 12, 48}) tile = tile && shares_tile(rows, columns, threads);
    }
  }
  expect(tile, "shares tile rows by columns");
  for (const int threads : {1, 2, 3, 4, 20}) expect(every_cell_once(threads), "every cell is run once");
  Pool pool(2);
  expect(phases(pool, 2000, 0).whole > 0, "even threads have their shares whole");
  expect(phases(pool, 40, 300).helped > 20, "a slow thread is helped");
  expect(phases(pool, 4000, 0).whole > 0, "and later left alone again");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
