// Steps: what is asked of a batch, and the space for it.

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "later_steps.hpp"
#include "model.hpp"
#include "rounding.hpp"

namespace native {
namespace {

void check_range(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value < high) return;
  throw std::invalid_argument(std::string(what) + " " + std::to_string(value) + " is out of range: it must be in [" +
                              std::to_string(low) + ", " + std::to_string(high) + ")");
}

}  // namespace

int64_t Model::run(const Batch& first, float* logits, const Draws& draws, const std::function<void()>& between) {
  step(first, logits, draws);
  if (first.num_steps == 1) return 1;
  const int64_t rows = first.sampling.num_rows;
  LaterSteps later(first, config_.block_size);
  int64_t done = 1;
  for (const int32_t* drawn = draws.token_ids; done < first.num_steps && !later.ends(drawn); ++done) {
    between();
    const Draws here = draws.after(done * rows, first.sampling.num_logprobs);
    step(later.next(drawn), nullptr, here);
    if (*std::min_element(here.token_ids, here.token_ids + rows) < 0) {
      Busy busy(busy_);
      last_drawn_.assign(drawn, drawn + rows);
      break;
    }
    drawn = here.token_ids;
  }
  return done;
}

void Model::step(const Batch& batch, float* logits, const Draws& draws) {
  Busy busy(busy_);
  check(batch);
  reserve(batch);
  copy_blocks(batch);
  pool_.run([&](Team& team, int thread) {
    run_layers(team, thread, batch);
    run_head(team, thread, batch, logits, draws);
  });
  last_drawn_.assign(draws.token_ids, draws.token_ids + batch.sampling.num_rows);
}

void Model::check(const Batch& b) const {
  if (!loaded_) throw std::invalid_argument("the model has no weights yet");
  if (b.num_tokens < 1) throw std::invalid_argument("the batch has no tokens");
  check_range("number of steps", b.num_steps, 1, config_.context_length + 1);
  const int64_t later = b.num_steps - 1;  // positions that a sequence goes on by
  if (later) check_later(b);
  for (int64_t t = 0; t < b.num_tokens; ++t) {
    if (b.previous_rows && b.previous_rows[t] >= 0) {
      check_range("previous row", b.previous_rows[t], 0, static_cast<int64_t>(last_drawn_.size()));
      check_range("token id drawn before", last_drawn_[static_cast<size_t>(b.previous_rows[t])], 0, config_.vocab_size);
    } else {
      check_range("token id", b.token_ids[t], 0, config_.vocab_size);
    }
    check_range("position", b.positions[t], 0, config_.context_length);
    check_range("slot", b.slots[t], -1, num_blocks_ * config_.block_size);
  }
  check_range("first query start", b.query_starts[0], 0, 1);
  check_range("last query start", b.query_starts[b.num_sequences], b.num_tokens, b.num_tokens + 1);
  for (int64_t s = 0; s < b.num_sequences; ++s) {
    const int64_t begin = b.query_starts[s], end = b.query_starts[s + 1], length = b.context_lens[s];
    check_range("query start", end, begin, b.num_tokens + 1);
    check_range("context length", length, 0, b.table_width * config_.block_size + 1);
    for (int64_t t = begin; t < end; ++t) check_range("position", b.positions[t], 0, length);
    for (int64_t i = 0; i < ceil_div(length + later, config_.block_size); ++i) {
      check_range("block", b.block_tables[s * b.table_width + i], 0, num_blocks_);
    }
  }
  for (int64_t i = 0; i < 2 * b.num_copies; ++i) check_range("block", b.block_copies[i], 0, num_blocks_);
  for (int64_t i = 0; i < b.num_logits; ++i) check_range("logits row", b.logits_rows[i], 0, b.num_tokens);
  const Sampling& s = b.sampling;
  for (int64_t r = 0; r < s.num_rows; ++r) check_range("draw row", s.draw_rows[r], 0, b.num_tokens);
  for (const SparseRows* sparse : {&s.output_counts, &s.logit_bias}) {
    if (!sparse->starts) continue;
    for (int64_t r = 0; r < s.num_rows; ++r) {
      for (int32_t i = sparse->starts[r]; i < sparse->starts[r + 1]; ++i) {
        check_range("token id of a sampling option", sparse->ids[i], 0, config_.vocab_size);
      }
    }
  }
}

// What a batch of several steps has to be, besides what `check` asks of every batch.
void Model::check_later(const Batch& b) const {
  const Sampling& s = b.sampling;
  bool plain = b.num_tokens == b.num_sequences && b.num_tokens == s.num_rows && !b.num_logits && !s.output_counts.starts;
  for (int64_t r = 0; plain && r < s.num_rows; ++r) plain = b.query_starts[r + 1] == r + 1 && s.draw_rows[r] == r;
  if (!plain) {
    throw std::invalid_argument("num_steps is " + std::to_string(b.num_steps) +
                                ": several steps need one token of every sequence and a draw after it, in order, no "
                                "logits and no penalties");
  }
  const int64_t later = b.num_steps - 1, room = b.table_width * config_.block_size;
  for (int64_t q = 0; q < b.num_sequences; ++q) {
    check_range("position in the last step", b.positions[q] + later, 0, config_.context_length);
    check_range("context length in the last step", b.context_lens[q] + later, 0, room + 1);
  }
}

void Model::reserve(const Batch& b) {
  const int64_t rows = b.num_tokens, threads = pool_.size();
  x_.reserve(rows * width_ * 4);
  qkv_.reserve(rows * qkv_width_ * 4);
  attended_.reserve(rows * width_ * 4);
  hidden_.reserve(rows * hidden_width_ * 4);
  const int64_t head_rows = reserve_head(b);
  prepared_.reserve(std::max(rows, head_rows) * max_row_bytes_);
  scales_.reserve(std::max(rows, head_rows) * 4);
  context_blocks_.clear(), context_starts_.assign(1, 0);
  int64_t most_blocks = 0;
  for (int64_t q = 0; q < b.num_sequences; ++q) {
    const int64_t blocks = ceil_div(b.context_lens[q], config_.block_size);
    const int32_t* table = b.block_tables + q * b.table_width;
    context_blocks_.insert(context_blocks_.end(), table, table + blocks);
    context_starts_.push_back(static_cast<int64_t>(context_blocks_.size()));
    most_blocks = std::max(most_blocks, blocks);
  }
  plan(all_rows_, b.positions, b.query_starts, b.num_sequences);
  plan_last_layer(b);
  // An odd number of lines, so that rows do not meet in a few sets of the caches.
  score_stride_ = (most_blocks * shape_.block_lanes / kLanes | 1) * kLanes;
  space_.matmul = 0;
  space_.row = kernels_->matmul_scratch;
  space_.prepared = space_.row + std::max(width_, hidden_width_);
  space_.scales = space_.prepared + kPrivateRows * max_row_bytes_ / 4;
  space_.attention = round_up(space_.scales + kPrivateRows, kLanes);
  space_.size = round_up(space_.attention + kernels_->attention_scratch(shape_, score_stride_), 1024);
  thread_space_.reserve(threads * space_.size * 4);
}

// Who attends to which of the queries: row starts[q] is the first of sequence q, starts[sequences] the end.
void Model::plan(Queries& queries, const int32_t* positions, const int32_t* starts, int64_t sequences) const {
  queries.rows = starts[sequences];
  queries.positions = positions;
  queries.units.clear(), queries.share_units.clear();
  queries.together = false;
  for (int64_t q = 0; q < sequences; ++q) {
    for (int32_t first = starts[q]; first < starts[q + 1]; first += shape_.queries) {
      queries.units.push_back({static_cast<int32_t>(q), first, std::min(shape_.queries, starts[q + 1] - first)});
    }
    queries.together = queries.together || starts[q + 1] - starts[q] > shape_.queries;
  }
  const Shares shares = shares_of(queries.rows);
  for (int64_t share = 0; share < shares.count(); ++share) {
    const auto first_from = [&](int64_t row) {
      const auto before = [](const Unit& unit, int64_t bound) { return unit.first < bound; };
      return std::lower_bound(queries.units.begin(), queries.units.end(), row, before) - queries.units.begin();
    };
    const Range here = shares.rows(share);
    queries.share_units.push_back({first_from(here.begin), first_from(here.end)});
  }
}

// Of the last layer nothing but K and V is wanted of the rows that have neither logits nor a draw.
void Model::plan_last_layer(const Batch& b) {
  last_layer_rows_.assign(b.logits_rows, b.logits_rows + b.num_logits);
  last_layer_rows_.insert(last_layer_rows_.end(), b.sampling.draw_rows, b.sampling.draw_rows + b.sampling.num_rows);
  std::sort(last_layer_rows_.begin(), last_layer_rows_.end());
  last_layer_rows_.erase(std::unique(last_layer_rows_.begin(), last_layer_rows_.end()), last_layer_rows_.end());
  last_layer_.rows = static_cast<int64_t>(last_layer_rows_.size());
  if (last_layer_.rows == all_rows_.rows) return;
  last_layer_positions_.clear(), last_layer_starts_.clear();
  for (const int32_t row : last_layer_rows_) last_layer_positions_.push_back(b.positions[row]);
  for (int64_t q = 0; q <= b.num_sequences; ++q) {
    const auto first = std::lower_bound(last_layer_rows_.begin(), last_layer_rows_.end(), b.query_starts[q]);
    last_layer_starts_.push_back(static_cast<int32_t>(first - last_layer_rows_.begin()));
  }
  plan(last_layer_, last_layer_positions_.data(), last_layer_starts_.data(), b.num_sequences);
}

void Model::copy_blocks(const Batch& b) {
  const int64_t bytes = shape_.block_bytes();
  for (int64_t i = 0; i < b.num_copies; ++i) {
    for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
      std::memmove(cache_block(layer, b.block_copies[2 * i + 1]), cache_block(layer, b.block_copies[2 * i]),
                   static_cast<size_t>(bytes));
    }
  }
}

}  // namespace native
