// Instruction sets that kernels are written for by hand, and which of them this processor has.
#pragma once

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastrssm::cpu {

// Each contains the ones before it. The last is kAmx with its tile instructions written out in C++:
// slow, and how the tile kernel is tested on processors without tiles.
enum class Isa : int { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated };

constexpr const char* kIsaNames[] = {"portable",    "avx2", "avx512",
                                     "avx512_bf16", "amx",  "amx_emulated"};

inline Isa isa_named(const std::string& name, const std::string& argument = "isa") {
  for (int i = 0; i < static_cast<int>(std::size(kIsaNames)); ++i) {
    if (name == kIsaNames[i]) return static_cast<Isa>(i);
  }
  throw std::invalid_argument(argument + " is '" + name +
                              "', expected portable, avx2, avx512, avx512_bf16, amx or "
                              "amx_emulated");
}

inline Isa widest_isa() {
#if defined(__x86_64__) && defined(__linux__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kPortable;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512bf16")) return Isa::kAvx512;
  if (!__builtin_cpu_supports("amx-tile") || !__builtin_cpu_supports("amx-bf16")) {
    return Isa::kAvx512Bf16;
  }
  // the kernel keeps no tile registers for a process that has not asked; asking twice is harmless
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? Isa::kAmx : Isa::kAvx512Bf16;
#else
  return Isa::kPortable;
#endif
}

// The emulation packs with bfloat16 instructions.
inline bool has_isa(Isa isa) {
  return (isa == Isa::kAmxEmulated ? Isa::kAvx512Bf16 : isa) <= widest_isa();
}

// What this processor has, or less where the variable FASTRSSM_ISA names less.
inline Isa best_isa() {
  static const Isa best = [] {
    const char* name = std::getenv("FASTRSSM_ISA");
    const Isa wanted = name == nullptr ? Isa::kAmx : isa_named(name, "FASTRSSM_ISA");
    return has_isa(wanted) ? wanted : widest_isa();
  }();
  return best;
}

}  // namespace fastrssm::cpu
