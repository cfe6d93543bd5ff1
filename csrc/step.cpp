// A step: every thread runs run_layers and run_head, and they meet at the end of each phase.

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "later_steps.hpp"
#include "model.hpp"

namespace native {
namespace {

// With so few rows every thread prepares all of them for itself: that is cheaper than a barrier.
constexpr int64_t kPrivateRows = 4;
// Of a share, at least, for each thread: all weights are read once for a share, and with so many rows that takes a part of
// the time that arithmetic takes, whatever the number of threads that share the memory.
constexpr int64_t kShareRows = 32;
constexpr int64_t kAttentionGrain = 6;  // units of attention that a thread takes at a time, at most

void check_range(const char* what, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value < high) return;
  throw std::invalid_argument(std::string(what) + " " + std::to_string(value) + " is out of range: it must be in [" +
                              std::to_string(low) + ", " + std::to_string(high) + ")");
}

int64_t blocks_for(int64_t context, int64_t block_size) { return (context + block_size - 1) / block_size; }

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
    for (int64_t i = 0; i < blocks_for(length + later, config_.block_size); ++i) {
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
  units_.clear();
  int64_t most_blocks = 0;
  for (int64_t q = 0; q < b.num_sequences; ++q) {
    most_blocks = std::max(most_blocks, blocks_for(b.context_lens[q], config_.block_size));
    for (int32_t first = b.query_starts[q]; first < b.query_starts[q + 1]; first += shape_.queries) {
      units_.push_back({static_cast<int32_t>(q), first, std::min(shape_.queries, b.query_starts[q + 1] - first)});
    }
  }
  const Shares shares = shares_of(rows);
  unit_starts_.clear();
  for (int64_t share = 0; share <= shares.count; ++share) {
    const auto before = [](const Unit& unit, int64_t row) { return unit.first < row; };
    const auto start = std::lower_bound(units_.begin(), units_.end(), shares.begin(share), before);
    unit_starts_.push_back(start - units_.begin());
  }
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

void Model::copy_blocks(const Batch& b) {
  const int64_t bytes = shape_.block_bytes();
  for (int64_t i = 0; i < b.num_copies; ++i) {
    for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
      std::memmove(cache_block(layer, b.block_copies[2 * i + 1]), cache_block(layer, b.block_copies[2 * i]),
                   static_cast<size_t>(bytes));
    }
  }
}

void Model::embed(const Batch& b, int64_t row) {
  float* x = x_.floats() + row * width_;
  const int32_t previous = b.previous_rows ? b.previous_rows[row] : -1;
  const int64_t token = previous >= 0 ? last_drawn_[static_cast<size_t>(previous)] : b.token_ids[row];
  std::memset(x, 0, static_cast<size_t>(width_) * 4);
  if (tok_emb_.bytes()) {
    tok_emb_.add_row(token, x);
  } else {
    head_.unpack(token, x);
  }
  pos_emb_.add_row(b.positions[row], x);
}

Model::Shares Model::shares_of(int64_t rows) const {
  const int64_t threads = pool_.size();
  return {rows, std::clamp<int64_t>(rows / (kShareRows * threads), 1, std::min(threads, Team::kMostShares))};
}

// Calls body(begin, end) for rows of a step. All threads call it and meet at its end.
template <class Body>
void Model::for_rows(Team& team, int thread, int64_t rows, int64_t most, Body&& body) const {
  const Shares shares = shares_of(rows);
  team.for_each_share(thread, shares.count, most, [&](int64_t share) { return shares.size(share); },
                      [&](int64_t share, int64_t begin, int64_t end) {
                        body(shares.begin(share) + begin, shares.begin(share) + end);
                      });
}

// New tokens' K and V, as many tokens of a head at a time as a block holds. All threads call it and meet at its end.
void Model::write_cache(Team& team, int thread, const Batch& b, int64_t layer) {
  const int64_t heads = config_.n_heads, size = config_.block_size;
  const Shares shares = shares_of(b.num_tokens);
  const auto group = [&](int64_t share) { return blocks_for(shares.begin(share), size); };  // the share's first
  const auto pieces = [&](int64_t share) { return (group(share + 1) - group(share)) * heads; };
  team.for_each_share(thread, shares.count, heads, pieces, [&](int64_t share, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = (group(share) + i / heads) * size;
      const float* k = qkv_.floats() + first * qkv_width_ + config_.embed_dim;
      kernels_->write_cache(shape_, i % heads, k, k + config_.embed_dim, qkv_width_, b.slots + first,
                            std::min(size, b.num_tokens - first), cache_block(layer, 0));
    }
  });
}

// Of the index-th piece of attention of `count` units. Where several units share a sequence's K and V, head by head, so
// that neighbours read the same: units 0, 1, 2... of head 0, then of head 1. Else as K and V lie in the blocks: heads 0, 1,
// 2... of unit 0, then of unit 1.
std::pair<const Model::Unit*, int64_t> Model::unit_and_head(const Unit* units, int64_t count, int64_t index,
                                                            bool shared) const {
  const int64_t inner = shared ? count : config_.n_heads;
  const int64_t slow = index / inner, fast = index % inner;
  return {units + (shared ? fast : slow), shared ? slow : fast};
}

// A layer's attention. All threads call it and meet at its end.
void Model::attend(Team& team, int thread, const Batch& b, int64_t layer) {
  const Shares shares = shares_of(b.num_tokens);
  const bool shared = static_cast<int64_t>(units_.size()) > b.num_sequences;
  const int64_t* starts = unit_starts_.data();
  const auto pieces = [&](int64_t share) { return (starts[share + 1] - starts[share]) * config_.n_heads; };
  team.for_each_share(thread, shares.count, kAttentionGrain, pieces, [&](int64_t share, int64_t begin, int64_t end) {
    Attention items[kAttentionGrain];
    for (int64_t i = begin; i < end; ++i) {
      const auto found = unit_and_head(units_.data() + starts[share], starts[share + 1] - starts[share], i, shared);
      items[i - begin] = attention(b, layer, *found.first, found.second, thread);
    }
    kernels_->attention(shape_, items, end - begin);
  });
}

Attention Model::attention(const Batch& b, int64_t layer, const Unit& unit, int64_t head, int thread) const {
  const int64_t dim = config_.head_dim();
  Attention a;
  a.q = qkv_.floats() + unit.first * qkv_width_ + head * dim;
  a.q_stride = qkv_width_;
  a.count = unit.count;
  a.positions = b.positions + unit.first;
  a.table = b.block_tables + unit.sequence * b.table_width;
  a.cache = cache_block(layer, 0);
  a.k_offset = shape_.keys_of(head);
  a.v_offset = shape_.values_of(head);
  a.scale = config_.attn_scales[static_cast<size_t>(layer)];
  a.out = attended_.floats() + unit.first * width_ + head * dim;
  a.out_stride = width_;
  a.score_stride = score_stride_;
  a.scratch = space(thread) + space_.attention;
  return a;
}

void Model::prepare_row(Storage form, int64_t k, const float* x, const Norm* norm, uint8_t* out, float* scale,
                        float* scratch) {
  const bool plain = kernels_->plain(form);
  if (norm) {
    float* normed = plain ? reinterpret_cast<float*>(out) : scratch;
    kernels_->layer_norm(x, norm->weight.floats(), norm->bias.floats(), k, config_.norm_eps, normed);
    x = normed;
  }
  if (!plain) kernels_->prepare(form, x, k, out, scale);
}

// norm(x), which may be null, of `rows` rows of x in the form in which the matrix multiplies them.
Rows Model::prepare_rows(Team& team, int thread, const Packed& matrix, const float* x, int64_t stride, const Norm* norm,
                         int64_t rows) {
  const Matrix& m = matrix.view();
  if (!norm && kernels_->plain(m.storage)) return {reinterpret_cast<const uint8_t*>(x), stride * 4, nullptr};
  const bool shared = rows > kPrivateRows;
  const Storage form = kernels_->row_form(m.storage, rows);
  const int64_t bytes = prepared_bytes(form, m.k);
  uint8_t* data = shared ? prepared_.data() : reinterpret_cast<uint8_t*>(space(thread) + space_.prepared);
  float* scales = shared ? scales_.floats() : space(thread) + space_.scales;
  const auto prepare = [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      prepare_row(form, m.k, x + r * stride, norm, data + r * bytes, scales + r, space(thread) + space_.row);
    }
  };
  if (shared) {
    for_rows(team, thread, rows, 4, prepare);
  } else {
    prepare(0, rows);
  }
  return {data, bytes, quantised(m.storage) ? scales : nullptr};
}

// y = epilogue(x W^T + b) for `rows` prepared rows. All threads call it and meet at its end.
void Model::multiply(Team& team, int thread, const Packed& matrix, const Rows& x, int64_t rows, const Output& y) {
  const Matrix& m = matrix.view();
  const Shares shares = shares_of(rows);
  // Few rows: long pieces, which stream best. Many rows: groups of panels, which use what they fetch of the rows.
  const int64_t most = rows > 16 ? kernels_->panel_group : m.num_panels;
  const auto panels = [&](int64_t) { return m.num_panels; };
  team.for_each_share(thread, shares.count, most, panels, [&](int64_t share, int64_t begin, int64_t end) {
    const int64_t row = shares.begin(share);
    kernels_->matmul(m, x.from(row), shares.size(share), y.from(row), begin, end, space(thread) + space_.matmul);
  });
}

// y = epilogue(norm(x) W^T + b) for `rows` rows of x; norm may be null. All threads call it and meet at its end.
void Model::linear(Team& team, int thread, const Packed& matrix, const float* x, int64_t stride, const Norm* norm,
                   int64_t rows, const Output& y) {
  multiply(team, thread, matrix, prepare_rows(team, thread, matrix, x, stride, norm, rows), rows, y);
}

void Model::run_layers(Team& team, int thread, const Batch& b) {
  const int64_t rows = b.num_tokens;
  uint16_t* hidden_bf16 = hidden_is_bf16_ ? reinterpret_cast<uint16_t*>(hidden_.data()) : nullptr;
  for_rows(team, thread, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) embed(b, row);
  });
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    const Block& block = blocks_[static_cast<size_t>(layer)];
    linear(team, thread, block.qkv, x_.floats(), width_, &block.norm1, rows, {qkv_.floats(), qkv_width_, Epilogue::store});
    // All of it before any of it is read: a sequence may read a block that another one of this step fills.
    write_cache(team, thread, b, layer);
    attend(team, thread, b, layer);
    linear(team, thread, block.proj, attended_.floats(), width_, nullptr, rows, {x_.floats(), width_, Epilogue::add});
    linear(team, thread, block.fc, x_.floats(), width_, &block.norm2, rows,
           {hidden_.floats(), hidden_stride_, config_.activation, hidden_bf16});
    const Output out{x_.floats(), width_, Epilogue::add};
    if (hidden_bf16) {
      multiply(team, thread, block.fc2, {hidden_.data(), hidden_stride_ * 2, nullptr}, rows, out);
    } else {
      linear(team, thread, block.fc2, hidden_.floats(), hidden_width_, nullptr, rows, out);
    }
  }
}

}  // namespace native
