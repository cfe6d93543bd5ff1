#include "isa.hpp"

#include <stdexcept>

#if defined(NATIVE_X86)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif
#if defined(NATIVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace native {
namespace {

#if defined(NATIVE_X86)

struct Features {
  bool intel = false;
  bool avx2 = false, avx2_vnni = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false, amx = false;
};

void cpuid(int leaf, int sub, unsigned out[4]) {
#if defined(_MSC_VER)
  int values[4];
  __cpuidex(values, leaf, sub);
  for (int i = 0; i < 4; ++i) out[i] = static_cast<unsigned>(values[i]);
#else
  __cpuid_count(leaf, sub, out[0], out[1], out[2], out[3]);
#endif
}

unsigned long long saved_state() {  // which registers the operating system saves
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
#endif
}

// Linux lets a process use the tiles once it has asked, and refuses where their state has no room.
bool may_use_tiles() {
#if defined(NATIVE_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Features detect() {
  Features found;
  unsigned r[4];
  const auto bit = [&](int reg, int position) { return ((r[reg] >> position) & 1u) != 0; };
  cpuid(0, 0, r);
  const unsigned leaves = r[0];
  found.intel = r[1] == 0x756e6547 && r[3] == 0x49656e69 && r[2] == 0x6c65746e;  // "GenuineIntel"
  cpuid(1, 0, r);
  const bool osxsave = bit(2, 27), avx = bit(2, 28), fma = bit(2, 12);
  if (!osxsave || !avx || leaves < 7) return found;
  const auto saved = saved_state();
  if ((saved & 0x6) != 0x6) return found;
  cpuid(7, 0, r);
  found.avx2 = fma && bit(1, 5);
  const bool zmm = (saved & 0xe6) == 0xe6;
  const bool f = bit(1, 16), dq = bit(1, 17), bw = bit(1, 30), vl = bit(1, 31), vnni = bit(2, 11);
  const unsigned sub_leaves = r[0];
  const bool amx_bf16 = bit(3, 22), amx_tile = bit(3, 24), amx_int8 = bit(3, 25);
  found.avx512 = found.avx2 && zmm && f && dq && bw && vl;
  found.avx512_vnni = found.avx512 && vnni;
  if (sub_leaves >= 1) {
    cpuid(7, 1, r);
    found.avx2_vnni = found.avx2 && bit(0, 4);
    found.avx512_bf16 = found.avx512_vnni && bit(0, 5);
    const bool tiles = (saved & 0x60000) == 0x60000 && amx_bf16 && amx_tile && amx_int8;
    found.amx = found.avx512_bf16 && tiles && may_use_tiles();
  }
  return found;
}

#endif

}  // namespace

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = [] {
    std::vector<Isa> list;
#if defined(NATIVE_X86)
    const Features cpu = detect();
#if defined(NATIVE_AMX)
    list.push_back({"amx", cpu.amx, kernels_amx});
#endif
    // Intel's vdpbf16ps takes as long as four of float32's multiply-adds, which widened weights take two of.
    if (!cpu.intel) list.push_back({"avx512_bf16", cpu.avx512_bf16, kernels_avx512_bf16});
    list.push_back({"avx512_vnni", cpu.avx512_vnni, kernels_avx512_vnni});
    if (cpu.intel) list.push_back({"avx512_bf16", cpu.avx512_bf16, kernels_avx512_bf16});
    list.push_back({"avx512", cpu.avx512, kernels_avx512});
#if defined(NATIVE_AVX_VNNI)
    list.push_back({"avx2_vnni", cpu.avx2_vnni, kernels_avx2_vnni});
#endif
    list.push_back({"avx2", cpu.avx2, kernels_avx2});
#elif defined(NATIVE_ARM64)
    list.push_back({"neon", true, kernels_neon});
#endif
    list.push_back({"generic", true, kernels_generic});
    return list;
  }();
  return all;
}

const Isa& choose_isa(const std::string& name) {
  std::string usable;
  for (const Isa& isa : isas()) {
    if (isa.available && (name.empty() || name == isa.name)) return isa;
    if (isa.available) usable += (usable.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw std::invalid_argument("the instruction set '" + name + "' is not available here; this CPU and this build have " +
                              usable);
}

}  // namespace native
