#include "packing.hpp"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <vector>

namespace native {
namespace {

float half_to_float(uint16_t half) {
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  const float sign = (half & 0x8000) ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(static_cast<float>(fraction + 1024), exponent - 25)
                          : std::ldexp(static_cast<float>(fraction), -24));
}

template <class T, class Convert>
void read(const Tensor& tensor, int64_t row, float* out, Convert convert) {
  const T* data = static_cast<const T*>(tensor.data) + row * tensor.row_stride;
  if (tensor.column_stride == 1) {
    for (int64_t i = 0; i < tensor.columns; ++i) out[i] = convert(data[i]);
  } else {
    for (int64_t i = 0; i < tensor.columns; ++i) out[i] = convert(data[i * tensor.column_stride]);
  }
}

}  // namespace

void read_row(const Tensor& tensor, int64_t row, float* out) {
  switch (tensor.dtype) {
    case Dtype::f32: read<float>(tensor, row, out, [](float v) { return v; }); break;
    case Dtype::bf16: read<uint16_t>(tensor, row, out, bf16_to_float); break;
    case Dtype::f16: read<uint16_t>(tensor, row, out, half_to_float); break;
    case Dtype::f64: read<double>(tensor, row, out, [](double v) { return static_cast<float>(v); }); break;
  }
}

Packed::Packed(Storage storage, int64_t n, int64_t k, const Kernels& kernels)
    : panel_(kernels.panel), kernels_(&kernels) {
  view_.storage = storage;
  view_.n = n;
  view_.k = k;
  view_.num_panels = ceil_div(n, panel_);
  const int64_t outputs = view_.num_panels * panel_;
  make_room(storage == Storage::bf16 && kernels.code_panel && kernels.coded_panel_bytes(k) < laid_out(false).panel_bytes);
  if (quantised(storage)) {
    scale_ = Buffer(outputs * 4);
    sums_ = Buffer(outputs * 4);
    view_.scale = scale_.floats();
    view_.sums = reinterpret_cast<const int32_t*>(sums_.data());
  }
}

// The matrix with the steps and bytes of panels, coded or as they are.
Matrix Packed::laid_out(bool coded) const {
  Matrix m = view_;
  m.coded = coded;
  if (coded) {
    m.steps = ceil_div(m.k, kCodedGroup) * kCodedGroup / 2;
    m.panel_bytes = kernels_->coded_panel_bytes(m.k);
    return m;
  }
  const int64_t group = group_of(m.storage);
  m.steps = ceil_div(m.k, group ? group : k_per_lane(m.storage));
  if (m.storage == Storage::bf16 || m.storage == Storage::s8) m.steps = round_up(m.steps, kernels_->step_multiple);
  // Of a step: lanes of 32 bits, or multipliers and lanes of eight nibbles.
  m.panel_bytes = m.steps * (group ? kernels_->multiplier_bytes + panel_ * group / 2 : panel_ * 4);
  return m;
}

// Makes room for the panels. If it throws nothing has changed.
void Packed::make_room(bool coded) {
  Matrix next = laid_out(coded);
  Buffer data(next.num_panels * next.panel_bytes), counts, exceptions;
  next.data = data.data();
  if (coded) {
    next.most_exceptions = most_exceptions(next.k * panel_);
    counts = Buffer(next.num_panels * 4);
    exceptions = Buffer(next.num_panels * next.most_exceptions * static_cast<int64_t>(sizeof(Exception)));
    next.exception_counts = reinterpret_cast<const int32_t*>(counts.data());
    next.exceptions = reinterpret_cast<const Exception*>(exceptions.data());
  }
  data_ = std::move(data), exception_counts_ = std::move(counts), exceptions_ = std::move(exceptions);
  view_ = next;
}

// Whether the panels could be coded, and now are.
bool Packed::code(const Tensor& weight, Pool& pool) {
  const int64_t stride = round_up(view_.k, kCodedGroup);
  std::vector<uint16_t> weights(static_cast<size_t>(panel_ * stride * pool.size()));
  std::vector<float> rows(static_cast<size_t>(view_.k * pool.size()));
  auto* exceptions = reinterpret_cast<Exception*>(exceptions_.data());
  auto* counts = reinterpret_cast<int32_t*>(exception_counts_.data());
  std::atomic<bool> failed{false};
  pool.run([&](Team& team, int thread) {
    uint16_t* own = weights.data() + thread * panel_ * stride;
    float* row = rows.data() + thread * view_.k;
    team.for_each(view_.num_panels, 1, [&](int64_t panel, int64_t) {
      for (int64_t lane = 0; lane < panel_; ++lane) {
        uint16_t* rounded = own + lane * stride;
        const int64_t output = panel * panel_ + lane, columns = output < view_.n ? view_.k : 0;
        if (columns) read_row(weight, output, row);
        for (int64_t k = 0; k < columns; ++k) rounded[k] = float_to_bf16(row[k]);
        std::fill(rounded + columns, rounded + stride, uint16_t{0});
      }
      Exception* first = exceptions + panel * view_.most_exceptions;
      uint8_t* out = data_.data() + panel * view_.panel_bytes;
      const int32_t count = kernels_->code_panel(own, stride, view_.most_exceptions, out, first);
      if (count < 0) failed = true;
      counts[panel] = std::max(count, 0);
      std::sort(first, first + counts[panel], [](const Exception& a, const Exception& b) { return a.k < b.k; });
    });
  });
  return !failed;
}

void Packed::fill(const Tensor& weight, const Tensor* bias, Pool& pool) {
  if (bias) {
    if (!bias_.bytes()) bias_ = Buffer(view_.num_panels * panel_ * 4);
    read_row(*bias, 0, bias_.floats());
    view_.bias = bias_.floats();
  }
  if (view_.coded) {
    if (code(weight, pool)) return;
    make_room(false);  // for good: else it would take and give back memory at every update
  }
  const int64_t width = round_up(std::max(view_.k, view_.steps * k_per_lane(view_.storage)), kMaxGroup);
  const int64_t room = width + width / 4;  // a row of floats, then what it is quantised to
  std::vector<float> rows(static_cast<size_t>(room * pool.size()), 0.0f);
  pool.run([&](Team& team, int thread) {
    float* row = rows.data() + thread * room;
    auto* words = reinterpret_cast<uint32_t*>(row + width);
    team.for_each(view_.num_panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) fill_panel(weight, panel, row, words);
    });
  });
}

void Packed::fill_panel(const Tensor& weight, int64_t panel, float* row, uint32_t* words) {
  const int64_t first = panel * panel_;
  for (int64_t lane = 0; lane < panel_ && first + lane < view_.n; ++lane) {
    read_row(weight, first + lane, row);
    uint8_t* out = data_.data() + panel * view_.panel_bytes + lane * 4;  // lanes of a step are panel_ * 4 bytes apart
    const int64_t step = panel_ * 4;
    switch (view_.storage) {
      case Storage::f32:
        for (int64_t k = 0; k < view_.k; ++k) std::memcpy(out + k * step, row + k, 4);
        break;
      case Storage::bf16:
        for (int64_t k = 0; k < view_.k; k += 2) {  // row is zero past k
          const uint32_t pair = float_to_bf16(row[k]) | static_cast<uint32_t>(float_to_bf16(row[k + 1])) << 16;
          std::memcpy(out + k / 2 * step, &pair, 4);
        }
        break;
      case Storage::s8: quantise_s8(first + lane, row, out); break;
      default: quantise_s4(first + lane, row, words); break;
    }
  }
}

// Symmetric: the largest magnitude is 127. NaN and infinity go into the scale, so that they are not lost.
void Packed::quantise_s8(int64_t output, const float* row, uint8_t* lane) {
  float largest = 0.0f, check = 0.0f;
  for (int64_t k = 0; k < view_.k; ++k) {
    const float magnitude = std::fabs(row[k]);
    largest = magnitude > largest ? magnitude : largest;
    check += row[k] * 0.0f;
  }
  const float scale = largest / 127.0f;
  const float inverse = scale > FLT_MIN ? 1.0f / scale : 0.0f;  // of a smaller one it could be infinite
  scale_.floats()[output] = scale + check;
  int32_t sum = 0;
  for (int64_t k = 0; k < view_.steps * 4; k += 4) {
    for (int i = 0; i < 4; ++i) {
      const float quotient = check == 0.0f ? row[k + i] * inverse : 0.0f;
      const int value = static_cast<int>(nearest_whole(quotient));  // of 127.00001 at most
      lane[k / 4 * panel_ * 4 + kernels_->s8_order[i]] = static_cast<uint8_t>(static_cast<int8_t>(value));
      sum += value;
    }
  }
  reinterpret_cast<int32_t*>(sums_.data())[output] = sum;
}

void Packed::quantise_s4(int64_t output, const float* row, uint32_t* words) {
  const int64_t group = group_of(view_.storage), lane = output % panel_, lanes = group / 8;
  auto* extremes = reinterpret_cast<float*>(words + view_.steps * lanes);
  auto* multipliers = reinterpret_cast<int8_t*>(extremes + view_.steps);
  scale_.floats()[output] = kernels_->quantise_nibbles(row, view_.steps * group, group, extremes, words, multipliers);
  const int64_t step_bytes = kernels_->multiplier_bytes + panel_ * group / 2;
  uint8_t* step = data_.data() + output / panel_ * view_.panel_bytes;
  int32_t sum = 0;
  for (int64_t g = 0; g < view_.steps; ++g, step += step_bytes) {
    step[lane] = static_cast<uint8_t>(multipliers[g]);
    int32_t nibbles = 0;
    for (int64_t j = 0; j < lanes; ++j, ++words) {
      std::memcpy(step + kernels_->multiplier_bytes + (j * panel_ + lane) * 4, words, sizeof *words);
      const uint32_t pairs = (*words & 0x0f0f0f0fu) + (*words >> 4 & 0x0f0f0f0fu);
      nibbles += static_cast<int32_t>(pairs * 0x01010101u >> 24);  // their sum, at most 120
    }
    sum += (nibbles - 8 * static_cast<int32_t>(group)) * multipliers[g];
  }
  reinterpret_cast<int32_t*>(sums_.data())[output] = sum;
}

void Packed::unpack(int64_t output, float* out) const {
  if (view_.coded) {
    const int64_t panel = output / panel_, lane = output % panel_;
    kernels_->decode_output(view_.data + panel * view_.panel_bytes, lane, view_.k, out);
    for (const Exception& e : view_.exceptions_of(panel)) {
      if (e.lane == lane) out[e.k] = bf16_to_float(e.weight);
    }
    return;
  }
  const uint8_t* lane = view_.data + output / panel_ * view_.panel_bytes + output % panel_ * 4;
  const int64_t step = panel_ * 4;
  for (int64_t k = 0; k < view_.k; ++k) {
    if (view_.storage == Storage::f32) {
      std::memcpy(out + k, lane + k * step, 4);
    } else if (view_.storage == Storage::bf16) {
      uint16_t value;
      std::memcpy(&value, lane + k / 2 * step + k % 2 * 2, 2);
      out[k] = bf16_to_float(value);
    } else {
      out[k] = static_cast<float>(static_cast<int8_t>(lane[k / 4 * step + kernels_->s8_order[k % 4]])) * view_.scale[output];
    }
  }
}

Table::Table(bool bf16, int64_t rows, int64_t columns)
    : bf16_(bf16), rows_(rows), columns_(columns), data_(rows * columns * (bf16 ? 2 : 4)) {}

void Table::fill(const Tensor& tensor, Pool& pool) {
  std::vector<float> rows(static_cast<size_t>(columns_ * pool.size()));
  pool.run([&](Team& team, int thread) {
    float* row = rows.data() + thread * columns_;
    team.for_each(rows_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        if (!bf16_) {
          read_row(tensor, r, data_.floats() + r * columns_);
          continue;
        }
        read_row(tensor, r, row);
        uint16_t* out = reinterpret_cast<uint16_t*>(data_.data()) + r * columns_;
        for (int64_t i = 0; i < columns_; ++i) out[i] = float_to_bf16(row[i]);
      }
    });
  });
}

void Table::add_row(int64_t row, float* out) const {
  if (bf16_) {
    const uint16_t* data = reinterpret_cast<const uint16_t*>(data_.data()) + row * columns_;
    for (int64_t i = 0; i < columns_; ++i) out[i] += bf16_to_float(data[i]);
  } else {
    const float* data = data_.floats() + row * columns_;
    for (int64_t i = 0; i < columns_; ++i) out[i] += data[i];
  }
}

}  // namespace native
