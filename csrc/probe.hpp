// For benchmarks and tests: what this machine can do at most, and single kernels.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace native {

// Seconds of each of `repeats` reads of `bytes` bytes by `threads` threads; the memory is read once before.
std::vector<double> time_reads(const std::string& isa, int threads, int64_t bytes, int repeats);

// Multiply-accumulates per second of `threads` threads with operands in registers, in each of `repeats` tries.
std::vector<double> time_products(const std::string& isa, int threads, Storage storage, int repeats);

// y [rows, n] = activation(x W^T + bias) by the kernels of a step: x [rows, k], W [n, k], bias [n].
void linear_once(const std::string& isa, int threads, Storage storage, Epilogue activation, int64_t rows, int64_t n,
                 int64_t k, const float* x, const float* weight, const float* bias, float* y);

}  // namespace native
