#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rounding.hpp"

namespace native {
namespace {

constexpr double kUp = 1.0 + 1e-6;    // what a conversion to float may take, and more
constexpr double kFlushed = 1e-30;    // |x| or E that stands for what hardware takes for zero
constexpr double kUnit = 1.0 / (1 << 24);

}  // namespace

Screen::Screen(const Matrix& head, const Kernels& kernels)
    : kernels_(&kernels),
      rounded_(head.storage == Storage::bf16),
      plain_(kernels.plain(head.storage)),
      pieces_((head.num_panels + kPiecePanels - 1) / kPiecePanels),
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
  floors_.resize(static_cast<size_t>(count * pieces_));
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
  const float step = largest / 127.0f, inverse = step > 0.0f ? 1.0f / step : 0.0f;
  for (int64_t j = 0; j < k; ++j) scratch[j] = nearest_whole(at(j) * inverse) * step;
  put(i);
  for (int64_t j = 0; j < k; ++j) scratch[j] = at(j) - scratch[j];
  put(count + i);
}

void Screen::settle(Team& team, const Matrix& head, const Rows& x, int64_t count, float* out, int64_t stride,
                    float* scratch) {
  team.for_each(count * pieces_, 1, [&](int64_t unit, int64_t) { estimate(unit, count, out, stride); });
  team.for_each(count * pieces_, 1, [&](int64_t unit, int64_t) { compute(unit, head, x, out, stride, scratch); });
}

void Screen::estimate(int64_t unit, int64_t count, float* out, int64_t stride) {
  const int64_t i = unit / pieces_;
  floors_[static_cast<size_t>(unit)] =
      kernels_->estimate(out + i * stride, out + (count + i) * stride, errors_.floats(), norms_[static_cast<size_t>(i)],
                         piece_begin(unit), piece_end(unit));
}

void Screen::compute(int64_t unit, const Matrix& head, const Rows& x, float* out, int64_t stride, float* scratch) {
  const int64_t i = unit / pieces_, panel_width = kernels_->panel, end = piece_end(unit);
  const float* floors = floors_.data() + i * pieces_;
  const float floor = *std::max_element(floors, floors + pieces_);
  const Rows row{x.data + i * x.stride, x.stride, nullptr};
  const Output to{out + i * stride, stride, Epilogue::store};
  for (int64_t output = piece_begin(unit); output < end;) {
    output = kernels_->first_reaching(out + i * stride, errors_.floats(), norms_[static_cast<size_t>(i)], floor, output,
                                      end);
    if (output == end) break;
    const int64_t panel = output / panel_width;
    kernels_->matmul(head, row, 1, to, panel, panel + 1, scratch);
    output = (panel + 1) * panel_width;
  }
}

}  // namespace native
