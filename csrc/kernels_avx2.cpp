// kernels.inc for AVX2 and FMA.
#include "isa.hpp"
#if defined(NATIVE_X86)
#include <immintrin.h>

#include "kernels_common.hpp"

TARGET_BEGIN("avx2,fma")
namespace native {
namespace avx2 {
#define NATIVE_X86_VECTORS 1
#include "vec_avx2.inc"
#define ISA_NAME "avx2"
#include "kernels.inc"
}  // namespace avx2
}  // namespace native
TARGET_END

namespace native {
const Kernels* kernels_avx2() { return &avx2::table; }
}  // namespace native
#endif
