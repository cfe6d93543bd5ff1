#include "probe.hpp"

#include <chrono>
#include <cstring>

#include "buffer.hpp"
#include "isa.hpp"
#include "packing.hpp"
#include "pool.hpp"
#include "rounding.hpp"

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
    if (i) rates.push_back(static_cast<double>(products * pool.size()) / (seconds() - start));
  }
  return rates;
}

void linear_once(const std::string& isa, int threads, Storage storage, Epilogue activation, int64_t rows, int64_t n,
                 int64_t k, const float* x, const float* weight, const float* bias, float* y) {
  const Kernels& kernels = *choose_isa(isa).kernels();
  Pool pool(threads);
  const Tensor bias_view{bias, Dtype::f32, 1, n, n, 1};
  Packed packed(storage, n, k, kernels);
  packed.fill({weight, Dtype::f32, n, k, k, 1}, &bias_view, pool);
  const int64_t width = round_up(k, kLanes), bytes = kernels.row_bytes(kernels.row_form(storage, rows), k);
  const int64_t out_width = packed.view().num_panels * kernels.panel;
  Buffer padded(width * 4), prepared(rows * bytes), scales(rows * 4), out(rows * out_width * 4);
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(padded.data(), x + r * k, static_cast<size_t>(k) * 4);
    if (kernels.plain(storage)) {
      std::memcpy(prepared.data() + r * bytes, padded.data(), static_cast<size_t>(width) * 4);
    } else {
      kernels.prepare(kernels.row_form(storage, rows), padded.floats(), k, prepared.data() + r * bytes, scales.floats() + r);
    }
  }
  const Rows ready{prepared.data(), bytes, quantised(storage) ? scales.floats() : nullptr};
  const Output output{out.floats(), out_width, activation};
  Buffer scratch(pool.size() * kernels.matmul_scratch * 4);
  pool.run([&](Team& team, int thread) {
    team.for_each(packed.view().num_panels, rows > 16 ? kernels.panel_group + 1 : 2, [&](int64_t begin, int64_t end) {
      kernels.matmul(packed.view(), ready, rows, output, begin, end, nullptr,
                     scratch.floats() + thread * kernels.matmul_scratch);
    });
  });
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(y + r * n, out.floats() + r * out_width, static_cast<size_t>(n) * 4);
  }
}

}  // namespace native
