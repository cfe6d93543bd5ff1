#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rounding.hpp"
#include "shares.hpp"

namespace native {
namespace {

constexpr double kUp = 1.0 + 1e-6;    // what a conversion to float may take, and more
constexpr double kFlushed = 1e-30;    // |x| or E that stands for what hardware takes for zero
constexpr float kLeastStep = 1e-37f;  // whose inverse is a number; rows of smaller ones are within what is flushed
constexpr double kUnit = 1.0 / (1 << 24);
constexpr float kNoiseRounding = 1e-5f;  // of four sums with noise, which is 23 at most

}  // namespace

Screen::Screen(const Matrix& head, const Kernels& kernels)
    : kernels_(&kernels),
      rounded_(head.storage == Storage::bf16),
      plain_(kernels.plain(head.storage)),
      pieces_(ceil_div(head.num_panels, kPiecePanels)),
      row_bytes_(round_up(kernels.row_bytes(Storage::s8, head.k), 64)),
      matrix_(Storage::s8, head.n, head.k, kernels),
      errors_(head.num_panels * kernels.panel * 4) {}

int64_t Screen::piece_end(int64_t unit) const {
  return std::min(piece_begin(unit) + kPiecePanels * kernels_->panel, matrix_.view().n);
}

void Screen::fill(const Tensor& weight, Pool& pool) {
  matrix_.fill(weight, nullptr, pool);
  const int64_t k = matrix_.view().k;
  const double rho = std::sqrt(static_cast<double>(k)) / 64516 + 2 * static_cast<double>(k + 64) * kUnit;
  std::vector<float> space(static_cast<size_t>(2 * k * pool.size()));
  pool.run([&](Team& team, int thread) {
    float* row = space.data() + 2 * k * thread;
    float* quantised = row + k;
    team.for_each(matrix_.view().n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t output = begin; output < end; ++output) {
        read_row(weight, output, row);
        matrix_.unpack(output, quantised);
        double squares = 0, apart = 0;
        for (int64_t i = 0; i < k; ++i) {
          const double value = rounded_ ? bf16_to_float(float_to_bf16(row[i])) : row[i], off = value - quantised[i];
          squares += value * value;
          apart += off * off;
        }
        const double off = std::sqrt(apart) * kUp, whole = std::sqrt(squares) * kUp + off;
        errors_.floats()[output] = static_cast<float>((off + rho * whole + kFlushed) * kUp);
      }
    });
  });
}

void Screen::reserve(int64_t count) {
  rows_.reserve(2 * count * row_bytes_);
  scales_.reserve(2 * count * 4);
  norms_.resize(static_cast<size_t>(count));
  plain_floors_.resize(static_cast<size_t>(count * pieces_));
  noisy_floors_.resize(static_cast<size_t>(count * pieces_));
}

void Screen::prepare(const uint8_t* row, int64_t i, int64_t count, float* scratch) {
  const int64_t k = matrix_.view().k;
  const auto at = [&](int64_t j) {
    if (plain_) return reinterpret_cast<const float*>(row)[j];
    return bf16_to_float(reinterpret_cast<const uint16_t*>(row)[j]);
  };
  double squares = 0;
  float largest = 0.0f;
  for (int64_t j = 0; j < k; ++j) {
    squares += static_cast<double>(at(j)) * at(j);
    largest = std::max(largest, std::fabs(at(j)));
  }
  norms_[static_cast<size_t>(i)] = static_cast<float>((std::sqrt(squares) + kFlushed) * kUp);
  const auto put = [&](int64_t place) {
    kernels_->prepare(Storage::s8, scratch, k, rows_.data() + place * row_bytes_, scales_.floats() + place);
  };
  std::memset(scratch + k, 0, static_cast<size_t>(round_up(k, kLanes) - k) * 4);
  // Multiples of the row's step, which int8 holds as they are, however its kernel rounds; then what they leave.
  const float step = largest / 127.0f, inverse = step > kLeastStep ? 1.0f / step : 0.0f;
  for (int64_t j = 0; j < k; ++j) scratch[j] = nearest_whole(at(j) * inverse) * step;
  put(i);
  for (int64_t j = 0; j < k; ++j) scratch[j] = at(j) - scratch[j];
  put(count + i);
}

void Screen::settle(Team& team, int thread, const Matrix& head, const Rows& x, int64_t count, const Draw* draws,
                    float* out, int64_t stride, float* scratch) {
  const Shares shares(count, team.size());
  const auto rows = [&](int64_t share) { return shares.rows(share); };
  for_each_cell(team, thread, shares, pieces_, count * pieces_, rows, [&](int64_t i, int64_t piece) {
    find_floor(i * pieces_ + piece, draws[i], out + i * stride, out + (count + i) * stride);
  });
  for_each_cell(team, thread, shares, pieces_, 1, rows, [&](int64_t i, int64_t piece) {
    compute(i * pieces_ + piece, head, x, draws[i], out + i * stride, out + (count + i) * stride, scratch);
  });
}

// Leaves in `rest`, whose values are summed up then, the most that each may be with noise.
void Screen::find_floor(int64_t unit, const Draw& draw, float* values, float* rest) {
  const int64_t begin = piece_begin(unit), end = piece_end(unit);
  kernels_->sum_estimates(values, rest, begin, end);
  const Estimates x = estimates(unit / pieces_, values);
  plain_floors_[static_cast<size_t>(unit)] = kernels_->plain_floor(x, begin, end);
  if (draw.temperature > 0) {
    noisy_floors_[static_cast<size_t>(unit)] = kernels_->noisy_floor(x, draw.temperature, draw.stream, begin, end, rest);
  }
}

void Screen::compute(int64_t unit, const Matrix& head, const Rows& x, const Draw& draw, float* values,
                     const float* most, float* scratch) {
  const int64_t row = unit / pieces_, begin = piece_begin(unit), end = piece_end(unit);
  bool wanted[kPiecePanels] = {};
  const auto floor = [&](const std::vector<float>& floors) {
    const float* first = floors.data() + row * pieces_;
    return *std::max_element(first, first + pieces_);
  };
  // Those that may be the largest without noise, too: the sum of all exponentials is of little else.
  kernels_->plain_reaching(estimates(row, values), floor(plain_floors_), begin, end, wanted);
  if (draw.temperature > 0) {
    kernels_->noisy_reaching(most, floor(noisy_floors_) - kNoiseRounding, begin, end, wanted);
  }
  const Rows one{x.data + row * x.stride, x.stride, nullptr};
  const int64_t first = begin / kernels_->panel;
  for (int64_t panel = 0; panel < kPiecePanels; ++panel) {
    if (!wanted[panel]) continue;
    kernels_->matmul(head, one, 1, {values, 0, Epilogue::store}, first + panel, first + panel + 1, scratch);
  }
}

}  // namespace native
