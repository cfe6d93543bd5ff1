// What an int8 copy of the head tells of its outputs, and which of them are computed (screen.hpp says why that will do).
#include "screen.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "rounding.hpp"
#include "shares.hpp"

namespace native {
namespace {

constexpr double kUp = 1.0 + 1e-6;    // what a conversion to float may take, and more
constexpr double kFlushed = 1e-30;    // a length that stands for what hardware takes for zero
constexpr float kLeastStep = 1e-37f;  // whose inverse is a number; rows of smaller ones are within what is flushed
constexpr double kUnit = 1.0 / (1 << 24);
constexpr float kRough = 1.0f / 64;  // |x - z| / |x|; of normally distributed values it is about 1 / 130

// Multiples of a step that int8 holds as they are, however its kernel rounds.
struct Multiples {
  float step, inverse;
  explicit Multiples(float largest) : step(largest / 127.0f), inverse(step > kLeastStep ? 1.0f / step : 0.0f) {}
  float nearest(float value) const { return nearest_whole(value * inverse) * step; }
};

}  // namespace

Screen::Screen(const Matrix& head, const Kernels& kernels)
    : kernels_(&kernels),
      rounded_(head.storage == Storage::bf16),
      float_rows_(kernels.plain(head.storage)),
      pieces_(ceil_div(head.num_panels, kPiecePanels)),
      row_outputs_(head.num_panels * kernels.panel),
      row_bytes_(round_up(kernels.row_bytes(Storage::s8, head.k), 64)),
      matrix_(Storage::s8, head.n, head.k, kernels),
      errors_(row_outputs_ * 4),
      sizes_(row_outputs_ * 4) {}

int64_t Screen::piece_end(int64_t unit) const {
  return std::min(piece_begin(unit) + kPiecePanels * kernels_->panel, matrix_.view().n);
}

void Screen::fill(const Tensor& weight, Pool& pool) {
  matrix_.fill(weight, nullptr, pool);
  const int64_t k = matrix_.view().k;
  const double rounding = 2 * static_cast<double>(k + 64) * kUnit;
  std::vector<float> space(static_cast<size_t>(2 * k * pool.size()));
  pool.run([&](Team& team, int thread) {
    float* row = space.data() + 2 * k * thread;
    float* quantised = row + k;
    team.for_each(matrix_.view().n, 64, [&](int64_t begin, int64_t end) {
      for (int64_t output = begin; output < end; ++output) {
        read_row(weight, output, row);
        matrix_.unpack(output, quantised);
        double squares = 0, apart = 0, held = 0;
        for (int64_t i = 0; i < k; ++i) {
          const double value = rounded_ ? bf16_to_float(float_to_bf16(row[i])) : row[i], off = value - quantised[i];
          squares += value * value;
          apart += off * off;
          held += static_cast<double>(quantised[i]) * quantised[i];
        }
        const double off = std::sqrt(apart), whole = std::sqrt(squares) + off;
        errors_.floats()[output] = static_cast<float>((off + rounding * whole + kFlushed) * kUp);
        sizes_.floats()[output] = static_cast<float>((std::sqrt(held) + kFlushed) * kUp);
      }
    });
  });
}

void Screen::reserve(const std::vector<Draw>& draws) {
  const auto count = static_cast<int64_t>(draws.size());
  rows_.reserve(2 * count * row_bytes_);
  scales_.reserve(2 * count * 4);
  per_row_.resize(draws.size());
  plain_bests_.resize(static_cast<size_t>(count * pieces_));
  noisy_bests_.resize(static_cast<size_t>(count * pieces_));
  const bool by_chance = std::any_of(draws.begin(), draws.end(), [](const Draw& d) { return d.temperature > 0; });
  if (by_chance) most_.reserve(count * row_outputs_ * 4);
}

int64_t Screen::prepare(Team& team, const Rows& x, int64_t count, float* scratch) {
  team.for_each(count, 1, [&](int64_t i, int64_t) {
    row(i).rest_place = -1;
    prepare_row(x.from(i).data, row(i), i, scratch);
  });
  const auto rough_before = [&](int64_t end) {
    return std::count_if(per_row_.begin(), per_row_.begin() + end, [](const Row& row) { return row.rough; });
  };
  const int64_t all = count + rough_before(count);
  if (all > count) {
    team.for_each(count, 1, [&](int64_t i, int64_t) {
      if (!row(i).rough) return;
      row(i).rest_place = count + rough_before(i);
      prepare_row(x.from(i).data, row(i), i, scratch);
    });
  }
  return all;
}

// An int8 row at `place`, and another one of what it leaves over if that has a place.
void Screen::prepare_row(const uint8_t* data, Row& row, int64_t place, float* scratch) {
  const int64_t k = matrix_.view().k;
  std::memset(scratch + k, 0, static_cast<size_t>(round_up(k, kLanes) - k) * 4);
  // Returns the multiples that the int8 row holds, and in `rest` the length of what is left over.
  const auto put = [&](auto at, int64_t to, double& rest) {
    float largest = 0.0f;
    for (int64_t j = 0; j < k; ++j) largest = std::max(largest, std::fabs(at(j)));
    const Multiples held(largest);
    double squares = 0;
    for (int64_t j = 0; j < k; ++j) {
      scratch[j] = held.nearest(at(j));
      const double left = static_cast<double>(at(j)) - scratch[j];
      squares += left * left;
    }
    rest = std::sqrt(squares);
    kernels_->prepare(Storage::s8, scratch, k, rows_.data() + to * row_bytes_, scales_.floats() + to);
    return held;
  };
  const auto x = [&](int64_t j) {
    if (float_rows_) return reinterpret_cast<const float*>(data)[j];
    return bf16_to_float(reinterpret_cast<const uint16_t*>(data)[j]);
  };
  double squares = 0, rest = 0;
  for (int64_t j = 0; j < k; ++j) squares += static_cast<double>(x(j)) * x(j);
  const double norm = std::sqrt(squares);
  const Multiples first = put(x, place, rest);
  if (row.rest_place < 0) {
    row.rough = rest > kRough * norm;
  } else {
    put([&](int64_t j) { return x(j) - first.nearest(x(j)); }, row.rest_place, rest);
  }
  row.norm = static_cast<float>((norm + kFlushed) * kUp);
  row.rest = static_cast<float>((rest + kFlushed) * kUp);
}

void Screen::settle(Team& team, int thread, const Matrix& head, const Rows& x, const std::vector<Draw>& draws,
                    float* out, int64_t stride, float* scratch) {
  const auto count = static_cast<int64_t>(draws.size());
  const Shares shares(count, team.size());
  const auto draw = [&](int64_t i) { return draws[static_cast<size_t>(i)]; };
  RowFloor floor;
  for_each_cell(team, thread, shares, pieces_, count * pieces_, [&](int64_t i, int64_t piece) {
    const float* rest = row(i).rough ? out + row(i).rest_place * stride : nullptr;
    look(i * pieces_ + piece, draw(i), out + i * stride, rest, floor);
  });
  team.for_each(count, 1, [&](int64_t i, int64_t) {
    find_floors(i, head, x.from(i), draw(i), out + i * stride, scratch);
  });
  for_each_cell(team, thread, shares, pieces_, 1, [&](int64_t i, int64_t piece) {
    compute(i * pieces_ + piece, head, x.from(i), draw(i), out + i * stride, scratch);
  });
}

// Makes a piece's estimates whole, and finds which output is sure to be the largest of them. With noise, those that stay
// below the thread's floor of the row are passed over, and what was found raises it.
void Screen::look(int64_t unit, const Draw& draw, float* values, const float* rest, RowFloor& floor) {
  const int64_t i = unit / pieces_, begin = piece_begin(unit), end = piece_end(unit);
  if (rest) kernels_->sum_estimates(values, rest, begin, end);
  const Estimates x = estimates(i, values);
  plain_bests_[static_cast<size_t>(unit)] = kernels_->surest(x, begin, end);
  if (draw.temperature > 0) {
    const Candidate best = kernels_->noisy_surest(x, draw.temperature, draw.stream, begin, end, floor.of(i), most(i));
    floor.raise(best.value);
    noisy_bests_[static_cast<size_t>(unit)] = best;
  }
}

// Computes the one that is sure to be the largest of all. Without noise, too: the sum of all exponentials, of which the
// logprob is made, is of little else.
void Screen::find_floors(int64_t i, const Matrix& head, const Rows& x, const Draw& draw, float* values,
                         float* scratch) {
  Row& found = row(i);
  found.plain_floor = found.noisy_floor = kNothing;
  found.num_vectors = 0;
  const int64_t plain = largest_found(plain_bests_, i, pieces_).id;
  const int64_t noisy = draw.temperature > 0 ? largest_found(noisy_bests_, i, pieces_).id : -1;
  for (const int64_t id : {std::min(plain, noisy), std::max(plain, noisy)}) {
    const auto vector = static_cast<int32_t>(id / kernels_->lanes);
    const bool again = found.num_vectors && found.vectors[0] == vector;
    if (id >= 0 && !again) found.vectors[found.num_vectors++] = vector;
  }
  kernels_->matmul_vectors(head, x, found.vectors, found.num_vectors, values, scratch);
  if (plain >= 0) found.plain_floor = values[plain];
  if (noisy >= 0) found.noisy_floor = values[noisy] / draw.temperature + kernels_->gumbel(noisy, draw.stream);
}

// Computes those of a piece that may be as large.
void Screen::compute(int64_t unit, const Matrix& head, const Rows& x, const Draw& draw, float* values,
                     float* scratch) {
  const int64_t i = unit / pieces_, begin = piece_begin(unit), end = piece_end(unit), first = begin / kernels_->lanes;
  const Row& found = row(i);
  bool wanted[kMostVectors] = {};
  kernels_->plain_reaching(estimates(i, values), found.plain_floor, begin, end, wanted);
  if (draw.temperature > 0) kernels_->noisy_reaching(most(i), found.noisy_floor, begin, end, wanted);
  for (int64_t v = 0; v < found.num_vectors; ++v) {
    const int64_t place = found.vectors[v] - first;
    if (place >= 0 && place < kMostVectors) wanted[place] = false;
  }
  int32_t vectors[kMostVectors];
  int64_t count = 0;
  for (int64_t v = 0; v < kMostVectors; ++v) {
    if (wanted[v]) vectors[count++] = static_cast<int32_t>(first + v);
  }
  kernels_->matmul_vectors(head, x, vectors, count, values, scratch);
}

}  // namespace native
