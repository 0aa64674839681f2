// The scalar formulas, written once for CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/number.h"

namespace fastrssm {

FASTRSSM_HD double log_of(double x) { return std::log(x); }

// Natural logarithm, free of branches and calls so that the compiler vectorises it without
// -ffast-math. Largest error 0.86 ulp, over all positive floats. Zero, negative, infinite and NaN
// arguments give what std::log gives.
FASTRSSM_HD float log_of(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  constexpr float kSmallestNormal = std::numeric_limits<float>::min();
  constexpr std::uint32_t kSqrtHalf = 0x3f3504f3u;  // bits of sqrt(1/2)
  // ln 2 in two parts: the first has trailing zeros, so its product with an exponent is exact
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;

  // x = 2^exponent * mantissa with mantissa in [sqrt(1/2), sqrt(2))
  const bool subnormal = x < kSmallestNormal;
  const float normal = x * (subnormal ? 0x1p23f : 1.0f);
  std::uint32_t bits;
  std::memcpy(&bits, &normal, sizeof bits);
  const std::int32_t exponent = static_cast<std::int32_t>(bits - kSqrtHalf) >> 23;
  bits -= static_cast<std::uint32_t>(exponent) << 23;
  float mantissa;
  std::memcpy(&mantissa, &bits, sizeof mantissa);
  const float e = static_cast<float>(exponent) - (subnormal ? 23.0f : 0.0f);

  // log(1 + f) = f - f^2/2 + f^3 p(f), p of minimal relative error 6e-9
  const float f = mantissa - 1.0f;
  float p = -0.0763449669f;
  p = p * f + 0.127615765f;
  p = p * f + -0.131601825f;
  p = p * f + 0.142017573f;
  p = p * f + -0.166233569f;
  p = p * f + 0.200012267f;
  p = p * f + -0.250008196f;
  p = p * f + 0.333333313f;
  const float square = f * f;
  const float tail = square * f * p + e * kLn2Low - 0.5f * square;
  const float log_x = e * kLn2High + (f + tail);

  const float at_most_zero = x == 0.0f ? -kInfinity : std::numeric_limits<float>::quiet_NaN();
  const float finite = x > 0.0f ? log_x : at_most_zero;
  return x < kInfinity ? finite : x;
#endif
}

// KL(N(pm, ps) || N(qm, qs)) of one dimension. The logarithm is of the ratio, not of its square,
// which would underflow at 1e-23 in float32.
template <typename T>
FASTRSSM_HD T gaussian_kl_term(T pm, T ps, T qm, T qs) {
  const T inverse = T(1) / qs;
  const T ratio = ps * inverse;
  const T shift = (pm - qm) * inverse;
  return T(0.5) * (ratio * ratio + shift * shift - T(1)) - log_of(ratio);
}

template <typename T>
struct GaussianKLGradient {
  T pm, ps, qm, qs;
};

// Derivatives of gaussian_kl_term.
template <typename T>
FASTRSSM_HD GaussianKLGradient<T> gaussian_kl_term_gradient(T pm, T ps, T qm, T qs) {
  const T inverse = T(1) / qs;
  const T ratio = ps * inverse;
  const T shift = (pm - qm) * inverse;
  const T mean = shift * inverse;
  return {mean, ratio * inverse - T(1) / ps, -mean,
          (T(1) - ratio * ratio - shift * shift) * inverse};
}

// A row below the free nats has no gradient; without free nats every row has one, also one whose
// KL was rounded below zero.
template <typename T>
FASTRSSM_HD bool is_free(T kl, T free_nats) {
  return free_nats > T(0) && kl < free_nats;
}

}  // namespace fastrssm
