// Which instruction set runs: the best that was compiled and the CPU has, or the one that is asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace native {

struct Isa {
  const char* name;
  bool available;  // on this CPU
  const Kernels* (*kernels)();
};

// Those that were compiled into this library, best first; "generic" is the last and always available.
const std::vector<Isa>& isas();

// The named one; the best available for "". Throws std::invalid_argument if it is not compiled or the CPU lacks it.
const Isa& choose_isa(const std::string& name);

const Kernels* kernels_generic();
#if defined(__x86_64__) || defined(_M_X64)
#define NATIVE_X86 1
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();
const Kernels* kernels_avx512_vnni();
const Kernels* kernels_avx512_bf16();
// Compilers whose assembler is sure to know what came after AVX-512. Tiles also take Linux, whose permission isa.cpp
// asks for.
#if __clang_major__ >= 14 || (!defined(__clang__) && __GNUC__ >= 11)
#define NATIVE_AVX_VNNI 1
const Kernels* kernels_avx2_vnni();
#if defined(__linux__) && defined(__x86_64__)
#define NATIVE_AMX 1
const Kernels* kernels_amx();
#endif
#endif
#elif defined(__aarch64__) || defined(_M_ARM64)
#define NATIVE_ARM64 1
const Kernels* kernels_neon();
#endif

}  // namespace native
