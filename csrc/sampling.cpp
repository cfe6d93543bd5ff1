#include "sampling.hpp"

#include <algorithm>
#include <cmath>

#include "pieces.hpp"
#include "rounding.hpp"
#include "shares.hpp"

namespace native {

void Sampler::reserve(const Sampling& s, int64_t vocab_size, int64_t width, int threads) {
  vocab_size_ = vocab_size;
  width_ = width;
  pieces_ = ceil_div(vocab_size, kPiece);
  partials_.resize(static_cast<size_t>(s.num_rows * pieces_));
  candidates_.resize(static_cast<size_t>(s.num_rows * pieces_));
  rows_.resize(static_cast<size_t>(s.num_rows));
  bool any_limited = false;
  for (int64_t r = 0; r < s.num_rows; ++r) any_limited |= s.temperature[r] != 0 && limited(s, r);
  if (changed(s) || any_limited) values_.reserve(s.num_rows * width * 4);
  if (any_limited) {
    picked_.reserve(threads * width * 4);
    keys_.reserve(threads * width * 4);
    masses_.reserve(threads * width * 4);
  }
}

void Sampler::run(Team& team, int thread, const Kernels& kernels, const Sampling& s, const float* logits,
                  const int32_t* at, const Draws& draws) {
  const auto row_logits = [&](int64_t r) { return logits + at[r] * width_; };
  const auto piece = [&](int64_t index) { return Range{index * kPiece, std::min((index + 1) * kPiece, vocab_size_)}; };
  const Shares shares(s.num_rows, team.size());
  const auto each_piece = [&](auto body) {
    for_each_cell(team, thread, shares, pieces_, s.num_rows * pieces_, body);
  };
  RowFloor floor;
  const auto draw = [&](int64_t r, int64_t index, const float* x, float temperature) {
    const Range here = piece(index);
    const Stream stream{s.seeds[r], s.positions[r], s.sample_index[r]};
    const Candidate best = kernels.gumbel_argmax(x, temperature, here.begin, here.end, stream, floor.of(r));
    floor.raise(best.value);
    candidates_[static_cast<size_t>(r * pieces_ + index)] = best;
  };
  const auto by_chance = [&](int64_t r) { return s.temperature[r] != 0; };
  const auto with_options = [&](int64_t r) { return by_chance(r) && (changed(s) || limited(s, r)); };
  bool any_with_options = false;
  for (int64_t r = 0; r < s.num_rows; ++r) any_with_options |= with_options(r);
  each_piece([&](int64_t r, int64_t index) {
    const Range here = piece(index);
    partials_[static_cast<size_t>(r * pieces_ + index)] = kernels.partial_sum(row_logits(r), here.begin, here.end);
    if (by_chance(r) && !with_options(r)) draw(r, index, row_logits(r), s.temperature[r]);
  });
  team.for_each(s.num_rows, 1, [&](int64_t r, int64_t) {
    summarise(r);
    apply_options(kernels, s, row_logits(r), r, thread);
    if (!any_with_options) pick(kernels, s, row_logits(r), r, draws);
  });
  if (!any_with_options) return;
  each_piece([&](int64_t r, int64_t index) {
    const Row& row = rows_[static_cast<size_t>(r)];
    if (!with_options(r) || row.greedy || !row.valid) return;
    draw(r, index, values(r), row.temperature);
  });
  team.for_each(s.num_rows, 1, [&](int64_t r, int64_t) { pick(kernels, s, row_logits(r), r, draws); });
}

void Sampler::summarise(int64_t r) {
  const Partial* parts = partials_.data() + r * pieces_;
  float largest = kNothing, sum = 0.0f;
  for (int64_t i = 0; i < pieces_; ++i) largest = parts[i].largest > largest ? parts[i].largest : largest;
  for (int64_t i = 0; i < pieces_; ++i) {
    // A piece of nothing but -inf has the sum 0, and one with a NaN has NaN, which must come through.
    const float weight = parts[i].largest == kNothing ? 1.0f : std::exp(parts[i].largest - largest);
    sum += parts[i].sum * weight;
  }
  Row& row = rows_[static_cast<size_t>(r)];
  row.largest = largest;
  row.log_sum = std::log(sum);
  row.valid = largest > kNothing && largest < -kNothing && std::isfinite(sum);
}

void Sampler::pick(const Kernels& kernels, const Sampling& s, const float* logits, int64_t r, const Draws& draws) {
  const Row& row = rows_[static_cast<size_t>(r)];
  draws.token_ids[r] = -1;
  if (!row.valid) return;
  int64_t token;
  if (!row.greedy) {
    const Candidate& best = largest_found(candidates_, r, pieces_);
    if (!(best.value > kNothing)) return;  // the options exclude every one
    token = best.id;
  } else if (row.edited) {
    const float* x = values(r);
    token = kernels.first_equal(x, 0, vocab_size_, row.top);
  } else {
    const Partial* parts = partials_.data() + r * pieces_;
    int64_t piece = 0;
    while (parts[piece].largest != row.largest) ++piece;
    token = kernels.first_equal(logits, piece * kPiece, std::min((piece + 1) * kPiece, vocab_size_), row.largest);
  }
  const auto logprob = [&](float logit) { return logit - row.largest - row.log_sum; };
  draws.token_ids[r] = static_cast<int32_t>(token);
  draws.logprobs[r] = logprob(logits[token]);
  const int64_t above = logits[token] == row.largest ? 0 : kernels.count_above(logits, vocab_size_, logits[token]);
  draws.ranks[r] = static_cast<int32_t>(above + 1);
  // The most probable, by insertion: few ids get past the least of a full list.
  const int64_t count = s.num_logprobs;
  int32_t* ids = draws.top_ids + r * count;
  float* values = draws.top_logprobs + r * count;
  int64_t filled = 0;
  for (int64_t id = 0; count > 0; ++id) {
    if (filled == count) id = kernels.first_above(logits, id, vocab_size_, values[count - 1]);
    if (id == vocab_size_) break;
    int64_t place = filled < count ? filled++ : count - 1;
    for (; place > 0 && logits[id] > values[place - 1]; --place) {
      values[place] = values[place - 1];
      ids[place] = ids[place - 1];
    }
    values[place] = logits[id];
    ids[place] = static_cast<int32_t>(id);
  }
  for (int64_t i = 0; i < count; ++i) values[i] = logprob(values[i]);
}

}  // namespace native
