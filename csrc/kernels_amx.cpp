// kernels.inc for AVX-512 with BF16 and VNNI, and tiles (AMX) for the products of bf16, and of int8 of many rows.
#include "isa.hpp"
#if defined(NATIVE_AMX)
#include <immintrin.h>

#include "kernels_common.hpp"

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,avx2,fma")
namespace native {
namespace amx {
#define NATIVE_X86_VECTORS 1
#define HAVE_DOT_BF16 1
#define HAVE_DOT_BYTES 1
#define HAVE_TILES 1
#include "vec_avx512.inc"
#define ISA_NAME "amx"
#include "kernels.inc"
}  // namespace amx
}  // namespace native
TARGET_END

namespace native {
const Kernels* kernels_amx() { return &amx::table; }
}  // namespace native
#endif
