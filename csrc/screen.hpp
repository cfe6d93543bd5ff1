// The head of rows of which only the drawn token is wanted: an int8 copy of its weights, which is half of bf16's bytes
// and a quarter of float32's, tells which outputs could be the largest, and those few are computed as ever. Where a token
// is drawn by chance from all of them, it is the largest of the logits over the temperature and with Gumbel noise.
//
// Let w be an output's weights as the head stores them and s q their int8 form, x a row as the head multiplies it, and
// t0 a + t1 b two int8 rows of which the second holds what the first left over. Then
//
//   x.w = s (t0 a.q + t1 b.q) + (x - t0 a - t1 b).(s q) + x.(w - s q),
//
// and by Cauchy and Schwarz the last two terms are at most |x| E with E = |w - s q| + rho (|w| + |w - s q|), where
// rho = sqrt(k) / 64516 bounds |x - t0 a - t1 b| / |x|: no value is off by more than half of t1, which is at most
// max |x| / 127 / 254. Rounding in float32 of either side, the head's own sum of k products above all, is at most
// 2 (k + 64) 2^-24 |x| (|w| + |w - s q|) together, which E takes in. So an output whose estimate plus |x| E is below the
// largest of all estimates minus |x| E is not the largest; the others, every one that equals the largest among them,
// become what the head makes of them, bit for bit. With noise, both sides are divided by the temperature and have the
// same noise added, whose sum rounds by another 24 * 2^-24 at most.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "packing.hpp"
#include "pool.hpp"

namespace native {

class Screen {
 public:
  // What is drawn after a row: the most probable token where the temperature is 0, else one by chance.
  struct Draw {
    float temperature;
    Stream stream;
  };

  Screen() = default;
  // Of a head whose weights are float32 or bf16.
  Screen(const Matrix& head, const Kernels& kernels);

  void fill(const Tensor& weight, Pool& pool);
  int64_t bytes() const { return matrix_.bytes() + errors_.bytes(); }
  const Packed& matrix() const { return matrix_; }

  // Makes room for `count` rows. Call before the threads start.
  void reserve(int64_t count);

  // Row i of `count`, as the head multiplies it, as two int8 rows, number i and count + i. scratch: round_up(k, 16)
  // floats.
  void prepare(const uint8_t* row, int64_t i, int64_t count, float* scratch);
  Rows rows() const { return {rows_.data(), row_bytes_, scales_.floats()}; }

  // On all threads: sums what the int8 rows i and count + i gave, at out + i * stride and out + (count + i) * stride, to
  // estimates at the first, and puts what the head makes of `x`, the rows as it multiplies them, in the place of those
  // that draws[i] could take. scratch: the thread's, for the head's kernel.
  void settle(Team& team, int thread, const Matrix& head, const Rows& x, int64_t count, const Draw* draws, float* out,
              int64_t stride, float* scratch);

 private:
  static constexpr int64_t kPiecePanels = 64;  // whose floor is found together

  void find_floor(int64_t unit, const Draw& draw, float* values, float* rest);
  void compute(int64_t unit, const Matrix& head, const Rows& x, const Draw& draw, float* values, const float* most,
               float* scratch);
  Estimates estimates(int64_t row, const float* values) const {
    return {values, errors_.floats(), norms_[static_cast<size_t>(row)]};
  }
  int64_t piece_begin(int64_t unit) const { return unit % pieces_ * kPiecePanels * kernels_->panel; }
  int64_t piece_end(int64_t unit) const;

  const Kernels* kernels_ = nullptr;
  bool rounded_ = false;  // the head's weights are bf16
  bool plain_ = false;    // and its rows float32
  int64_t pieces_ = 0;
  int64_t row_bytes_ = 0;
  Packed matrix_;
  Buffer errors_;  // E of every output
  Buffer rows_, scales_;
  std::vector<float> norms_;   // |x|, rounded up
  std::vector<float> plain_floors_, noisy_floors_;  // [rows, pieces]: the largest estimate less its error
};

}  // namespace native
