// kernels.inc for AVX-512 with BF16 and VNNI.
#include "isa.hpp"
#if defined(NATIVE_X86)
#include <immintrin.h>

#include "kernels_common.hpp"

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
namespace native {
namespace avx512_bf16 {
#define NATIVE_X86_VECTORS 1
#define HAVE_DOT_BF16 1
#define HAVE_DOT_BYTES 1
#define HAVE_CODED 1
#include "vec_avx512.inc"
#define ISA_NAME "avx512_bf16"
#include "kernels.inc"
}  // namespace avx512_bf16
}  // namespace native
TARGET_END

namespace native {
const Kernels* kernels_avx512_bf16() { return &avx512_bf16::table; }
}  // namespace native
#endif
