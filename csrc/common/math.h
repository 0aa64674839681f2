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

FASTRSSM_HD double log_of_ratio(double x) { return std::log(x); }

// Of x in [2^-126, 2^126], in half the instructions of log_of. Largest error 1.3 ulp; a NaN gives
// NaN.
FASTRSSM_HD float log_of_ratio(float x) {
#ifdef __CUDA_ARCH__
  return logf(x);
#else
  constexpr std::uint32_t kSqrtHalf = 0x3f3504f3u;  // bits of sqrt(1/2)
  constexpr float kLn2 = 0.693147182f;
  // x = 2^exponent * mantissa with mantissa in [sqrt(1/2), sqrt(2))
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t exponent_bits = (bits - kSqrtHalf) & 0xff800000u;
  const float exponent_2p23 = static_cast<float>(static_cast<std::int32_t>(exponent_bits));
  bits = 0x3f800000u - exponent_bits;
  float inverse_power;
  std::memcpy(&inverse_power, &bits, sizeof inverse_power);
  // log(1 + f) = f + f^2 (f odd(f^2) + even(f^2)), of minimal relative error 3e-8; in two parts,
  // which do not wait for each other
  const float f = x * inverse_power - 1.0f;
  const float square = f * f;
  float odd = 0.0870043933f, even = -0.142674893f;
  odd = odd * square + 0.149147674f;
  even = even * square + -0.16577585f;
  odd = odd * square + 0.199630648f;
  even = even * square + -0.250013381f;
  odd = odd * square + 0.333339095f;
  even = even * square + -0.5f;
  return exponent_2p23 * (kLn2 * 0x1p-23f) + ((odd * f + even) * square + f);
#endif
}

FASTRSSM_HD double exp_of(double x) { return std::exp(x); }
FASTRSSM_HD double expm1_of(double x) { return std::expm1(x); }
FASTRSSM_HD double tanh_of(double x) { return std::tanh(x); }

#ifndef __CUDA_ARCH__
struct Exponential {
  float power;    // 2^n
  float minus_1;  // exp(r) - 1, where x = n ln 2 + r and |r| <= ln 2 / 2
};

// Of use for x in [-87, 88.3]; a NaN gives NaN.
inline Exponential exponential_of(float x) {
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * kLog2E + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * kLn2High) - n * kLn2Low;
  // exp(r) = 1 + r + r^2 q(r)
  float q = 1.98756912e-4f;
  q = q * r + 1.39819994e-3f;
  q = q * r + 8.33345205e-3f;
  q = q * r + 4.16657962e-2f;
  q = q * r + 1.66666654e-1f;
  q = q * r + 5.00000012e-1f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000u;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return {power, r + r * r * q};
}
#endif

// As log_of free of branches and calls. Largest error 1 ulp; infinite from 88.3 on, and zero below
// -87, where the result would be subnormal.
FASTRSSM_HD float exp_of(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const auto [power, minus_1] = exponential_of(x);
  const float finite = x < -87.0f ? 0.0f : power + power * minus_1;
  return x > 88.3f ? kInfinity : finite;
#endif
}

FASTRSSM_HD double exp_of_difference(double x) { return std::exp(x); }

// exp of a difference x <= 0 of rounded numbers, about as exact as such a difference is, in two
// thirds of the instructions of exp_of. Largest error 2 ulp for x >= -1; below, x rounded to its
// nearest float may be off by as much as this is. Zero below -87; a NaN gives NaN.
FASTRSSM_HD float exp_of_difference(float x) {
#ifdef __CUDA_ARCH__
  return expf(x);
#else
  constexpr float kLog2E = 1.44269504f;
  constexpr float kLn2 = 0.693147182f;
  // 1.5 * 2^23: adding it rounds to an integer; and the bias of an exponent
  constexpr float kRound = 12582912.0f + 127.0f;
  const float shifted = x * kLog2E + kRound;
  const float r = x - (shifted - kRound) * kLn2;
  // exp(r) of minimal relative error 9e-8 for |r| <= ln 2 / 2
  float p = 8.29030667e-3f;
  p = p * r + 4.18979749e-2f;
  p = p * r + 1.66676372e-1f;
  p = p * r + 4.99991506e-1f;
  p = p * r + 9.99999702e-1f;
  p = p * r + 1.0f;
  std::uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : power * p;
#endif
}

// exp(x) - 1, exact in the relative sense near 0 too. Largest error 2 ulp; range as exp_of.
FASTRSSM_HD float expm1_of(float x) {
#ifdef __CUDA_ARCH__
  return expm1f(x);
#else
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const float low = x > -87.0f ? x : -87.0f;
  const auto [power, minus_1] = exponential_of(low < 88.3f ? low : 88.3f);
  const float found = x > 88.3f ? kInfinity : (power - 1.0f) + power * minus_1;
  return x == x ? found : x;
#endif
}

// Largest error 3 ulp.
FASTRSSM_HD float tanh_of(float x) {
#ifdef __CUDA_ARCH__
  return tanhf(x);
#else
  // beyond 9.1 it is 1 to the last bit
  const float size = x < 0.0f ? -x : x;
  const float e = expm1_of(2.0f * (size < 9.1f ? size : 9.1f));
  const float found = e / (e + 2.0f);
  return x == x ? (x < 0.0f ? -found : found) : x;
#endif
}

template <typename T>
FASTRSSM_HD T sigmoid_of(T x) {
  return T(1) / (T(1) + exp_of(-x));
}

// log(1 + exp(x)), exact in the relative sense where it is small.
template <typename T>
FASTRSSM_HD T softplus_of(T x) {
  const T u = exp_of(x < T(0) ? x : -x);
  // log(1 + u) = log(w) u / (w - 1) for the rounded w = 1 + u
  const T w = T(1) + u;
  const T d = w - T(1);
  const T log1p = d == T(0) ? u : log_of(w) * (u / (d == T(0) ? T(1) : d));
  return (x > T(0) ? x : T(0)) + log1p;
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
