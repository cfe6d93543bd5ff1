// What this machine can do at most, for benchmarks to compare with.
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

}  // namespace native
