// kernels.inc for any CPU.
#include "kernels_common.hpp"

namespace native {
namespace generic {
#include "vec_generic.inc"
#define ISA_NAME "generic"
#include "kernels.inc"
}  // namespace generic

const Kernels* kernels_generic() { return &generic::table; }

}  // namespace native
