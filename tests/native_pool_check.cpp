// How a team of threads shares out work, without Python: every piece once, whoever runs it. And what a thread fetches: every
// line once.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "shares.hpp"

namespace {

using native::Evenness;
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
    const Range down = shares.rows(share), across = shares.part_of({0, columns}, share);
    for (int64_t r = down.begin; r < down.end; ++r) {
      for (int64_t c = across.begin; c < across.end; ++c) ++seen[static_cast<size_t>(r * columns + c)];
    }
  }
  return std::all_of(seen.begin(), seen.end(), [](int count) { return count == 1; });
}

// Whether a phase runs every cell once, in pieces of at most `most`.
bool every_cell_once(Pool& pool, int64_t rows, int64_t columns, int64_t most, int slow_us = 0) {
  std::vector<std::atomic<int>> seen(static_cast<size_t>(rows * columns));
  std::atomic<bool> sized{true};
  pool.run([&](Team& team, int thread) {
    const Shares shares(rows, team.size());
    const auto down = [&](int64_t share) { return shares.rows(share); };
    for_each_cell(team, thread, shares, columns, most, down, [&](int64_t r, int64_t c) {
      if (slow_us && thread == 0) sleep_us(slow_us);
      ++seen[static_cast<size_t>(r * columns + c)];
    });
    // The same cells, seen as pieces.
    const auto cells = [&](int64_t share) { return down(share).size() * shares.part_of({0, columns}, share).size(); };
    team.for_each_share(thread, shares.count(), most, cells, [&](int64_t share, int64_t begin, int64_t end) {
      if (begin < 0 || begin >= end || end > cells(share) || end - begin > most) sized = false;
    });
  });
  return sized && std::all_of(seen.begin(), seen.end(), [](const std::atomic<int>& count) { return count == 1; });
}

// The first phases of a pool, in which every thread has its share alone if it can.
bool even_phases(int threads) {
  bool good = true;
  for (const int64_t rows : {1, 4, 64 * threads - 1, 64 * threads, 96 * threads}) {
    for (const int64_t columns : {0, 1, 7, 48}) {
      for (const int64_t most : {int64_t{1}, int64_t{6}, rows * 48}) {
        Pool pool(threads);
        good = good && every_cell_once(pool, rows, columns, most);
      }
    }
  }
  return good;
}

// Phases with a slow thread, so that they begin to help each other, and without.
bool uneven_phases(int threads) {
  Pool pool(threads);
  bool good = true;
  for (int phase = 0; phase < 300; ++phase) {
    good = good && every_cell_once(pool, phase % 40 + 1, phase % 3 + 1, phase % 2 ? 7 : 200, phase % 100 < 10 ? 20 : 0);
  }
  return good;
}

bool evenness() {
  Evenness seldom, often;
  for (int phase = 0; phase < 1000; ++phase) {
    seldom.judge(phase % 20 == 0);
    if (!seldom.even()) return false;  // one wait in twenty phases
  }
  for (int phase = 0; phase < 1000; ++phase) often.judge(phase % 5 == 0);
  if (often.even()) return false;  // one in five
  int quiet = 0;
  while (!often.even()) often.judge(false), ++quiet;
  return quiet > 100 && quiet < 300;
}

// Two threads, of which the first takes 300 us for an item, in a phase of `items` items each, four in a piece at most.
// Returns whether this one helped.
bool slow_phase(Team& team, int thread, int64_t items) {
  bool foreign = false;
  team.for_each_share(thread, 2, 4, [=](int64_t) { return items; }, [&](int64_t share, int64_t begin, int64_t end) {
    if (share != thread) foreign = true;
    if (share == 0) sleep_us(static_cast<int>(end - begin) * 300);
  });
  return foreign;
}

// Phases, of forty, in which a slow thread is helped with what could have been one piece.
int helped_phases() {
  Pool pool(2);
  std::atomic<int> helped{0};
  pool.run([&](Team& team, int thread) {
    for (int phase = 0; phase < 40; ++phase) helped += slow_phase(team, thread, 4);
  });
  return helped;
}

// Whether it is after forty phases of several pieces, which say nothing of the threads.
bool helped_after_pieces() {
  Pool pool(2);
  std::atomic<bool> helped{false};
  pool.run([&](Team& team, int thread) {
    for (int phase = 0; phase < 40; ++phase) slow_phase(team, thread, 9);
    if (slow_phase(team, thread, 4)) helped = true;
  });
  return helped;
}

// Products of various lengths fetch every line of every block, in order, and next to nothing past a block.
bool upcoming_lines(int64_t bytes) {
  const std::vector<uint8_t> memory(16 * 4096);
  const int32_t blocks[] = {3, 9, 0, 15};
  native::Upcoming upcoming{memory.data(), 4096, bytes, blocks, 4};
  std::vector<int64_t> lines;
  for (int64_t rounds = 1; upcoming.count; rounds = rounds * 5 % 67) {
    const native::Prefetch fetch = upcoming.take(rounds);
    for (int64_t i = 0; i < rounds; ++i) {
      const int64_t at = fetch.from + i * fetch.step - memory.data(), past = at % 4096 - bytes;
      if (past >= rounds) return false;
      const int64_t line = at / native::kLineBytes;
      if (past < 0 && (lines.empty() || line != lines.back())) lines.push_back(line);
    }
  }
  std::vector<int64_t> wanted;
  for (const int32_t block : blocks) {
    for (int64_t at = 0; at < bytes; at += native::kLineBytes) wanted.push_back((block * 4096 + at) / native::kLineBytes);
  }
  return lines == wanted && !upcoming.take(1).from;
}

}  // namespace

int main() {
  bool tile = true;
  for (const int threads : {1, 2, 3, 5, 8, 24, 100}) {
    for (const int64_t rows : {1, 5, 32, 127, 128, 500, 1024}) {
      for (const int64_t columns : {1, 7, 12, 48}) tile = tile && shares_tile(rows, columns, threads);
    }
  }
  expect(tile, "shares tile rows by columns");
  for (const int threads : {1, 2, 3, 5, 8, 20, 70}) expect(even_phases(threads), "every cell is run once by even threads");
  for (const int threads : {1, 2, 3, 4}) expect(uneven_phases(threads), "and by uneven ones");
  expect(evenness(), "threads are uneven when they often wait long, and for a while");
  expect(helped_phases() > 10, "a slow thread is helped");
  expect(!helped_after_pieces(), "but not because phases of several pieces ended unevenly");
  for (const int64_t bytes : {64, 128, 192, 1536, 3968}) expect(upcoming_lines(bytes), "what is read next is fetched once");
  std::printf("%d failures\n", failures);
  return failures != 0;
}
