// kernels.inc for AVX2 and FMA with AVX-VNNI for the products of bytes.
#include "isa.hpp"
#if defined(NATIVE_AVX_VNNI)
#include <immintrin.h>

#include "kernels_common.hpp"

TARGET_BEGIN("avx2,fma,avxvnni")
namespace native {
namespace avx2_vnni {
#define NATIVE_X86_VECTORS 1
#define HAVE_DOT_BYTES 1
#include "vec_avx2.inc"
#define ISA_NAME "avx2_vnni"
#include "kernels.inc"
}  // namespace avx2_vnni
}  // namespace native
TARGET_END

namespace native {
const Kernels* kernels_avx2_vnni() { return &avx2_vnni::table; }
}  // namespace native
#endif
