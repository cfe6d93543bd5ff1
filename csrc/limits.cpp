#include "limits.hpp"

#include <chrono>
#include <cstring>

#include "buffer.hpp"
#include "isa.hpp"
#include "pool.hpp"

namespace native {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

std::vector<double> time_reads(const std::string& isa, int threads, int64_t bytes, int repeats) {
  const Kernels& kernels = *choose_isa(isa).kernels();
  Pool pool(threads);
  const Buffer memory(bytes);
  std::memset(memory.data(), 1, static_cast<size_t>(bytes));  // untouched pages would all be the one page of zeros
  constexpr int64_t kPiece = 1 << 20;
  std::vector<double> times;
  for (int i = 0; i <= repeats; ++i) {
    const double start = seconds();
    pool.run([&](Team& team, int) {
      team.for_each(bytes / kPiece, 4, [&](int64_t begin, int64_t end) {
        volatile int64_t kept = kernels.read_all(memory.data() + begin * kPiece, (end - begin) * kPiece);
        (void)kept;
      });
    });
    if (i) times.push_back(seconds() - start);
  }
  return times;
}

std::vector<double> time_products(const std::string& isa, int threads, Storage storage, int repeats) {
  const Kernels& kernels = *choose_isa(isa).kernels();
  Pool pool(threads);
  constexpr int64_t kIterations = 1 << 22;
  std::vector<double> rates;
  for (int i = 0; i <= repeats; ++i) {
    int64_t products = 0;  // of one thread
    const double start = seconds();
    pool.run([&](Team&, int thread) {
      const int64_t count = kernels.multiply_accumulate(storage, kIterations);
      if (thread == 0) products = count;
    });
    if (i) rates.push_back(static_cast<double>(products * threads) / (seconds() - start));
  }
  return rates;
}

}  // namespace native
