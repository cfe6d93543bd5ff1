// What every kernels_*.cpp needs before its target region opens: standard headers must not be compiled inside one, or
// their inline functions could be shared with code that runs on any CPU.
#pragma once

#include <cfloat>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "rounding.hpp"
#include "kernels.hpp"

#if defined(_MSC_VER)
#define INLINE static __forceinline
#define INLINE_MEMBER __forceinline
#define NOINLINE static __declspec(noinline)
#define TARGET_BEGIN(options)
#define TARGET_END
#elif defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#define NATIVE_PRAGMA(text) _Pragma(#text)
#define TARGET_BEGIN(options) \
  NATIVE_PRAGMA(clang attribute push(__attribute__((target(options))), apply_to = function))
#define TARGET_END _Pragma("clang attribute pop")
#else
#define INLINE static inline __attribute__((always_inline))
#define NATIVE_PRAGMA(text) _Pragma(#text)
#define TARGET_BEGIN(options) _Pragma("GCC push_options") NATIVE_PRAGMA(GCC target(options))
#define TARGET_END _Pragma("GCC pop_options")
#endif

#if !defined(_MSC_VER)
#define INLINE_MEMBER inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#endif

#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define UNROLL _Pragma("GCC unroll 32")
#else
#define UNROLL
#endif

namespace native {

// To the first-level cache, or the second. As instructions, because GCC 12 drops a call of a function that does nothing
// but __builtin_prefetch.
INLINE void prefetch(const void* p) {
#if defined(__GNUC__) && defined(__x86_64__)
  asm volatile("prefetcht0 %0" : : "m"(*static_cast<const char*>(p)));
#elif defined(__GNUC__) && defined(__aarch64__)
  asm volatile("prfm pldl1keep, [%0]" : : "r"(p));
#else
  (void)p;
#endif
}
INLINE void prefetch_to_second(const void* p) {
#if defined(__GNUC__) && defined(__x86_64__)
  asm volatile("prefetcht1 %0" : : "m"(*static_cast<const char*>(p)));
#else
  prefetch(p);
#endif
}

// One Philox4x32-10 block (Salmon et al. 2011): four words for counter (c0, c1, c2, 0) and a 64-bit key.
struct PhiloxKeys {
  uint32_t low[10], high[10];
  explicit PhiloxKeys(uint64_t seed) {
    low[0] = static_cast<uint32_t>(seed);
    high[0] = static_cast<uint32_t>(seed >> 32);
    for (int i = 1; i < 10; ++i) {
      low[i] = low[i - 1] + 0x9E3779B9u;
      high[i] = high[i - 1] + 0xBB67AE85u;
    }
  }
};

}  // namespace native
