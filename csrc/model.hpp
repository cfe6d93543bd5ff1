// A GPT-2 family model on the CPU: packed weights, the paged cache, and steps over them.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "buffer.hpp"
#include "isa.hpp"
#include "kernels.hpp"
#include "packing.hpp"
#include "pool.hpp"
#include "sampling.hpp"
#include "screen.hpp"
#include "shares.hpp"

namespace native {

struct Config {
  int64_t vocab_size, context_length, embed_dim, n_heads, n_layers, hidden_dim;
  Epilogue activation;
  float norm_eps;
  std::vector<float> attn_scales;  // [n_layers]
  bool tied_head;
  Storage storage;  // of the linear layers and the head
  int64_t block_size;
  int threads;
  std::string isa;  // "" is the best that there is
  bool screen_head;  // of rows of which the token alone is wanted; for a head that is not quantised

  int64_t head_dim() const { return embed_dim / n_heads; }
};

// A step's work, as engine/backends/base.py describes it. Pointers are the caller's.
struct Batch {
  int64_t num_tokens, num_sequences, table_width, num_logits, num_copies;
  const int32_t* token_ids;
  const int32_t* positions;
  const int64_t* slots;
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const int32_t* logits_rows;
  const int32_t* previous_rows;  // or null
  const int32_t* block_copies;   // or null
  Sampling sampling;             // num_rows 0: nothing is drawn
  int64_t num_steps;             // at most; above 1 every sequence has one token, after which one is drawn
  int64_t num_endings;
  const int32_t* ending_ids;     // no step follows one that draws one of these
};

// Canonical tensors by name are Tensors; the order is that of `tensor_names`.
std::vector<std::string> tensor_names(const Config& config);

// The value, which must be in [least, most].
int64_t check_within(const char* what, int64_t value, int64_t least, int64_t most);

class Model {
 public:
  explicit Model(Config config);

  // All tensors, in the order of tensor_names. Throws std::invalid_argument for a shape that does not fit.
  void update(const std::vector<Tensor>& tensors);

  void allocate(int64_t num_blocks);
  int64_t block_bytes() const;   // K and V of one block over all layers
  int64_t weight_bytes() const;
  bool coded() const;  // every matrix (coding.inc)
  const char* isa() const { return kernels_->name; }
  int threads() const { return pool_.size(); }

  // Runs a step, and after it those that the batch asks for, in which every sequence goes on by the token that it drew.
  // `between` is called before each of these, and may use the model. Returns how many ran. `logits` has [num_logits,
  // vocab_size] floats, `draws` room for all steps. Throws std::invalid_argument for an index out of range, before
  // anything is changed. Rows that cannot be drawn from are reported in `draws` if they are the first step's; a later
  // step that has some counts as not run.
  int64_t run(const Batch& batch, float* logits, const Draws& draws, const std::function<void()>& between);

 private:
  // With so few rows every thread prepares all of them for itself: that is cheaper than a barrier.
  static constexpr int64_t kPrivateRows = 4;

  struct Norm {
    Buffer weight, bias;
  };
  struct Block {
    Norm norm1, norm2;
    Packed qkv, proj, fc, fc2;
  };

  struct Unit {  // attention of one head for a few queries
    int32_t sequence, first, count;
  };
  // Rows that go through a layer together.
  struct Queries {
    int64_t rows = 0;
    const int32_t* positions = nullptr;  // during the step
    std::vector<Unit> units;         // in the order of their rows
    std::vector<Range> share_units;  // which of them are a share's
    bool together = false;           // several units read the same K and V
  };

  void check(const Batch& batch) const;
  void check_later(const Batch& batch) const;
  void step(const Batch& batch, float* logits, const Draws& draws);
  void reserve(const Batch& batch);
  void plan_last_layer(const Batch& batch);
  void plan(Queries& queries, const int32_t* positions, const int32_t* starts, int64_t sequences) const;
  // All rows, or those of the last layer of which something is wanted.
  const Queries& queries_of(int64_t layer) const {
    return layer + 1 == config_.n_layers && last_layer_.rows < all_rows_.rows ? last_layer_ : all_rows_;
  }
  void keep_last_layer_rows(Team& team);
  void return_last_layer_rows(Team& team);
  int64_t reserve_head(const Batch& batch);
  void copy_blocks(const Batch& batch);
  void embed(const Batch& batch, int64_t row);
  Shares shares_of(int64_t rows) const { return {rows, pool_.size()}; }
  template <class Body>
  void for_rows(Team& team, int thread, int64_t rows, Body&& body) const;
  void write_cache(Team& team, int thread, const Batch& batch, int64_t layer);
  void attend(Team& team, int thread, const Batch& batch, int64_t layer);
  Attention attention(const Batch& batch, int64_t layer, const Unit& unit, int64_t head, int thread) const;
  Upcoming cache_of(const Team& team, int thread, int64_t layer) const;
  Rows prepare_rows(Team& team, int thread, const Packed& matrix, const float* x, int64_t stride, const Norm* norm,
                    int64_t rows);
  struct Sections {  // panels of a matrix in `count` nearly equal parts, each shared out by itself
    Range panels;
    int64_t count;
  };
  void multiply(Team& team, int thread, const Matrix& matrix, const Rows& x, int64_t rows, const Output& y,
                Upcoming* upcoming, const Sections& sections);
  void multiply(Team& team, int thread, const Packed& matrix, const Rows& x, int64_t rows, const Output& y,
                Upcoming* upcoming = nullptr);
  void linear(Team& team, int thread, const Packed& matrix, const float* x, int64_t stride, const Norm* norm,
              int64_t rows, const Output& y, Upcoming* upcoming = nullptr);
  void project(Team& team, int thread, const Block& block, int64_t rows, Upcoming* upcoming, const Sections& sections);
  void prepare_row(Storage form, int64_t k, const float* x, const Norm* norm, uint8_t* out, float* scale, float* scratch);
  void gather(Team& team, const int32_t* batch_rows, int64_t count);
  void run_head_rows(Team& team, int thread, const int32_t* batch_rows, int64_t count);
  void run_screened_rows(Team& team, int thread, const int32_t* batch_rows, int64_t count, float* out);
  void run_layers(Team& team, int thread, const Batch& batch);
  void run_head(Team& team, int thread, const Batch& batch, float* logits, const Draws& draws);
  int64_t prepared_bytes(Storage storage, int64_t k) const;
  uint8_t* cache_block(int64_t layer, int64_t block) const;

  const Config config_;
  const Kernels* kernels_;
  Pool pool_;
  std::atomic<long> busy_{0};

  bool loaded_ = false;
  Table tok_emb_, pos_emb_;  // tok_emb_ only where the head cannot serve
  std::vector<Block> blocks_;
  Norm final_norm_;
  Packed head_;
  Screen screen_;  // where the config asks for it

  int64_t num_blocks_ = 0;
  CacheShape shape_;
  Buffer cache_;  // [n_layers, num_blocks] of blocks

  // Work space, grown to the largest step. Strides are in floats and have room for whole panels.
  int64_t width_, qkv_width_, hidden_width_, vocab_width_;
  int64_t max_row_bytes_ = 0;  // of a prepared row
  bool hidden_is_bf16_ = false;  // hidden_ holds what fc2 multiplies, with hidden_stride_ values a row, and no floats
  int64_t hidden_stride_ = 0;
  Buffer x_, qkv_, attended_, hidden_, prepared_, scales_;
  Buffer gathered_, head_out_, thread_space_;
  struct {  // where, in the floats of a thread
    int64_t matmul, row, prepared, scales, attention, size;
  } space_{};
  float* space(int thread) const { return thread_space_.floats() + thread * space_.size; }
  int64_t score_stride_ = 0;
  Queries all_rows_, last_layer_;  // the second only where it has fewer rows
  std::vector<int32_t> last_layer_rows_, last_layer_positions_;  // of last_layer_: its rows' numbers in the batch
  std::vector<int32_t> last_layer_starts_;                       // and where in them a sequence begins
  std::vector<int32_t> context_blocks_;  // of one sequence after the other
  std::vector<int64_t> context_starts_;  // where a sequence's begin, and the end
  // Rows of the batch after which tokens are drawn: with all logits, each once, and by the screen, one for every draw.
  std::vector<int32_t> wanted_, screened_;
  std::vector<Screen::Draw> screened_draws_;
  std::vector<int32_t> draw_at_;  // for every draw, its row among the first and then the second
  std::vector<int32_t> last_drawn_;
  Sampler sampler_;
};

}  // namespace native
