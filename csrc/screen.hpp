// The head of rows of which only the drawn token is wanted: an int8 copy of its weights, which is half of bf16's bytes
// and a quarter of float32's, tells which outputs could be the largest, and those few are computed as ever. Where a token
// is drawn by chance from all of them, it is the largest of the logits over the temperature and with Gumbel noise.
//
// Let w be an output's weights as the head stores them and s q their int8 form, x a row as the head multiplies it and
// z = t a its int8 form. Then
//
//   x.w = z.(s q) + (x - z).(s q) + x.(w - s q),
//
// and by Cauchy and Schwarz the last two terms are at most |x - z| |s q| + |x| |w - s q|. Rounding in float32 of either
// side, the head's own sum of k products above all, is at most 2 (k + 64) 2^-24 |x| (|w| + |w - s q|) together. So the
// estimate z.(s q) tells how large an output can be at most. One that is sure to be large is computed first, and then all
// that could be as large as that: the largest is among them, and every one that equals it, bit for bit as the head makes
// them. With noise, both sides are divided by the temperature and have the same noise added, which leaves their order. A
// row of which int8 leaves over too much, because a few of its values are far larger than the rest, is two int8 rows, the
// second of what the first leaves over.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "packing.hpp"
#include "pieces.hpp"
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
  int64_t bytes() const { return matrix_.bytes() + errors_.bytes() + sizes_.bytes(); }
  const Packed& matrix() const { return matrix_; }

  // Makes room for the rows of these draws. Call before the threads start.
  void reserve(const std::vector<Draw>& draws);

  // On all threads: the int8 rows of `count` rows as the head multiplies them, row i's first one being number i. Returns
  // how many there are, 2 * count at most. scratch: the thread's, round_up(k, 16) floats.
  int64_t prepare(Team& team, const Rows& x, int64_t count, float* scratch);
  Rows rows() const { return {rows_.data(), row_bytes_, scales_.floats()}; }

  // On all threads: makes estimates of what the int8 rows gave, row i's at out + i * stride, and puts what the head makes
  // of `x` in the place of those that draws[i] could take, and of some others. scratch: the thread's, for the head's
  // kernel.
  void settle(Team& team, int thread, const Matrix& head, const Rows& x, const std::vector<Draw>& draws, float* out,
              int64_t stride, float* scratch);

 private:
  static constexpr int64_t kPiecePanels = 64;  // that are looked through together
  static constexpr int64_t kMostVectors = 4 * kPiecePanels;  // of them, on any instruction set

  struct Row {
    float norm, rest;      // |x| and |x - z|, rounded up
    bool rough;            // has a second int8 row,
    int64_t rest_place;    // which is this one, or -1
    float plain_floor, noisy_floor;  // what an output must reach to matter
    int32_t vectors[2];    // that are computed already, ascending
    int64_t num_vectors;
  };

  void prepare_row(const uint8_t* data, Row& row, int64_t place, float* scratch);
  void look(int64_t unit, const Draw& draw, float* values, const float* rest, RowFloor& floor);
  void find_floors(int64_t i, const Matrix& head, const Rows& x, const Draw& draw, float* values, float* scratch);
  void compute(int64_t unit, const Matrix& head, const Rows& x, const Draw& draw, float* values, float* scratch);

  Row& row(int64_t i) { return per_row_[static_cast<size_t>(i)]; }
  const Row& row(int64_t i) const { return per_row_[static_cast<size_t>(i)]; }
  Estimates estimates(int64_t i, const float* values) const {
    return {values, errors_.floats(), sizes_.floats(), row(i).norm, row(i).rest};
  }
  float* most(int64_t i) const { return most_.floats() + i * row_outputs_; }
  int64_t piece_begin(int64_t unit) const { return unit % pieces_ * kPiecePanels * kernels_->panel; }
  int64_t piece_end(int64_t unit) const;

  const Kernels* kernels_ = nullptr;
  bool rounded_ = false;     // the head's weights are bf16
  bool float_rows_ = false;  // and the rows that it multiplies float32
  int64_t pieces_ = 0;
  int64_t row_outputs_ = 0;  // of whole panels
  int64_t row_bytes_ = 0;
  Packed matrix_;
  Buffer errors_, sizes_;  // of every output: |w - s q| and all rounding, for a row of length 1, and |s q|
  Buffer rows_, scales_;
  Buffer most_;  // with noise, [rows, row_outputs_]
  std::vector<Row> per_row_;
  std::vector<Candidate> plain_bests_, noisy_bests_;  // [rows, pieces]: what is sure to be the largest
};

}  // namespace native
