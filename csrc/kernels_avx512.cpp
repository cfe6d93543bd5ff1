// kernels.inc for AVX-512 without its BF16 and VNNI parts.
#include "isa.hpp"
#if defined(NATIVE_X86)
#include <immintrin.h>

#include "kernels_common.hpp"

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace native {
namespace avx512 {
#define NATIVE_X86_VECTORS 1
#include "vec_avx512.inc"
#define ISA_NAME "avx512"
#include "kernels.inc"
}  // namespace avx512
}  // namespace native
TARGET_END

namespace native {
const Kernels* kernels_avx512() { return &avx512::table; }
}  // namespace native
#endif
