// The Python module. Arrays come as NumPy arrays of the exact type; nothing is converted behind the caller's back.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "model.hpp"
#include "probe.hpp"

namespace py = pybind11;

namespace {

using namespace native;

std::string text(const py::handle& object) { return py::str(object).cast<std::string>(); }

// An array's dtype and whether it is contiguous, of something else the type.
std::string described(const py::handle& object) {
  if (!py::isinstance<py::array>(object)) return text(py::type::of(object));
  const auto array = py::reinterpret_borrow<py::array>(object);
  return (array.flags() & py::array::c_style ? "one of " : "one that is not contiguous, of ") + text(array.dtype());
}

// The data of a contiguous array of T with `count` elements (any number if negative).
template <class T>
const T* data_of(const py::handle& object, const char* what, int64_t count) {
  if (!py::isinstance<py::array_t<T, py::array::c_style>>(object)) {
    throw std::invalid_argument(std::string(what) + " must be a contiguous array of " + text(py::dtype::of<T>()) +
                                ", got " + described(object));
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  if (count >= 0 && array.size() != count) {
    throw std::invalid_argument(std::string(what) + " has " + std::to_string(array.size()) + " elements, expected " +
                                std::to_string(count));
  }
  return static_cast<const T*>(array.data());
}

int64_t size_of(const py::handle& object, const char* what) {
  if (!py::isinstance<py::array>(object)) {
    throw std::invalid_argument(std::string(what) + " must be an array, got " + described(object));
  }
  return py::reinterpret_borrow<py::array>(object).size();
}

SparseRows sparse_rows(const py::handle& object, const char* what, int64_t rows) {
  if (object.is_none()) return {nullptr, nullptr, nullptr};
  const auto parts = object.cast<py::tuple>();
  SparseRows sparse{};
  sparse.starts = data_of<int32_t>(parts[0], what, rows + 1);
  const int64_t count = sparse.starts[rows];
  sparse.ids = data_of<int32_t>(parts[1], what, count);
  sparse.values = data_of<float>(parts[2], what, count);
  for (int64_t r = 0; r < rows; ++r) {
    if (sparse.starts[r] < 0 || sparse.starts[r] > sparse.starts[r + 1]) {
      throw std::invalid_argument(std::string(what) + ": row " + std::to_string(r) + " is from " +
                                  std::to_string(sparse.starts[r]) + " to " + std::to_string(sparse.starts[r + 1]) +
                                  ": starts must be at least 0 and not decrease");
    }
  }
  return sparse;
}

// In the order of the fields of SamplingBatch, draw_rows first.
Sampling sampling_of(const py::object& object, int64_t vocab_size) {
  Sampling s{};
  if (object.is_none()) return s;
  const auto p = object.cast<py::tuple>();
  s.num_rows = size_of(p[0], "draw_rows");
  const int64_t n = s.num_rows;
  s.draw_rows = data_of<int32_t>(p[0], "draw_rows", n);
  s.temperature = data_of<float>(p[1], "temperature", n);
  s.top_k = data_of<int32_t>(p[2], "top_k", n);
  s.top_p = data_of<float>(p[3], "top_p", n);
  s.min_p = data_of<float>(p[4], "min_p", n);
  s.seeds = data_of<uint64_t>(p[5], "seeds", n);
  s.positions = data_of<uint32_t>(p[6], "positions to draw", n);
  s.sample_index = data_of<uint32_t>(p[7], "sample_index", n);
  s.num_logprobs = p[8].cast<int64_t>();
  s.presence_penalty = data_of<float>(p[9], "presence_penalty", n);
  s.frequency_penalty = data_of<float>(p[10], "frequency_penalty", n);
  s.repetition_penalty = data_of<float>(p[11], "repetition_penalty", n);
  s.output_counts = sparse_rows(p[12], "output_counts", n);
  s.logit_bias = sparse_rows(p[13], "logit_bias", n);
  if (!p[14].is_none()) {
    s.words = (vocab_size + 31) / 32;
    s.allowed = data_of<uint32_t>(p[14], "allowed", n * s.words);
  }
  if (!p[15].is_none()) s.token_only = data_of<bool>(p[15], "token_only", n);
  return s;
}

// Between steps: Ctrl-C ends the run as it would end a loop in Python.
void handle_signals() {
  py::gil_scoped_acquire acquire;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

Epilogue activation_of(const std::string& name) {
  if (name == "none") return Epilogue::store;
  if (name == "gelu_tanh") return Epilogue::gelu_tanh;
  if (name == "gelu") return Epilogue::gelu;
  if (name == "relu") return Epilogue::relu;
  if (name == "silu") return Epilogue::silu;
  throw std::invalid_argument("activation '" + name + "' is not one of none, gelu_tanh, gelu, relu, silu");
}

Storage storage_of(int code) {
  if (code < 0 || code > 5) throw std::invalid_argument("storage code " + std::to_string(code) + " is not in 0..5");
  return static_cast<Storage>(code);
}

class PyModel {
 public:
  PyModel(py::dict config, int storage, int64_t block_size, int threads, const std::string& isa, bool screen_head)
      : config_(convert(config, storage, block_size, threads, isa, screen_head)), model_(config_) {}

  // Each tensor: (address, dtype code, rows, columns, row stride, column stride), strides in elements.
  void update(const std::vector<std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t>>& tensors) {
    std::vector<Tensor> views;
    for (const auto& [address, dtype, rows, columns, row_stride, column_stride] : tensors) {
      if (dtype < 0 || dtype > 3) throw std::invalid_argument("dtype code " + std::to_string(dtype) + " is not in 0..3");
      views.push_back({reinterpret_cast<const void*>(address), static_cast<Dtype>(dtype), rows, columns, row_stride,
                       column_stride});
    }
    py::gil_scoped_release release;
    model_.update(views);
  }

  void allocate(int64_t num_blocks) {
    py::gil_scoped_release release;
    model_.allocate(num_blocks);
  }

  // arrays: token_ids, positions, slots, query_starts, context_lens, block_tables [S, B], logits_rows, previous_rows or
  // None, block_copies or None, ending_ids or None. Returns (logits or None, token_ids, logprobs, ranks, top_ids,
  // top_logprobs), the rows of every step that ran, and the first row from which no token can be drawn, or -1.
  py::tuple run(const py::tuple& arrays, const py::object& options, int64_t num_steps) {
    Batch b{};
    b.num_tokens = size_of(arrays[0], "token_ids");
    b.token_ids = data_of<int32_t>(arrays[0], "token_ids", -1);
    b.positions = data_of<int32_t>(arrays[1], "positions", b.num_tokens);
    b.slots = data_of<int64_t>(arrays[2], "slots", b.num_tokens);
    b.num_sequences = size_of(arrays[4], "context_lens");
    b.query_starts = data_of<int32_t>(arrays[3], "query_starts", b.num_sequences + 1);
    b.context_lens = data_of<int32_t>(arrays[4], "context_lens", b.num_sequences);
    b.table_width = b.num_sequences ? size_of(arrays[5], "block_tables") / b.num_sequences : 0;
    b.block_tables = data_of<int32_t>(arrays[5], "block_tables", b.num_sequences * b.table_width);
    b.num_logits = size_of(arrays[6], "logits_rows");
    b.logits_rows = data_of<int32_t>(arrays[6], "logits_rows", -1);
    if (!arrays[7].is_none()) b.previous_rows = data_of<int32_t>(arrays[7], "previous_rows", b.num_tokens);
    if (!arrays[8].is_none()) {
      b.num_copies = size_of(arrays[8], "block_copies") / 2;
      b.block_copies = data_of<int32_t>(arrays[8], "block_copies", 2 * b.num_copies);
    }
    b.num_steps = num_steps;
    if (!arrays[9].is_none()) {
      b.num_endings = size_of(arrays[9], "ending_ids");
      b.ending_ids = data_of<int32_t>(arrays[9], "ending_ids", b.num_endings);
    }
    b.sampling = sampling_of(options, config_.vocab_size);
    const int64_t rows = b.sampling.num_rows;
    b.sampling.num_logprobs = std::min(std::max<int64_t>(b.sampling.num_logprobs, 0), config_.vocab_size);
    const int64_t tops = b.sampling.num_logprobs;
    const int64_t most = rows * std::clamp<int64_t>(num_steps, 1, config_.context_length);
    py::array_t<int32_t> tokens(most), ranks(most), top_ids({most, tops});
    py::array_t<float> logprobs(most), top_logprobs({most, tops});
    py::object logits = py::none();
    float* logits_data = nullptr;
    if (b.num_logits) {
      py::array_t<float> array({b.num_logits, config_.vocab_size});
      logits_data = array.mutable_data();
      logits = array;
    }
    const Draws draws{tokens.mutable_data(), logprobs.mutable_data(), ranks.mutable_data(), top_ids.mutable_data(),
                      top_logprobs.mutable_data()};
    int64_t drawn = 0;
    {
      py::gil_scoped_release release;
      drawn = rows * model_.run(b, logits_data, draws, handle_signals);
    }
    int64_t bad = 0;
    while (bad < rows && draws.token_ids[bad] >= 0) ++bad;
    const auto ran = [&](py::array& array) -> py::object {
      if (drawn == most) return array;
      return array[py::slice(0, drawn, 1)];
    };
    return py::make_tuple(logits, ran(tokens), ran(logprobs), ran(ranks), ran(top_ids), ran(top_logprobs),
                          bad < rows ? bad : -1);
  }

  int64_t block_bytes() const { return model_.block_bytes(); }
  bool coded() const { return model_.coded(); }
  int64_t weight_bytes() const { return model_.weight_bytes(); }
  std::string isa() const { return model_.isa(); }
  int threads() const { return model_.threads(); }
  std::vector<std::string> names() const { return tensor_names(config_); }

 private:
  static Config convert(const py::dict& c, int storage, int64_t block_size, int threads, const std::string& isa,
                        bool screen_head) {
    const Storage stored = storage_of(storage);
    const auto size = [&](const char* key, int64_t most) {
      return check_within(key, c[key].cast<int64_t>(), 1, most);
    };
    // So that no number of bytes overflows 64 bits, and no sum of integer products 32.
    constexpr int64_t kMost = 1 << 28, kMostWide = 1 << 20, kMostQuantised = 130000;
    const int64_t most_wide = quantised(stored) ? kMostQuantised : kMostWide;
    Config config{size("vocab_size", kMost),
                  size("context_length", kMost),
                  size("embed_dim", most_wide),
                  size("n_heads", kMostWide),
                  size("n_layers", 1 << 16),
                  size("hidden_dim", most_wide),
                  activation_of(c["activation"].cast<std::string>()),
                  c["norm_eps"].cast<float>(),
                  c["attn_scales"].cast<std::vector<float>>(),
                  c["tied_head"].cast<bool>(),
                  stored,
                  check_within("block_size", block_size, 1, 1 << 16),
                  static_cast<int>(check_within("threads", threads, 1, 1 << 16)),
                  isa,
                  screen_head};
    if (screen_head && quantised(stored)) {
      throw std::invalid_argument("screen_head is for weights in float32 and bfloat16, not for storage code " +
                                  std::to_string(storage));
    }
    if (config.embed_dim % config.n_heads) {
      throw std::invalid_argument("embed_dim is " + std::to_string(config.embed_dim) + ", not a multiple of n_heads, " +
                                  std::to_string(config.n_heads));
    }
    if (static_cast<int64_t>(config.attn_scales.size()) != config.n_layers) {
      throw std::invalid_argument("attn_scales has " + std::to_string(config.attn_scales.size()) + " entries for " +
                                  std::to_string(config.n_layers) + " layers");
    }
    return config;
  }

  Config config_;
  Model model_;
};

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Steps of GPT-2 family models on the CPU (csrc/).";
  py::class_<PyModel>(m, "Model")
      .def(py::init<py::dict, int, int64_t, int, const std::string&, bool>(), py::arg("config"), py::arg("storage"),
           py::arg("block_size"), py::arg("threads"), py::arg("isa"), py::arg("screen_head"))
      .def("update", &PyModel::update)
      .def("allocate", &PyModel::allocate)
      .def("run", &PyModel::run)
      .def_property_readonly("block_bytes", &PyModel::block_bytes)
      .def_property_readonly("coded", &PyModel::coded)
      .def_property_readonly("weight_bytes", &PyModel::weight_bytes)
      .def_property_readonly("isa", &PyModel::isa)
      .def_property_readonly("threads", &PyModel::threads)
      .def_property_readonly("tensor_names", &PyModel::names);
  m.def("isas", [] {
    std::vector<std::pair<std::string, bool>> list;
    for (const Isa& isa : isas()) list.emplace_back(isa.name, isa.available);
    return list;
  }, "(name, whether this CPU has it) of the instruction sets that were compiled, best first.");
  m.def("choose_isa", [](const std::string& name) { return std::string(choose_isa(name).name); }, py::arg("name"),
        "The named instruction set, or the best one for an empty name. ValueError if it is not here.");
  m.def("time_reads", &time_reads, py::call_guard<py::gil_scoped_release>(), py::arg("isa"), py::arg("threads"),
        py::arg("bytes"), py::arg("repeats"), "Seconds that each of several reads of so many bytes took.");
  m.def("time_products",
        [](const std::string& isa, int threads, int storage, int repeats) {
          return time_products(isa, threads, storage_of(storage), repeats);
        },
        py::call_guard<py::gil_scoped_release>(), py::arg("isa"), py::arg("threads"), py::arg("storage"),
        py::arg("repeats"), "Multiply-accumulates per second with operands in registers.");
  m.def("linear",
        [](const py::array& x, const py::array& weight, const py::array& bias, const std::string& isa, int threads,
           int storage, const std::string& activation) {
          if (x.ndim() != 2 || weight.ndim() != 2 || x.shape(1) != weight.shape(1)) {
            throw std::invalid_argument("x must be [rows, k] and weight [n, k], got shapes " + text(x.attr("shape")) +
                                        " and " + text(weight.attr("shape")));
          }
          const int64_t rows = x.shape(0), k = x.shape(1), n = weight.shape(0);
          py::array_t<float> y({rows, n});
          linear_once(isa, threads, storage_of(storage), activation_of(activation), rows, n, k,
                      data_of<float>(x, "x", rows * k), data_of<float>(weight, "weight", n * k),
                      data_of<float>(bias, "bias", n), y.mutable_data());
          return y;
        },
        py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("isa"), py::arg("threads"), py::arg("storage"),
        py::arg("activation"), "activation(x W^T + bias) by the kernels of a step, for tests.");
}
