// kernels.inc for AVX-512 with VNNI for the products of bytes.
#include "isa.hpp"
#if defined(NATIVE_X86)
#include <immintrin.h>

#include "kernels_common.hpp"

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
namespace native {
namespace avx512_vnni {
#define NATIVE_X86_VECTORS 1
#define HAVE_DOT_BYTES 1
#include "vec_avx512.inc"
#define ISA_NAME "avx512_vnni"
#include "kernels.inc"
}  // namespace avx512_vnni
}  // namespace native
TARGET_END

namespace native {
const Kernels* kernels_avx512_vnni() { return &avx512_vnni::table; }
}  // namespace native
#endif
