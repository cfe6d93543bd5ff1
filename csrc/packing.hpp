// From tensors as PyTorch stores them to the packed form that the kernels read.
#pragma once

#include <cstdint>

#include "rounding.hpp"
#include "buffer.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace native {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// A tensor of one or two dimensions in somebody else's memory; strides count elements. A vector has one row.
struct Tensor {
  const void* data;
  Dtype dtype;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
};

// Columns of row `row` as floats, to out[columns].
void read_row(const Tensor& tensor, int64_t row, float* out);

// A packed matrix and the memory it lies in.
class Packed {
 public:
  Packed() = default;
  Packed(Storage storage, int64_t n, int64_t k, const Kernels& kernels);

  // Takes new values, in place. `bias` is null for none. Whole panels are shared out among the pool's threads.
  void fill(const Tensor& weight, const Tensor* bias, Pool& pool);

  // Output `output`'s weights as floats, to out[k].
  void unpack(int64_t output, float* out) const;

  const Matrix& view() const { return view_; }
  int64_t bytes() const {
    return data_.bytes() + bias_.bytes() + scale_.bytes() + sums_.bytes() + exceptions_.bytes() + exception_counts_.bytes();
  }

 private:
  Matrix laid_out(bool coded) const;
  void make_room(bool coded);
  bool code(const Tensor& weight, Pool& pool);
  void fill_panel(const Tensor& weight, int64_t panel, float* row, uint32_t* words);
  void quantise_s8(int64_t output, const float* row, uint8_t* lane);
  void quantise_s4(int64_t output, const float* row, uint32_t* words);

  Matrix view_{};
  int64_t panel_ = 0;
  const Kernels* kernels_ = nullptr;
  Buffer data_, bias_, scale_, sums_, exceptions_, exception_counts_;
};

// A table whose rows are looked up, in float32 or bf16.
class Table {
 public:
  Table() = default;
  Table(bool bf16, int64_t rows, int64_t columns);
  void fill(const Tensor& tensor, Pool& pool);
  void add_row(int64_t row, float* out) const;  // out[columns] += the row
  int64_t bytes() const { return data_.bytes(); }

 private:
  bool bf16_ = false;
  int64_t rows_ = 0, columns_ = 0;
  Buffer data_;
};

}  // namespace native
