// What an instruction set provides: one table of functions, all from kernels.inc. Shapes and layouts are here.
#pragma once

#include <cstdint>

namespace native {

enum class Storage : int { f32 = 0, bf16 = 1, s8 = 2, s4 = 3, s4_64 = 4, s4_128 = 5 };
enum class Epilogue : int { store, add, gelu_tanh, gelu, relu, silu };

// Values of k that share a scale in one of the storages of four bits; 0 for another.
inline int64_t group_of(Storage storage) {
  switch (storage) {
    case Storage::s4: return 32;
    case Storage::s4_64: return 64;
    case Storage::s4_128: return 128;
    default: return 0;
  }
}
constexpr int64_t kMaxGroup = 128;
constexpr int64_t kLineBytes = 64;   // of the caches
constexpr int64_t kNibblePart = 32;  // values of k whose products with four-bit weights make one exact sum

// Whether weights and activations are integers.
inline bool quantised(Storage storage) { return storage == Storage::s8 || group_of(storage); }

// k values in one 32-bit lane of a packed matrix.
inline int64_t k_per_lane(Storage storage) {
  switch (storage) {
    case Storage::f32: return 1;
    case Storage::bf16: return 2;
    case Storage::s8: return 4;
    default: return 8;
  }
}

constexpr int64_t kCodedGroup = 8;  // k that are coded together
// Of a panel, at most. Of normally distributed weights one in 7,000 is one; with many, decoding takes longer than reading.
inline int64_t most_exceptions(int64_t weights) { return 8 + weights / 1024; }
struct Exception {  // a weight of which the exponent has no code in its panel
  int32_t k;
  uint16_t lane, weight;  // its output in the panel, and itself in bf16
};

template <class T>
struct Span {
  const T *first, *last;
  const T* begin() const { return first; }
  const T* end() const { return last; }
};

// A weight matrix [n, k] packed for streaming. A panel is `panel` consecutive outputs. Within a panel, for every step of
// k_per_lane values of k there is one 32-bit lane per output: one float, two bf16 (even k in the low half), four s8 (in
// the order Kernels::s8_order), or eight nibbles (k 0..3 in the low, 4..7 in the high halves of the bytes, value + 8).
// s4 has, before every group of k, one signed byte per output, padded to Kernels::multiplier_bytes: the group's weights
// are (nibble - 8) times it, which are s8, times the output's scale. Outputs past n and values past k are 0.
// A `coded` matrix of bf16 has twelve bits a weight, laid out otherwise (coding.inc).
struct Matrix {
  Storage storage;
  bool coded;
  int64_t n, k;
  int64_t num_panels;
  int64_t steps;  // of a panel, padded to Kernels::step_multiple, coded to whole groups; for s4 one step is one group
  int64_t panel_bytes;
  const uint8_t* data;
  const float* bias;     // [num_panels * panel], or null
  const float* scale;    // of integers: [num_panels * panel]
  const int32_t* sums;   // of integers: [num_panels * panel], the sum of an output's weights
  // Of a coded matrix, for every panel: how many weights are exceptions, and those, by k, with room for as many as may be.
  const int32_t* exception_counts;
  const Exception* exceptions;
  int64_t most_exceptions;

  Span<Exception> exceptions_of(int64_t panel) const {
    const Exception* first = exceptions + panel * most_exceptions;
    return {first, first + exception_counts[panel]};
  }
};

// Activations in the form that a matrix of some storage multiplies (Kernels::prepare makes it).
struct Rows {
  const uint8_t* data;
  int64_t stride;      // bytes
  const float* scale;  // one per row, of the quantised forms

  Rows from(int64_t row) const { return {data + row * stride, stride, scale ? scale + row : nullptr}; }
};

struct Output {
  float* data;
  int64_t stride;  // of `data` or `rounded`, in its elements; at least num_panels * panel
  Epilogue epilogue;
  uint16_t* rounded = nullptr;  // bf16, where it is not null: the results go there instead. Not where bf16 is `plain`.

  Output from(int64_t row) const {
    if (rounded) return {data, stride, epilogue, rounded + row * stride};
    return {data + row * stride, stride, epilogue};
  }
};

// What a loop fetches meanwhile: a line from there, and with each of its rounds one `step` bytes further on.
struct Prefetch {
  const uint8_t* from;  // null: nothing
  int64_t step;
};

// What is read after a product: `bytes` at base + blocks[i] * stride, in the order of i. The product fetches what it has
// time for.
struct Upcoming {
  const uint8_t* base = nullptr;
  int64_t stride = 0, bytes = 0;
  const int32_t* blocks = nullptr;
  int64_t count = 0;
  int64_t fetched = 0;  // bytes of the first block

  // As many of the next lines as so many rounds fetch, but of one block: the last rounds may come to lines after it.
  Prefetch take(int64_t rounds) {
    if (!count) return {nullptr, 0};
    const uint8_t* from = base + blocks[0] * stride + fetched;
    const int64_t left = bytes - fetched, taken = left < rounds * kLineBytes ? left : rounds * kLineBytes;
    fetched += taken;
    if (fetched == bytes) fetched = 0, ++blocks, --count;
    return {from, (taken + rounds - 1) / rounds};
  }
};

// A block of the KV cache, of one layer: K and V of every head in turn. A head's K is [head_dim, block_lanes],
// its lanes tokens, and its V [block_size, head_lanes]; or, in pairs, as tiles and vdpbf16ps take them, K is
// [head_dim / 2, block_lanes, 2] and V [block_size / 2, head_lanes, 2], with head_dim and block_size
// rounded up to whole pairs or tiles.
struct CacheShape {
  int64_t heads, head_dim, block_size;
  bool bf16;
  bool pairs;
  int64_t block_lanes, head_lanes;
  int64_t key_bytes, value_bytes;  // of a head in a block
  int queries;                     // of one attention call, at most

  int64_t block_bytes() const { return heads * (key_bytes + value_bytes); }
  int64_t keys_of(int64_t head) const { return head * (key_bytes + value_bytes); }
  int64_t values_of(int64_t head) const { return keys_of(head) + key_bytes; }
};

// One head's causal attention for up to CacheShape::queries queries of one sequence over its cached positions.
struct Attention {
  const float* q;  // query i is at q + i * q_stride
  int64_t q_stride;
  int count;
  const int32_t* positions;  // [count]; query i sees positions 0..positions[i]
  const int32_t* table;      // block ids of the sequence
  const uint8_t* cache;      // this layer's block 0
  int64_t k_offset, v_offset;  // bytes, of this head within a block
  float scale;
  float* out;  // query i's [head_dim] goes to out + i * out_stride
  int64_t out_stride;
  int64_t score_stride;  // lanes of as many blocks as the context has, at least
  float* scratch;        // Kernels::attention_scratch floats
};

constexpr int64_t kLanes = 16;  // head_lanes and block_lanes are multiples of it, whatever the instruction set

// Of logits [begin, end): the largest, and the sum of exp(logit - largest). A NaN or +inf makes the sum NaN.
struct Partial {
  float largest;
  float sum;
};

struct Candidate {
  float value;
  int64_t id;
};

struct Stream {  // of random numbers: the key and the counter's constant words (base.py)
  uint64_t seed;
  uint32_t position;
  uint32_t sample_index;
};

struct Estimates {  // value i is off by norm * errors[i] + rest * sizes[i] at most
  const float* values;
  const float* errors;
  const float* sizes;
  float norm, rest;
};

struct Kernels {
  const char* name;
  int64_t lanes;           // outputs of a vector
  int64_t panel;           // outputs of a panel, of whole vectors
  int64_t panel_group;     // panels that are multiplied with many rows at a time
  int64_t matmul_scratch;  // floats
  int64_t step_multiple;   // the steps of bf16 and s8 are padded to it
  int s8_order[4];         // which byte of its lane holds value i of four
  int64_t multiplier_bytes;  // of s4, before every group

  // Bytes of a row of k activations in the form for `storage`, and its making. x has at least round_up(k, 16) floats,
  // those past k being 0. `plain` storages take the float rows as they are.
  bool (*plain)(Storage storage);
  Storage (*row_form)(Storage storage, int64_t rows);  // the storage in whose form so many rows are multiplied
  int64_t (*row_bytes)(Storage storage, int64_t k);
  void (*prepare)(Storage storage, const float* x, int64_t k, uint8_t* row, float* scale);

  // Weights of an output as lanes of eight nibbles, and a multiplier for each group; k is a multiple of the group, zeros
  // past the weights, and `extremes` has room for a float of each group. Returns the scale. The same on every instruction
  // set.
  float (*quantise_nibbles)(const float* x, int64_t k, int64_t group, float* extremes, uint32_t* words,
                            int8_t* multipliers);

  // bf16 weights that take twelve bits, or null: bytes of a panel; a panel of weights [panel, k], k a multiple of 8, to its
  // coded form, with the exceptions (returns how many there are, or -1 for more than `most`); and the k weights of one of
  // its outputs, zeros for the exceptions.
  int64_t (*coded_panel_bytes)(int64_t k);
  int32_t (*code_panel)(const uint16_t* weights, int64_t k, int64_t most, uint8_t* panel, Exception* exceptions);
  void (*decode_output)(const uint8_t* panel, int64_t lane, int64_t k, float* out);

  // y = epilogue(x W^T + bias) for panels [begin, end). scratch: matmul_scratch floats. `upcoming` may be null.
  void (*matmul)(const Matrix& w, const Rows& x, int64_t rows, const Output& y, int64_t begin, int64_t end,
                 Upcoming* upcoming, float* scratch);
  // The bits that matmul stores without an epilogue, for the outputs of some vectors and one row: y[i] of output i, and
  // maybe of others of its panel. Vectors are numbered as they lie in the output, and ascend. For float32 and bf16.
  void (*matmul_vectors)(const Matrix& w, const Rows& x, const int32_t* vectors, int64_t count, float* y, float* scratch);
  // weight and bias have round_up(d, 16) floats; out gets as many, zeros past d.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, int64_t d, float eps, float* out);
  CacheShape (*cache_shape)(int64_t heads, int64_t head_dim, int64_t block_size, bool bf16);
  // One head of K and V [count, heads * head_dim], rows `stride` floats apart, to the slots of a layer's cache; to none
  // where a slot is negative.
  void (*write_cache)(const CacheShape& shape, int64_t head, const float* k, const float* v, int64_t stride,
                      const int64_t* slots, int64_t count, uint8_t* cache);
  int64_t (*attention_scratch)(const CacheShape& shape, int64_t score_stride);
  void (*attention)(const CacheShape& shape, const Attention* items, int64_t count);

  Partial (*partial_sum)(const float* logits, int64_t begin, int64_t end);
  // Of a screen (screen.hpp), in [begin, end), begin a multiple of 128 and of a panel's outputs.
  void (*sum_estimates)(float* x, const float* rest, int64_t begin, int64_t end);  // x += rest
  // The output that must reach the most, and how much that is; its id is -1 if nothing can be said.
  Candidate (*surest)(const Estimates& x, int64_t begin, int64_t end);
  // The same after division by the temperature and with Gumbel noise. Leaves in most[begin, end) what each may be at most:
  // -inf where that is known to be less than `floor`, or than what another must reach.
  Candidate (*noisy_surest)(const Estimates& x, float temperature, const Stream& stream, int64_t begin, int64_t end,
                            float floor, float* most);
  // Marks the vectors, from begin's on, in which an output may reach `floor`.
  void (*plain_reaching)(const Estimates& x, float floor, int64_t begin, int64_t end, bool* vectors);
  void (*noisy_reaching)(const float* most, float floor, int64_t begin, int64_t end, bool* vectors);
  float (*gumbel)(int64_t id, const Stream& stream);  // the noise of an id, as gumbel_argmax adds it

  // Of a row's logits.
  int64_t (*first_equal)(const float* x, int64_t begin, int64_t end, float value);  // its id, or end
  int64_t (*first_above)(const float* x, int64_t begin, int64_t end, float value);
  int64_t (*count_above)(const float* x, int64_t n, float value);
  void (*divide)(const float* x, int64_t n, float divisor, float* out);
  // Of ids g, g + groups, g + 2 groups and so on the largest, to out[g]; groups is a multiple of 16.
  void (*group_maxima)(const float* x, int64_t n, int64_t groups, float* out);
  int64_t (*reaching)(const float* x, int64_t n, float bound, float* out);  // those >= bound; returns how many
  void (*masses)(const float* x, int64_t n, float largest, int32_t* out);   // floor(exp(x - largest) * 2^30)
  int64_t (*total_mass)(const float* x, int64_t n, float largest);          // their sum
  // -inf where x < threshold or exp(x - largest) < min_p, if that is above 0
  void (*exclude)(float* x, int64_t n, float largest, float threshold, float min_p);
  // The largest x / temperature + Gumbel noise in [begin, end), begin a multiple of 128; the lowest id among equals. One
  // below `floor` need not be found.
  Candidate (*gumbel_argmax)(const float* x, float temperature, int64_t begin, int64_t end, const Stream& stream,
                             float floor);

  // For benchmarks: products of `storage` with operands in registers (returns how many), and a read of memory.
  int64_t (*multiply_accumulate)(Storage storage, int64_t iterations);
  int64_t (*read_all)(const uint8_t* data, int64_t bytes);
};

}  // namespace native
