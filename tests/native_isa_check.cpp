// Every instruction set of this build against the generic one, without Python: for a CPU that is emulated.
//
//     make check-platforms        compiles csrc/ and this for other systems, and runs it where they are emulated
//
// A small model with odd sizes runs a prompt of many rows, chunks and single steps in every storage. Logits have to be
// those of "generic" up to rounding, and within an instruction set the same bits however the tokens were cut.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "model.hpp"

namespace {

using native::Storage;

constexpr int64_t kVocab = 101, kContext = 96, kWidth = 40, kHeads = 2, kLayers = 2, kHidden = 75, kBlock = 16;
constexpr int kTokens = 77;  // of the sequence
int failures = 0;

void expect(bool good, const std::string& isa, const char* storage, const char* what, double value) {
  if (!good) ++failures;
  std::printf("%s %s %s: %s %.3g\n", good ? "ok" : "FAILED", isa.c_str(), storage, what, value);
}

// Pseudo-random values of about unit size, the same everywhere.
std::vector<float> values(int64_t count, float scale, uint32_t seed) {
  std::vector<float> out(static_cast<size_t>(count));
  uint32_t state = seed * 2654435761u + 1;
  for (float& v : out) {
    float sum = 0;
    for (int i = 0; i < 4; ++i) {
      state = state * 1664525u + 1013904223u;
      sum += static_cast<float>(state >> 8) / 16777216.0f - 0.5f;
    }
    v = sum * 1.7f * scale;
  }
  return out;
}

struct Weights {
  std::vector<std::vector<float>> data;
  std::vector<native::Tensor> tensors;

  void add(int64_t rows, int64_t columns, float scale, float offset) {
    auto made = values(rows * columns, scale, static_cast<uint32_t>(data.size() + 1));
    for (float& v : made) v += offset;
    data.push_back(std::move(made));
    tensors.push_back({data.back().data(), native::Dtype::f32, rows, columns, columns, 1});
  }
};

Weights weights_of(const std::vector<std::string>& names) {
  Weights all;
  all.data.reserve(names.size());
  for (const std::string& name : names) {
    const auto ends = [&](const char* text) {
      const std::string tail(text);
      return name.size() >= tail.size() && name.compare(name.size() - tail.size(), tail.size(), tail) == 0;
    };
    const bool bias = ends(".bias");
    if (name.find("norm") != std::string::npos) all.add(1, kWidth, 0.1f, bias ? 0.0f : 1.0f);
    else if (name == "tok_emb") all.add(kVocab, kWidth, 0.3f, 0);
    else if (name == "head") all.tensors.push_back(all.tensors[0]);  // tied to tok_emb, which comes first
    else if (name == "pos_emb") all.add(kContext, kWidth, 0.3f, 0);
    else if (ends("qkv.weight")) all.add(3 * kWidth, kWidth, 0.16f, 0);
    else if (ends("qkv.bias")) all.add(1, 3 * kWidth, 0.1f, 0);
    else if (ends("proj.weight")) all.add(kWidth, kWidth, 0.16f, 0);
    else if (ends("fc.weight")) all.add(kHidden, kWidth, 0.16f, 0);
    else if (ends("fc.bias")) all.add(1, kHidden, 0.1f, 0);
    else if (ends("fc2.weight")) all.add(kWidth, kHidden, 0.12f, 0);
    else all.add(1, kWidth, 0.1f, 0);  // proj.bias, fc2.bias
  }
  return all;
}

// Logits after every token of one sequence that is run in chunks of `chunk`, and a token drawn after the last.
std::vector<float> run(native::Model& model, int chunk, int32_t* token) {
  model.allocate(8);
  std::vector<float> logits(kTokens * kVocab);
  const int32_t table[8] = {5, 2, 7, 0, 3, 1, 6, 4};
  for (int first = 0; first < kTokens; first += chunk) {
    const int count = first + chunk < kTokens ? chunk : kTokens - first;
    std::vector<int32_t> ids, positions, rows;
    std::vector<int64_t> slots;
    for (int i = 0; i < count; ++i) {
      const int p = first + i;
      ids.push_back((p * 37 + 11) % kVocab);
      positions.push_back(p);
      slots.push_back(table[p / kBlock] * kBlock + p % kBlock);
      rows.push_back(i);
    }
    const int32_t starts[2] = {0, count}, length = first + count, last = count - 1, top_k = 20;
    const float one = 1, zero = 0;
    const uint64_t seed = 42;
    const uint32_t position = 7;
    native::Batch b{};
    b.num_tokens = b.num_logits = count;
    b.num_sequences = 1;
    b.table_width = 8;
    b.token_ids = ids.data();
    b.positions = positions.data();
    b.slots = slots.data();
    b.query_starts = starts;
    b.context_lens = &length;
    b.block_tables = table;
    b.logits_rows = rows.data();
    native::Sampling& s = b.sampling;
    s.num_rows = 1;
    s.draw_rows = &last;
    s.temperature = s.top_p = s.repetition_penalty = &one;
    s.min_p = s.presence_penalty = s.frequency_penalty = &zero;
    s.top_k = &top_k;
    s.seeds = &seed;
    s.positions = s.sample_index = &position;
    float logprob;
    int32_t rank;
    b.num_steps = 1;
    model.run(b, logits.data() + first * kVocab, {token, &logprob, &rank, nullptr, nullptr}, {});
  }
  return logits;
}

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::fabs(static_cast<double>(a[i]) - b[i]);
    if (!(difference <= largest)) largest = difference;  // NaN too
  }
  return largest;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check(const std::string& isa, Storage storage, const char* name, double tolerance) {
  std::vector<float> logits[2];
  int32_t tokens[2];
  for (int i = 0; i < 2; ++i) {
    native::Config config{kVocab, kContext, kWidth, kHeads, kLayers, kHidden, native::Epilogue::gelu_tanh, 1e-5f,
                          {0.22f, 0.22f}, true, storage, kBlock, 2, i ? isa : "generic"};
    const Weights weights = weights_of(native::tensor_names(config));
    native::Model model(config);
    model.update(weights.tensors);
    logits[i] = run(model, kTokens, &tokens[i]);
    if (i == 0) continue;
    for (const int chunk : {1, 3, 16}) {
      int32_t token;
      expect(same_bits(run(model, chunk, &token), logits[1]) && token == tokens[1], isa, name, "bits in chunks of",
             chunk);
    }
  }
  const double difference = largest_difference(logits[0], logits[1]);
  expect(difference <= tolerance, isa, name, "largest difference from generic", difference);
  if (storage == Storage::f32) expect(tokens[0] == tokens[1], isa, name, "the token that generic draws", tokens[1]);
}

}  // namespace

int main() {
  for (const native::Isa& isa : native::isas()) {
    if (!isa.available || std::string(isa.name) == "generic") continue;
    check(isa.name, Storage::f32, "f32", 1e-4);
    check(isa.name, Storage::bf16, "bf16", 0.05);  // some instruction sets round activations, too
    // Where an activation is rounded the other way; with queries and attention's weights in bf16 more of them are.
    const std::string name = isa.name;
    const double flips = name == "avx512_bf16" || name == "amx" ? 0.25 : 0.05;
    check(isa.name, Storage::s8, "s8", flips);
    check(isa.name, Storage::s4, "s4", flips);
    check(isa.name, Storage::s4_64, "s4_64", 0.25);  // one activation is rounded the other way on every set but generic
    check(isa.name, Storage::s4_128, "s4_128", flips);
  }
  std::printf("%d failures\n", failures);
  return failures != 0;
}
