#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "rounding.hpp"
#include "shares.hpp"

namespace native {
namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Unsigned integers in the order of floats.
uint32_t to_key(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return (bits & 0x80000000u) ? ~bits : bits | 0x80000000u;
}

float from_key(uint32_t key) {
  const uint32_t bits = (key & 0x80000000u) ? key & 0x7fffffffu : ~key;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The largest key t such that the weights of the keys >= t reach `wanted`, by radix passes over 11, 11 and 10 bits.
// keys and weights [n] are overwritten; weights may be null, every key then weighs 1.
uint32_t key_reaching(uint32_t* keys, int32_t* weights, int64_t n, int64_t wanted) {
  constexpr int kShifts[3] = {21, 10, 0}, kBits[3] = {11, 11, 10};
  uint32_t prefix = 0;
  for (int pass = 0; pass < 3; ++pass) {
    int64_t sums[1 << 11] = {};
    const int shift = kShifts[pass];
    const uint32_t mask = (1u << kBits[pass]) - 1;
    for (int64_t i = 0; i < n; ++i) sums[(keys[i] >> shift) & mask] += weights ? weights[i] : 1;
    uint32_t digit = mask;
    while (digit > 0 && sums[digit] < wanted) wanted -= sums[digit--];
    prefix |= digit << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      if (((keys[i] >> shift) & mask) != digit) continue;
      keys[kept] = keys[i];
      if (weights) weights[kept] = weights[i];
      ++kept;
    }
    n = kept;
  }
  return prefix;
}

}  // namespace

void Sampler::reserve(const Sampling& s, int64_t vocab_size, int64_t width, int threads) {
  vocab_size_ = vocab_size;
  width_ = width;
  pieces_ = ceil_div(vocab_size, kPiece);
  partials_.resize(static_cast<size_t>(s.num_rows * pieces_));
  candidates_.resize(static_cast<size_t>(s.num_rows * pieces_));
  rows_.resize(static_cast<size_t>(s.num_rows));
  bool edited = s.allowed || s.output_counts.starts || s.logit_bias.starts, limited = false;
  for (int64_t r = 0; r < s.num_rows; ++r) {
    edited |= s.temperature[r] != 0;
    limited |= s.temperature[r] != 0 && (s.top_k[r] > 0 || s.top_p[r] < 1);
  }
  if (edited) values_.reserve(s.num_rows * width * 4);
  if (limited) {
    keys_.reserve(threads * width * 4);
    masses_.reserve(threads * width * 4);
  }
}

void Sampler::run(Team& team, int thread, const Kernels& kernels, const Sampling& s, const float* logits,
                  const int32_t* at, const Draws& draws) {
  const auto row_logits = [&](int64_t r) { return logits + at[r] * width_; };
  const auto piece = [&](int64_t index) { return Range{index * kPiece, std::min((index + 1) * kPiece, vocab_size_)}; };
  const Shares shares(s.num_rows, team.size());
  const auto rows = [&](int64_t share) { return shares.rows(share); };
  for_each_cell(team, thread, shares, pieces_, s.num_rows * pieces_, rows, [&](int64_t r, int64_t index) {
    const Range here = piece(index);
    partials_[static_cast<size_t>(r * pieces_ + index)] = kernels.partial_sum(row_logits(r), here.begin, here.end);
  });
  team.for_each(s.num_rows, 1, [&](int64_t r, int64_t) {
    summarise(r);
    apply_options(kernels, s, row_logits(r), r, thread);
  });
  const bool by_chance = std::any_of(s.temperature, s.temperature + s.num_rows, [](float t) { return t != 0; });
  team.for_each(by_chance ? s.num_rows * pieces_ : 0, 1, [&](int64_t unit, int64_t) {
    const int64_t r = unit / pieces_;
    if (rows_[static_cast<size_t>(r)].greedy || !rows_[static_cast<size_t>(r)].valid) return;
    const Range here = piece(unit % pieces_);
    const Stream stream{s.seeds[r], s.positions[r], s.sample_index[r]};
    candidates_[static_cast<size_t>(unit)] =
        kernels.gumbel_argmax(values_.floats() + r * width_, here.begin, here.end, stream);
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

void Sampler::edit(const Sampling& s, float* x, int64_t r) const {
  if (s.logit_bias.starts) {
    for (int32_t i = s.logit_bias.starts[r]; i < s.logit_bias.starts[r + 1]; ++i) {
      x[s.logit_bias.ids[i]] += s.logit_bias.values[i];
    }
  }
  if (s.output_counts.starts) {
    for (int32_t i = s.output_counts.starts[r]; i < s.output_counts.starts[r + 1]; ++i) {
      float& value = x[s.output_counts.ids[i]];
      const float count = s.output_counts.values[i];
      value = value > 0 ? value / s.repetition_penalty[r] : value * s.repetition_penalty[r];
      value -= s.frequency_penalty[r] * count;
      if (count > 0) value -= s.presence_penalty[r];
    }
  }
  if (s.allowed) {
    const uint32_t* words = s.allowed + r * s.words;
    for (int64_t id = 0; id < vocab_size_; ++id) {
      if (!((words[id >> 5] >> (id & 31)) & 1u)) x[id] = kNothing;
    }
  }
}

// Leaves in values_ the row after all options, with -inf for what cannot be drawn.
void Sampler::apply_options(const Kernels& kernels, const Sampling& s, const float* logits, int64_t r, int thread) {
  Row& row = rows_[static_cast<size_t>(r)];
  const bool changed = s.allowed || s.output_counts.starts || s.logit_bias.starts;
  row.greedy = s.temperature[r] == 0;
  row.edited = row.valid && (!row.greedy || changed);
  if (!row.edited) return;
  float* x = values_.floats() + r * width_;
  std::memcpy(x, logits, static_cast<size_t>(vocab_size_) * 4);
  float largest = row.largest;
  if (changed) {
    edit(s, x, r);
    const Partial all = kernels.partial_sum(x, 0, vocab_size_);
    largest = all.largest;
    row.valid = largest > kNothing && largest < -kNothing && std::isfinite(all.sum);
    if (!row.valid) return;
  }
  // A temperature so near zero that the quotient overflows leaves nothing to chance.
  row.greedy |= !std::isfinite(largest / s.temperature[r]);
  if (row.greedy) return;
  if (s.temperature[r] != 1.0f) {
    kernels.divide(x, vocab_size_, s.temperature[r]);
    largest /= s.temperature[r];
  }
  uint32_t* keys = reinterpret_cast<uint32_t*>(keys_.data()) + thread * width_;
  int32_t* masses = reinterpret_cast<int32_t*>(masses_.data()) + thread * width_;
  float threshold = kNothing;
  if (s.top_k[r] > 0 && s.top_k[r] < vocab_size_) {
    for (int64_t i = 0; i < vocab_size_; ++i) keys[i] = to_key(x[i]);
    threshold = from_key(key_reaching(keys, nullptr, vocab_size_, s.top_k[r]));
  }
  if (s.top_p[r] < 1) {
    kernels.masses(x, vocab_size_, largest, threshold, masses);
    int64_t whole = 0, kept = 0;
    for (int64_t i = 0; i < vocab_size_; ++i) {
      if (masses[i] == 0) continue;
      whole += masses[i];
      keys[kept] = to_key(x[i]);
      masses[kept++] = masses[i];
    }
    const double share = std::ceil(static_cast<double>(s.top_p[r]) * static_cast<double>(whole));
    const int64_t wanted = share > 1.0 ? static_cast<int64_t>(share) : 1;
    threshold = from_key(key_reaching(keys, masses, kept, wanted));
  }
  if (threshold > kNothing || s.min_p[r] > 0) {
    kernels.exclude(x, vocab_size_, largest, threshold, s.min_p[r] > 0 ? s.min_p[r] : -1.0f);
  }
}

void Sampler::pick(const Kernels& kernels, const Sampling& s, const float* logits, int64_t r, const Draws& draws) {
  const Row& row = rows_[static_cast<size_t>(r)];
  draws.token_ids[r] = -1;
  if (!row.valid) return;
  int64_t token;
  if (!row.greedy) {
    const Candidate* found = candidates_.data() + r * pieces_;
    const Candidate* best = found;
    for (int64_t i = 1; i < pieces_; ++i) best = found[i].value > best->value ? found + i : best;
    if (!(best->value > kNothing)) return;  // the options exclude every one
    token = best->id;
  } else if (row.edited) {
    const float* x = values_.floats() + r * width_;
    token = kernels.first_equal(x, 0, vocab_size_, kernels.partial_sum(x, 0, vocab_size_).largest);
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
  // The most probable, by insertion: few ids get past the least of the list.
  const int64_t count = s.num_logprobs;
  int32_t* ids = draws.top_ids + r * count;
  float* values = draws.top_logprobs + r * count;
  int64_t filled = 0;
  for (int64_t id = 0; count > 0 && id < vocab_size_; ++id) {
    if (filled == count && !(logits[id] > values[count - 1])) continue;
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
