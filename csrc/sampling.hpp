// Drawing tokens from logits, by the rules of engine/backends/base.py.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "kernels.hpp"
#include "pool.hpp"

namespace native {

struct SparseRows {  // starts is null where there are none
  const int32_t* starts;
  const int32_t* ids;
  const float* values;
};

struct Sampling {  // one entry a row
  int64_t num_rows;
  int64_t num_logprobs;
  const int32_t* draw_rows;  // rows of the batch
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const uint64_t* seeds;
  const uint32_t* positions;
  const uint32_t* sample_index;
  const float* presence_penalty;
  const float* frequency_penalty;
  const float* repetition_penalty;
  SparseRows output_counts, logit_bias;
  const uint32_t* allowed;  // [num_rows, words], or null
  int64_t words;
  const bool* token_only;  // or null: the token is wanted, drawn with no option but a temperature, and no exact logprob
};

// Options that change single logits; and those that leave some out of a draw by chance.
inline bool changed(const Sampling& s) { return s.allowed || s.output_counts.starts || s.logit_bias.starts; }
inline bool limited(const Sampling& s, int64_t r) { return s.top_k[r] > 0 || s.top_p[r] < 1 || s.min_p[r] > 0; }

// Where the results go.
struct Draws {
  int32_t* token_ids;   // -1: the row cannot be drawn from
  float* logprobs;
  int32_t* ranks;
  int32_t* top_ids;      // [num_rows, num_logprobs]
  float* top_logprobs;

  // Where those of a later step go, after `rows` rows.
  Draws after(int64_t rows, int64_t num_logprobs) const {
    return {token_ids + rows, logprobs + rows, ranks + rows, top_ids + rows * num_logprobs,
            top_logprobs + rows * num_logprobs};
  }
};

class Sampler {
 public:
  // Makes room. Call before the threads start.
  void reserve(const Sampling& sampling, int64_t vocab_size, int64_t width, int threads);

  // On all threads. Row r's logits are at logits + at[r] * width, with room for multiples of 16 floats.
  void run(Team& team, int thread, const Kernels& kernels, const Sampling& sampling, const float* logits,
           const int32_t* at, const Draws& draws);

 private:
  // Logits of a row are worked on in pieces of fixed length, whose results are combined in order: so sums do not
  // depend on the threads.
  static constexpr int64_t kPiece = 4096;

  struct Row {
    float largest, log_sum;  // of the raw logits; log_sum is log sum exp(logit - largest)
    float top;          // after what changes single logits
    float temperature;  // that it has still to be divided by
    bool valid, greedy;
    bool edited;  // values_ holds the row
  };
  struct Space {  // of a thread, a whole row each
    float* picked;
    uint32_t* keys;
    int32_t* masses;
  };

  void summarise(int64_t r);
  void apply_options(const Kernels& kernels, const Sampling& s, const float* logits, int64_t r, int thread);
  void edit(const Sampling& s, float* x, int64_t r) const;
  float top_k_threshold(const Kernels& kernels, const float* x, int64_t k, int thread);
  float top_p_threshold(const Kernels& kernels, const float* x, float p, float largest, float threshold, int thread);
  void pick(const Kernels& kernels, const Sampling& s, const float* logits, int64_t r, const Draws& draws);

  float* values(int64_t r) const { return values_.floats() + r * width_; }
  Space space(int thread) const {
    return {picked_.floats() + thread * width_, reinterpret_cast<uint32_t*>(keys_.data()) + thread * width_,
            reinterpret_cast<int32_t*>(masses_.data()) + thread * width_};
  }

  int64_t vocab_size_ = 0, width_ = 0, pieces_ = 0;
  std::vector<Partial> partials_;      // [rows, pieces]
  std::vector<Candidate> candidates_;  // [rows, pieces]
  std::vector<Row> rows_;
  Buffer values_;  // [rows, width]
  Buffer picked_, keys_, masses_;  // per thread [width]
};

}  // namespace native
