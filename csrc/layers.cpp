// The layers of a step: every thread runs run_layers, and they meet at the end of each phase.

#include <algorithm>
#include <cstring>

#include "model.hpp"
#include "rounding.hpp"

namespace native {
namespace {

// What a thread takes at a time, at most.
constexpr int64_t kRowGrain = 16;
constexpr int64_t kAttentionGrain = 6;  // queries of a head

}  // namespace

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

// Calls body(begin, end) for rows of a step. All threads call it and meet at its end.
template <class Body>
void Model::for_rows(Team& team, int thread, int64_t rows, Body&& body) const {
  const Shares shares = shares_of(rows);
  const auto own = [&](int64_t share) { return shares.part_of(shares.rows(share), share); };
  team.for_each_share(thread, shares.count(), kRowGrain, [&](int64_t share) { return own(share).size(); },
                      [&](int64_t share, int64_t begin, int64_t end) {
                        const int64_t first = own(share).begin;
                        body(first + begin, first + end);
                      });
}

// New tokens' K and V, as many tokens of a head at a time as a block holds. All threads call it and meet at its end.
void Model::write_cache(Team& team, int thread, const Batch& b, int64_t layer) {
  const int64_t size = config_.block_size;
  const Shares shares = shares_of(b.num_tokens);
  const auto groups = [&](int64_t share) {
    const Range rows = shares.rows(share);
    return Range{ceil_div(rows.begin, size), ceil_div(rows.end, size)};
  };
  for_each_cell(team, thread, shares, config_.n_heads, config_.n_heads, groups, [&](int64_t group, int64_t head) {
    const int64_t first = group * size;
    const float* k = qkv_.floats() + first * qkv_width_ + config_.embed_dim;
    kernels_->write_cache(shape_, head, k, k + config_.embed_dim, qkv_width_, b.slots + first,
                          std::min(size, b.num_tokens - first), cache_block(layer, 0));
  });
}

// A layer's attention. All threads call it and meet at its end. Where several units share a sequence's K and V it goes
// head by head, so that neighbours read the same: units 0, 1, 2... of a head, then of the next. Else as K and V lie in the
// blocks: heads 0, 1, 2... of a unit, then of the next.
void Model::attend(Team& team, int thread, const Batch& b, int64_t layer) {
  const Queries& queries = queries_of(layer);
  const Shares shares = shares_of(queries.rows);
  const auto units = [&](int64_t share) { return queries.share_units[static_cast<size_t>(share)]; };
  const auto heads = [&](int64_t share) { return shares.part_of({0, config_.n_heads}, share); };
  const auto pieces = [&](int64_t share) { return units(share).size() * heads(share).size(); };
  team.for_each_share(thread, shares.count(), kAttentionGrain, pieces, [&](int64_t share, int64_t begin, int64_t end) {
    const Range unit = units(share), head = heads(share);
    const int64_t inner = queries.together ? unit.size() : head.size();
    Attention items[kAttentionGrain];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slow = i / inner, fast = i % inner;
      const int64_t number = unit.begin + (queries.together ? fast : slow);
      items[i - begin] = attention(b, layer, queries.units[static_cast<size_t>(number)],
                                   head.begin + (queries.together ? slow : fast), thread);
    }
    kernels_->attention(shape_, items, end - begin);
  });
}

// The K and V that a thread's share of a layer's attention will read, unless it reads them often: then fetching them before
// saves little.
Upcoming Model::cache_of(const Team& team, int thread, int64_t layer) const {
  if (layer == config_.n_layers) return {};
  const Queries& queries = queries_of(layer);
  const Shares shares = shares_of(queries.rows);
  if (team.size() > Team::kMostShares || queries.together) return {};
  const int64_t share = team.own_share(thread, shares.count());
  const Range units = queries.share_units[static_cast<size_t>(share)], heads = shares.part_of({0, config_.n_heads}, share);
  if (!units.size() || !heads.size()) return {};
  const auto start = [&](int64_t sequence) { return context_starts_[static_cast<size_t>(sequence)]; };
  const auto sequence = [&](int64_t unit) { return queries.units[static_cast<size_t>(unit)].sequence; };
  const int64_t first = start(sequence(units.begin)), end = start(sequence(units.end - 1) + 1);
  const int64_t offset = shape_.keys_of(heads.begin);
  return {cache_block(layer, 0) + offset, shape_.block_bytes(), shape_.keys_of(heads.end) - offset,
          context_blocks_.data() + first, end - first};
}

Attention Model::attention(const Batch& b, int64_t layer, const Unit& unit, int64_t head, int thread) const {
  const int64_t dim = config_.head_dim();
  Attention a;
  a.q = qkv_.floats() + unit.first * qkv_width_ + head * dim;
  a.q_stride = qkv_width_;
  a.count = unit.count;
  a.positions = queries_of(layer).positions + unit.first;
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
    for_rows(team, thread, rows, prepare);
  } else {
    prepare(0, rows);
  }
  return {data, bytes, quantised(m.storage) ? scales : nullptr};
}

// y = epilogue(x W^T + b) for `rows` prepared rows and some of the outputs. All threads call it and meet at its end.
// `upcoming` is the thread's own, or null.
void Model::multiply(Team& team, int thread, const Matrix& m, const Rows& x, int64_t rows, const Output& y,
                     Upcoming* upcoming, const Sections& sections) {
  const Shares shares = shares_of(rows);
  const auto own = [&](int64_t share, int64_t section) {
    return shares.part_of(sections.panels.part(section, sections.count), share);
  };
  const auto panels = [&](int64_t share) {
    int64_t count = 0;
    for (int64_t section = 0; section < sections.count; ++section) count += own(share, section).size();
    return count;
  };
  // Few rows: long pieces, which stream best. Many rows: groups of panels, which use what they fetch of the rows.
  const int64_t most = rows > 16 ? kernels_->panel_group : m.num_panels;
  team.for_each_share(thread, shares.count(), most, panels, [&](int64_t share, int64_t begin, int64_t end) {
    const Range here = shares.rows(share);
    for (int64_t section = 0, before = 0; section < sections.count; ++section) {
      const Range all = own(share, section);
      const Range some = all & Range{all.begin + begin - before, all.begin + end - before};
      before += all.size();
      if (!some.size()) continue;
      kernels_->matmul(m, x.from(here.begin), here.size(), y.from(here.begin), some.begin, some.end, upcoming,
                       space(thread) + space_.matmul);
    }
  });
}

void Model::multiply(Team& team, int thread, const Packed& matrix, const Rows& x, int64_t rows, const Output& y,
                     Upcoming* upcoming) {
  const Matrix& m = matrix.view();
  multiply(team, thread, m, x, rows, y, upcoming, {{0, m.num_panels}, 1});
}

// y = epilogue(norm(x) W^T + b) for `rows` rows of x; norm may be null. All threads call it and meet at its end.
void Model::linear(Team& team, int thread, const Packed& matrix, const float* x, int64_t stride, const Norm* norm,
                   int64_t rows, const Output& y, Upcoming* upcoming) {
  multiply(team, thread, matrix, prepare_rows(team, thread, matrix, x, stride, norm, rows), rows, y, upcoming);
}

// Some of Q, K and V of x_, to qkv_. All threads call it and meet at its end.
void Model::project(Team& team, int thread, const Block& block, int64_t rows, Upcoming* upcoming,
                    const Sections& sections) {
  const Rows x = prepare_rows(team, thread, block.qkv, x_.floats(), width_, &block.norm1, rows);
  const Output qkv{qkv_.floats(), qkv_width_, Epilogue::store};
  multiply(team, thread, block.qkv.view(), x, rows, qkv, upcoming, sections);
}

// The rows of the last layer, side by side at the beginning of x_.
void Model::keep_last_layer_rows(Team& team) {
  team.for_each(1, 1, [&](int64_t, int64_t) {
    for (int64_t i = 0; i < last_layer_.rows; ++i) {
      const int64_t row = last_layer_rows_[static_cast<size_t>(i)];
      std::memmove(x_.floats() + i * width_, x_.floats() + row * width_, static_cast<size_t>(width_) * 4);
    }
  });
}

// And back to their places in x_.
void Model::return_last_layer_rows(Team& team) {
  team.for_each(1, 1, [&](int64_t, int64_t) {
    for (int64_t i = last_layer_.rows - 1; i >= 0; --i) {
      const int64_t row = last_layer_rows_[static_cast<size_t>(i)];
      std::memmove(x_.floats() + row * width_, x_.floats() + i * width_, static_cast<size_t>(width_) * 4);
    }
  });
}

void Model::run_layers(Team& team, int thread, const Batch& b) {
  int64_t rows = b.num_tokens;
  uint16_t* hidden_bf16 = hidden_is_bf16_ ? reinterpret_cast<uint16_t*>(hidden_.data()) : nullptr;
  for_rows(team, thread, rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) embed(b, row);
  });
  // Outputs of Q, K and V. A panel may hold some of Q and some of K.
  const int64_t panels = blocks_[0].qkv.view().num_panels, width = config_.embed_dim;
  const Sections whole{{0, panels}, 3}, keys_and_values{{width / kernels_->panel, panels}, 2};
  const Sections only_queries{{0, ceil_div(width, kernels_->panel)}, 1};
  Upcoming cache = cache_of(team, thread, 0);
  for (int64_t layer = 0; layer < config_.n_layers; ++layer) {
    const Block& block = blocks_[static_cast<size_t>(layer)];
    const bool fewer = queries_of(layer).rows < rows;  // then K and V of all rows, and Q of those
    project(team, thread, block, rows, &cache, fewer ? keys_and_values : whole);
    // All of it before any of it is read: a sequence may read a block that another one of this step fills.
    write_cache(team, thread, b, layer);
    if (fewer) {
      rows = last_layer_.rows;
      if (!rows) return;  // then there is nothing for the head either
      keep_last_layer_rows(team);
      project(team, thread, block, rows, &cache, only_queries);
    }
    attend(team, thread, b, layer);
    cache = cache_of(team, thread, layer + 1);
    linear(team, thread, block.proj, attended_.floats(), width_, nullptr, rows, {x_.floats(), width_, Epilogue::add},
           &cache);
    linear(team, thread, block.fc, x_.floats(), width_, &block.norm2, rows,
           {hidden_.floats(), hidden_stride_, config_.activation, hidden_bf16}, &cache);
    const Output out{x_.floats(), width_, Epilogue::add};
    if (hidden_bf16) {
      multiply(team, thread, block.fc2, {hidden_.data(), hidden_stride_ * 2, nullptr}, rows, out, &cache);
    } else {
      linear(team, thread, block.fc2, hidden_.floats(), hidden_width_, nullptr, rows, out, &cache);
    }
  }
  if (rows < b.num_tokens) return_last_layer_rows(team);
}

}  // namespace native
