// The end of a step: final norm and head of the rows that are wanted, and the draws.

#include <algorithm>
#include <cstring>

#include "model.hpp"

namespace native {
namespace {

constexpr int64_t kLogitsRows = 64;  // rows whose logits are computed at a time, to bound the memory

}  // namespace

// Lists the rows whose head is computed for a draw: each once, however many tokens are drawn after it, but by the screen
// for every draw. Makes room for them, and returns how many rows are worked on together at most.
int64_t Model::reserve_head(const Batch& b) {
  const Sampling& s = b.sampling;
  const auto by_the_screen = [&](int64_t r) {
    return config_.screen_head && s.token_only && s.token_only[r] && s.temperature[r] >= 0;
  };
  wanted_.clear(), screened_.clear(), screened_draws_.clear();
  for (int64_t r = 0; r < s.num_rows; ++r) {
    if (!by_the_screen(r)) {
      wanted_.push_back(s.draw_rows[r]);
      continue;
    }
    screened_.push_back(s.draw_rows[r]);
    screened_draws_.push_back({s.temperature[r], {s.seeds[r], s.positions[r], s.sample_index[r]}});
  }
  std::sort(wanted_.begin(), wanted_.end());
  wanted_.erase(std::unique(wanted_.begin(), wanted_.end()), wanted_.end());
  draw_at_.resize(static_cast<size_t>(s.num_rows));
  auto next = static_cast<int32_t>(wanted_.size());
  for (int64_t r = 0; r < s.num_rows; ++r) {
    const auto place = std::lower_bound(wanted_.begin(), wanted_.end(), s.draw_rows[r]);
    draw_at_[static_cast<size_t>(r)] = by_the_screen(r) ? next++ : static_cast<int32_t>(place - wanted_.begin());
  }
  const auto full = static_cast<int64_t>(wanted_.size()), by_screen = static_cast<int64_t>(screened_.size());
  const int64_t head_rows = std::max({std::min(b.num_logits, kLogitsRows), full, by_screen});
  gathered_.reserve(head_rows * width_ * 4);
  head_out_.reserve(std::max(head_rows, full + 2 * by_screen) * vocab_width_ * 4);
  if (by_screen) screen_.reserve(screened_draws_);
  if (s.num_rows) sampler_.reserve(s, config_.vocab_size, vocab_width_, pool_.size());
  return head_rows;
}

// Some of the batch's rows, side by side.
void Model::gather(Team& team, const int32_t* batch_rows, int64_t count) {
  team.for_each(count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memcpy(gathered_.floats() + i * width_, x_.floats() + batch_rows[i] * width_, static_cast<size_t>(width_) * 4);
    }
  });
}

// Final norm and head of some of the batch's rows, to head_out_.
void Model::run_head_rows(Team& team, int thread, const int32_t* batch_rows, int64_t count) {
  gather(team, batch_rows, count);
  linear(team, thread, head_, gathered_.floats(), width_, &final_norm_, count,
         {head_out_.floats(), vocab_width_, Epilogue::store});
}

// The same by the screen, to out, which has room for twice the rows: estimates, but exact where the largest may be.
void Model::run_screened_rows(Team& team, int thread, const int32_t* batch_rows, int64_t count, float* out) {
  gather(team, batch_rows, count);
  const Rows x = prepare_rows(team, thread, head_, gathered_.floats(), width_, &final_norm_, count);
  const int64_t rows = screen_.prepare(team, x, count, space(thread) + space_.row);
  multiply(team, thread, screen_.matrix(), screen_.rows(), rows, {out, vocab_width_, Epilogue::store});
  screen_.settle(team, thread, head_.view(), x, screened_draws_, out, vocab_width_, space(thread) + space_.matmul);
}

void Model::run_head(Team& team, int thread, const Batch& b, float* logits, const Draws& draws) {
  for (int64_t first = 0; first < b.num_logits; first += kLogitsRows) {
    const int64_t count = std::min(kLogitsRows, b.num_logits - first);
    run_head_rows(team, thread, b.logits_rows + first, count);
    team.for_each(count, 1, [&](int64_t i, int64_t) {
      std::memcpy(logits + (first + i) * config_.vocab_size, head_out_.floats() + i * vocab_width_,
                  static_cast<size_t>(config_.vocab_size) * 4);
    });
  }
  if (!b.sampling.num_rows) return;
  const auto full = static_cast<int64_t>(wanted_.size()), by_screen = static_cast<int64_t>(screened_.size());
  if (full) run_head_rows(team, thread, wanted_.data(), full);
  if (by_screen) {
    run_screened_rows(team, thread, screened_.data(), by_screen, head_out_.floats() + full * vocab_width_);
  }
  sampler_.run(team, thread, *kernels_, b.sampling, head_out_.floats(), draw_at_.data(), draws);
}

}  // namespace native
