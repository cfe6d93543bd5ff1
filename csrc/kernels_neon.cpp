// kernels.inc for NEON, which every arm64 CPU has.
#include "isa.hpp"
#if defined(NATIVE_ARM64)
#include <arm_neon.h>

#include "kernels_common.hpp"

namespace native {
namespace neon {
#include "vec_neon.inc"
#define ISA_NAME "neon"
#include "kernels.inc"
}  // namespace neon

const Kernels* kernels_neon() { return &neon::table; }

}  // namespace native
#endif
