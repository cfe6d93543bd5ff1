// What a request's options leave of a row of logits.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "pieces.hpp"
#include "sampling.hpp"

namespace native {
namespace {

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

}  // namespace

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
  row.edited = changed(s);
  row.top = row.largest;
  if (row.edited) {
    float* x = values(r);
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
  float* x = values(r);
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

}  // namespace native
