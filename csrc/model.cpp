#include "model.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace native {
namespace {

[[noreturn]] void refuse(const std::string& message) { throw std::invalid_argument(message); }

void fill_vector(const Tensor& tensor, Buffer& out) {
  if (!out.bytes()) out = Buffer(round_up(tensor.columns, kLanes) * 4);
  read_row(tensor, 0, out.floats());
}

// Name, rows and columns of every canonical tensor.
struct Expected {
  std::string name;
  int64_t rows, columns;
};

std::vector<Expected> expected_tensors(const Config& c) {
  const int64_t d = c.embed_dim, h = c.hidden_dim;
  std::vector<Expected> all = {{"tok_emb", c.vocab_size, d},
                               {"pos_emb", c.context_length, d},
                               {"final_norm.weight", 1, d},
                               {"final_norm.bias", 1, d},
                               {"head", c.vocab_size, d}};
  for (int64_t i = 0; i < c.n_layers; ++i) {
    const std::string block = "blocks." + std::to_string(i) + ".";
    const auto norm = [&](const char* name) {
      all.push_back({block + name + ".weight", 1, d});
      all.push_back({block + name + ".bias", 1, d});
    };
    const auto matrix = [&](const char* name, int64_t out, int64_t in) {
      all.push_back({block + name + ".weight", out, in});
      all.push_back({block + name + ".bias", 1, out});
    };
    norm("norm1");
    matrix("qkv", 3 * d, d);
    matrix("proj", d, d);
    norm("norm2");
    matrix("fc", h, d);
    matrix("fc2", d, h);
  }
  return all;
}

}  // namespace

int64_t check_within(const char* what, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return value;
  refuse(std::string(what) + " is " + std::to_string(value) + ": it must be in [" + std::to_string(least) + ", " +
         std::to_string(most) + "]");
}

std::vector<std::string> tensor_names(const Config& config) {
  std::vector<std::string> names;
  for (const Expected& tensor : expected_tensors(config)) names.push_back(tensor.name);
  return names;
}

Model::Model(Config config)
    : config_(std::move(config)), kernels_(choose_isa(config_.isa).kernels()), pool_(config_.threads) {
  const Config& c = config_;
  const bool narrow = c.storage != Storage::f32;
  if (!c.tied_head || quantised(c.storage)) tok_emb_ = Table(narrow, c.vocab_size, c.embed_dim);
  pos_emb_ = Table(narrow, c.context_length, c.embed_dim);
  head_ = Packed(c.storage, c.vocab_size, c.embed_dim, *kernels_);
  if (c.screen_head) screen_ = Screen(head_.view(), *kernels_);
  blocks_.resize(static_cast<size_t>(c.n_layers));
  for (Block& block : blocks_) {
    block.qkv = Packed(c.storage, 3 * c.embed_dim, c.embed_dim, *kernels_);
    block.proj = Packed(c.storage, c.embed_dim, c.embed_dim, *kernels_);
    block.fc = Packed(c.storage, c.hidden_dim, c.embed_dim, *kernels_);
    block.fc2 = Packed(c.storage, c.embed_dim, c.hidden_dim, *kernels_);
  }
  shape_ = kernels_->cache_shape(c.n_heads, c.head_dim(), c.block_size, narrow);
  // A line more where rows would begin at the same few sets of the caches.
  const auto width = [&](int64_t n) {
    const int64_t floats = round_up(round_up(n, kernels_->panel), kLanes);
    return floats % 256 ? floats : floats + kLanes;
  };
  width_ = width(c.embed_dim);
  qkv_width_ = width(3 * c.embed_dim);
  hidden_width_ = width(c.hidden_dim);
  vocab_width_ = width(c.vocab_size);
  hidden_is_bf16_ = c.storage == Storage::bf16 && !kernels_->plain(c.storage);
  hidden_stride_ = hidden_is_bf16_ ? prepared_bytes(c.storage, round_up(c.hidden_dim, kernels_->panel)) / 2 : hidden_width_;
  for (const int64_t rows : {int64_t{1}, INT64_MAX}) {  // few and many
    const Storage form = kernels_->row_form(c.storage, rows);
    max_row_bytes_ = std::max({max_row_bytes_, prepared_bytes(form, c.embed_dim), prepared_bytes(form, c.hidden_dim)});
  }
}

// From one prepared row of k values to the next: an odd number of cache lines, so that rows do not meet in a few sets.
int64_t Model::prepared_bytes(Storage storage, int64_t k) const {
  return (round_up(kernels_->row_bytes(storage, k), kLineBytes) / kLineBytes | 1) * kLineBytes;
}

void Model::update(const std::vector<Tensor>& tensors) {
  const auto expected = expected_tensors(config_);
  if (tensors.size() != expected.size()) {
    refuse("got " + std::to_string(tensors.size()) + " tensors, expected " + std::to_string(expected.size()));
  }
  for (size_t i = 0; i < expected.size(); ++i) {
    if (tensors[i].rows == expected[i].rows && tensors[i].columns == expected[i].columns) continue;
    refuse(expected[i].name + " has shape [" + std::to_string(tensors[i].rows) + ", " +
           std::to_string(tensors[i].columns) + "], expected [" + std::to_string(expected[i].rows) + ", " +
           std::to_string(expected[i].columns) + "]");
  }
  Busy busy(busy_);
  loaded_ = false;  // until all are there: a matrix that can be coded no more needs memory
  const Tensor* next = tensors.data();
  const auto norm = [&](Norm& out) {
    fill_vector(*next++, out.weight);
    fill_vector(*next++, out.bias);
  };
  const auto matrix = [&](Packed& out) {
    out.fill(next[0], &next[1], pool_);
    next += 2;
  };
  if (tok_emb_.bytes()) tok_emb_.fill(next[0], pool_);
  pos_emb_.fill(next[1], pool_);
  next += 2;
  norm(final_norm_);
  head_.fill(*next, nullptr, pool_);
  if (config_.screen_head) screen_.fill(*next, pool_);
  ++next;
  for (Block& block : blocks_) {
    norm(block.norm1);
    matrix(block.qkv);
    matrix(block.proj);
    norm(block.norm2);
    matrix(block.fc);
    matrix(block.fc2);
  }
  loaded_ = true;
}

void Model::allocate(int64_t num_blocks) {
  check_within("num_blocks", num_blocks, 0, (int64_t{1} << 60) / block_bytes());
  Busy busy(busy_);
  cache_ = Buffer();  // the old one goes before the new one comes
  num_blocks_ = 0;
  cache_ = Buffer(num_blocks * block_bytes());
  num_blocks_ = num_blocks;
}

int64_t Model::block_bytes() const { return config_.n_layers * shape_.block_bytes(); }

bool Model::coded() const {
  bool all = head_.view().coded;
  for (const Block& block : blocks_) {
    for (const Packed* matrix : {&block.qkv, &block.proj, &block.fc, &block.fc2}) all = all && matrix->view().coded;
  }
  return all;
}

int64_t Model::weight_bytes() const {
  int64_t total = tok_emb_.bytes() + pos_emb_.bytes() + head_.bytes() + screen_.bytes();
  for (const Block& block : blocks_) {
    total += block.qkv.bytes() + block.proj.bytes() + block.fc.bytes() + block.fc2.bytes();
  }
  return total + (4 * config_.n_layers + 2) * round_up(config_.embed_dim, kLanes) * 4;
}

uint8_t* Model::cache_block(int64_t layer, int64_t block) const {
  return cache_.data() + (layer * num_blocks_ + block) * shape_.block_bytes();
}

}  // namespace native
