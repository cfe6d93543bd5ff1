// The steps after one that drew a token of every sequence, when nobody looks at it in between: each runs what the one
// before drew, a position further on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "model.hpp"

namespace native {

class LaterSteps {
 public:
  // Of a batch that Model::check has passed; its arrays have to outlive this.
  LaterSteps(const Batch& first, int64_t block_size)
      : batch_(first),
        block_size_(block_size),
        positions_(first.positions, first.positions + first.num_tokens),
        context_lens_(first.context_lens, first.context_lens + first.num_sequences),
        draw_positions_(first.sampling.positions, first.sampling.positions + first.num_sequences),
        slots_(positions_.size()) {
    batch_.num_steps = 1;
    batch_.num_copies = 0;
    batch_.previous_rows = nullptr;
    batch_.positions = positions_.data();
    batch_.context_lens = context_lens_.data();
    batch_.slots = slots_.data();
    batch_.sampling.positions = draw_positions_.data();
  }
  LaterSteps(const LaterSteps&) = delete;
  LaterSteps& operator=(const LaterSteps&) = delete;

  // Whether no step may follow these draws, one of every sequence.
  bool ends(const int32_t* drawn) const {
    const int32_t* last = batch_.ending_ids + batch_.num_endings;
    return std::any_of(drawn, drawn + batch_.num_sequences,
                       [&](int32_t id) { return id < 0 || std::find(batch_.ending_ids, last, id) != last; });
  }

  // The step that runs these. The batch is the same object every time.
  const Batch& next(const int32_t* drawn) {
    batch_.token_ids = drawn;
    for (size_t s = 0; s < slots_.size(); ++s) {
      const int64_t position = ++positions_[s];
      ++context_lens_[s];
      ++draw_positions_[s];
      const int32_t* table = batch_.block_tables + static_cast<int64_t>(s) * batch_.table_width;
      slots_[s] = table[position / block_size_] * block_size_ + position % block_size_;
    }
    return batch_;
  }

 private:
  Batch batch_;
  const int64_t block_size_;
  std::vector<int32_t> positions_, context_lens_;
  std::vector<uint32_t> draw_positions_;
  std::vector<int64_t> slots_;
};

}  // namespace native
