#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

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
    int64_t sums[1 << 11][2] = {};  // in turns, because neighbours are often of one digit
    const int shift = kShifts[pass];
    const uint32_t mask = (1u << kBits[pass]) - 1;
    for (int64_t i = 0; i < n; ++i) sums[(keys[i] >> shift) & mask][i & 1] += weights ? weights[i] : 1;
    const auto sum = [&](uint32_t digit) { return sums[digit][0] + sums[digit][1]; };
    uint32_t digit = mask;
    while (digit > 0 && sum(digit) < wanted) wanted -= sum(digit--);
    prefix |= digit << shift;
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      const bool here = ((keys[i] >> shift) & mask) == digit;
      keys[kept] = keys[i];
      if (weights) weights[kept] = weights[i];
      kept += here;
    }
    n = kept;
  }
  return prefix;
}

// Options that change single logits; those that leave some out.
bool changed(const Sampling& s) { return s.allowed || s.output_counts.starts || s.logit_bias.starts; }
bool limited(const Sampling& s, int64_t r) { return s.top_k[r] > 0 || s.top_p[r] < 1 || s.min_p[r] > 0; }

}  // namespace

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
    const auto rows = [&](int64_t share) { return shares.rows(share); };
    for_each_cell(team, thread, shares, pieces_, s.num_rows * pieces_, rows, body);
  };
  // What this thread found in a row tells it what it need not look at in the next piece.
  int64_t last = -1;
  float floor = kNothing;
  const auto draw = [&](int64_t r, int64_t index, const float* x, float temperature) {
    if (r != last) floor = kNothing;
    last = r;
    const Range here = piece(index);
    const Stream stream{s.seeds[r], s.positions[r], s.sample_index[r]};
    const Candidate best = kernels.gumbel_argmax(x, temperature, here.begin, here.end, stream, floor);
    floor = std::max(floor, best.value);
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
  last = -1;
  each_piece([&](int64_t r, int64_t index) {
    const Row& row = rows_[static_cast<size_t>(r)];
    if (!with_options(r) || row.greedy || !row.valid) return;
    draw(r, index, values_.floats() + r * width_, row.temperature);
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

// Leaves in values_ the row after all options but a temperature alone, with -inf for what cannot be drawn.
void Sampler::apply_options(const Kernels& kernels, const Sampling& s, const float* logits, int64_t r, int thread) {
  Row& row = rows_[static_cast<size_t>(r)];
  if (!row.valid) return;
  float* x = values_.floats() + r * width_;
  row.edited = changed(s);
  row.top = row.largest;
  if (row.edited) {
    std::memcpy(x, logits, static_cast<size_t>(vocab_size_) * 4);
    edit(s, x, r);
    const Partial all = kernels.partial_sum(x, 0, vocab_size_);
    row.top = all.largest;
    row.valid = row.top > kNothing && row.top < -kNothing && std::isfinite(all.sum);
    if (!row.valid) return;
  }
  // A temperature so near zero that the quotient overflows leaves nothing to chance.
  row.temperature = s.temperature[r];
  row.greedy = row.temperature == 0 || !std::isfinite(row.top / row.temperature);
  if (row.greedy || !limited(s, r)) return;
  kernels.divide(row.edited ? x : logits, vocab_size_, row.temperature, x);
  row.edited = true;
  const float largest = row.top / row.temperature;
  row.temperature = 1.0f;
  float threshold = kNothing;
  if (s.top_k[r] > 0 && s.top_k[r] < vocab_size_) threshold = top_k_threshold(kernels, x, s.top_k[r], thread);
  if (s.top_p[r] < 1) threshold = top_p_threshold(kernels, x, s.top_p[r], largest, threshold, thread);
  if (threshold > kNothing || s.min_p[r] > 0) kernels.exclude(x, vocab_size_, largest, threshold, s.min_p[r]);
}

// The k-th largest of a row. No more values matter than those that reach the k-th largest of the maxima of groups.
float Sampler::top_k_threshold(const Kernels& kernels, const float* x, int64_t k, int thread) {
  const Space here = space(thread);
  int64_t groups = 256;
  while (groups < 4 * k) groups *= 2;
  float bound = kNothing;
  if (4 * groups <= vocab_size_) {
    kernels.group_maxima(x, vocab_size_, groups, here.picked);
    std::nth_element(here.picked, here.picked + k - 1, here.picked + groups, std::greater<float>());
    bound = here.picked[k - 1];
  }
  const int64_t count = kernels.reaching(x, vocab_size_, bound, here.picked);
  std::transform(here.picked, here.picked + count, here.keys, to_key);
  return from_key(key_reaching(here.keys, nullptr, count, k));
}

// The largest value such that those that reach it have the share `p` of the mass of all that reach `threshold`. Those of
// most mass are looked at first: they are few, as a rule.
float Sampler::top_p_threshold(const Kernels& kernels, const float* x, float p, float largest, float threshold,
                               int thread) {
  const Space here = space(thread);
  int64_t count = 0;
  const auto weigh = [&](float bound) {
    count = kernels.reaching(x, vocab_size_, bound, here.picked);
    kernels.masses(here.picked, count, largest, here.masses);
    return std::accumulate(here.masses, here.masses + count, int64_t{0});
  };
  const bool all = threshold == kNothing;
  const int64_t whole = all ? kernels.total_mass(x, vocab_size_, largest) : weigh(threshold);
  const double share = std::ceil(static_cast<double>(p) * static_cast<double>(whole));
  const int64_t wanted = share > 1.0 ? static_cast<int64_t>(share) : 1;
  if (all) {
    for (const float below : {3.0f, 6.0f, 10.0f, -kNothing}) {
      if (weigh(largest - below) >= wanted) break;
    }
  }
  std::transform(here.picked, here.picked + count, here.keys, to_key);
  return from_key(key_reaching(here.keys, here.masses, count, wanted));
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
