// Number types of the kernels: what is stored, and what it is computed in.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FASTRSSM_HD __host__ __device__ inline
#else
// inlined into the loop that calls it, or that loop is not vectorised
#define FASTRSSM_HD [[gnu::always_inline]] inline
#endif

namespace fastrssm {

// The upper half of a float32.
struct BFloat16 {
  std::uint16_t bits;
};

// The stored type, where it is chosen at run time.
enum Stored : int { kFloat32, kBFloat16 };

template <typename T>
struct Compute {
  using type = T;
};
template <>
struct Compute<BFloat16> {
  using type = float;
};

// What a stored T is computed, summed and reported in: float for bfloat16, else T itself.
template <typename T>
using ComputeOf = typename Compute<T>::type;

FASTRSSM_HD float widen(float x) { return x; }
FASTRSSM_HD double widen(double x) { return x; }
FASTRSSM_HD float widen(BFloat16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

FASTRSSM_HD void narrow(float value, float* out) { *out = value; }
FASTRSSM_HD void narrow(double value, double* out) { *out = value; }
// Rounds to nearest, ties to even; a NaN stays a NaN.
FASTRSSM_HD void narrow(float value, BFloat16* out) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out->bits = static_cast<std::uint16_t>(value == value ? rounded : 0x7fc0u);
}

}  // namespace fastrssm
