// Rows of logits are worked on in pieces, each by any thread: what is found in them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "kernels.hpp"

namespace native {

constexpr float kNothing = -std::numeric_limits<float>::infinity();  // less than any logit that can be drawn

// The largest of what was found in a row's pieces; the first among equals, which has the lowest id.
inline const Candidate& largest_found(const std::vector<Candidate>& found, int64_t row, int64_t pieces) {
  const auto first = found.begin() + row * pieces;
  return *std::max_element(first, first + pieces, [](const Candidate& a, const Candidate& b) { return a.value < b.value; });
}

// The largest value that a thread has found in a row: what is smaller does not matter in the row's other pieces.
class RowFloor {
 public:
  float of(int64_t row) {
    if (row != row_) value_ = kNothing;
    row_ = row;
    return value_;
  }
  void raise(float value) { value_ = std::max(value_, value); }

 private:
  int64_t row_ = -1;
  float value_ = kNothing;
};

}  // namespace native
