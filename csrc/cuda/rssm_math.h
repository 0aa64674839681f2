// Gates, activations and draws of the cluster scan, and their derivatives, for device and host.
// Formulas: fastrssm/reference/rssm_step.py. On the device sigmoid and tanh take the fast
// exponential: its error, 2 ulp of float32, is far below that of bfloat16 operands.
#pragma once

#include "common/math.h"

namespace fastrssm::cluster {

FASTRSSM_HD float quick_sigmoid(float x) {
#ifdef __CUDA_ARCH__
  return __fdividef(1.0f, 1.0f + __expf(-x));
#else
  return sigmoid_of(x);
#endif
}

FASTRSSM_HD float quick_tanh(float x) {
#ifdef __CUDA_ARCH__
  // exp(2x) of a large x is infinite, and the quotient 0
  return 1.0f - 2.0f / (__expf(2.0f * x) + 1.0f);
#else
  return tanh_of(x);
#endif
}

FASTRSSM_HD float quick_exp(float x) {
#ifdef __CUDA_ARCH__
  return __expf(x);
#else
  return std::exp(x);
#endif
}

FASTRSSM_HD float square_root_of(float x) {
#ifdef __CUDA_ARCH__
  return sqrtf(x);
#else
  return std::sqrt(x);
#endif
}

FASTRSSM_HD float elu(float x) { return x > 0.0f ? x : expm1_of(x); }
// The derivative, from the result.
FASTRSSM_HD float elu_slope(float y) { return y > 0.0f ? 1.0f : y + 1.0f; }

FASTRSSM_HD float silu(float a) { return a * quick_sigmoid(a); }
FASTRSSM_HD float silu_slope(float a) {
  const float s = quick_sigmoid(a);
  return s * (1.0f + a * (1.0f - s));
}

// What a step of torch's GRU keeps, and the new state.
struct Gates {
  float r, z, n, hn, h;
};
// Sums include the biases.
FASTRSSM_HD Gates cell_forward(float r_sum, float z_sum, float xn, float hn, float before) {
  Gates g;
  g.r = quick_sigmoid(r_sum);
  g.z = quick_sigmoid(z_sum);
  g.hn = hn;
  g.n = quick_tanh(xn + g.r * hn);
  g.h = g.n + g.z * (before - g.n);
  return g;
}

// Gradients of the sums, and the part of that of the old state that passes the cell by.
struct GateGrads {
  float r, z, xn, hn, before;
};
FASTRSSM_HD GateGrads cell_backward(float grad, float r, float z, float n, float hn, float before) {
  GateGrads d;
  d.xn = grad * (1.0f - z) * (1.0f - n * n);
  d.r = d.xn * hn * r * (1.0f - r);
  d.z = grad * (before - n) * z * (1.0f - z);
  d.hn = d.xn * r;
  d.before = grad * z;
  return d;
}

// The same of block_gru: z is the share of the new value, hn the sum of that.
FASTRSSM_HD Gates block_forward(float r_sum, float c_sum, float share, float before) {
  Gates g;
  g.r = quick_sigmoid(r_sum);
  g.z = quick_sigmoid(share);
  g.hn = c_sum;
  g.n = quick_tanh(g.r * c_sum);
  g.h = before + g.z * (g.n - before);
  return g;
}
// hn: of c_sum.
FASTRSSM_HD GateGrads block_backward(float grad, float r, float z, float n, float hn,
                                     float before) {
  GateGrads d;
  d.xn = grad * z * (1.0f - n * n);
  d.r = d.xn * hn * r * (1.0f - r);
  d.z = grad * (n - before) * z * (1.0f - z);
  d.hn = d.xn * r;
  d.before = grad * (1.0f - z);
  return d;
}

// Cells whose gates have a norm: ln_gru_a, where the share of the old state stands first, as [u, r,
// c], and ln_gru_d as [r, c, u]. y: the gates behind their norm.
FASTRSSM_HD Gates norm_forward(const float* y, bool update_first, float before) {
  return update_first ? block_forward(y[1], y[2], -y[0], before)
                      : block_forward(y[0], y[1], y[2] - 1.0f, before);
}
// Gradients of y; returns that of the old state.
FASTRSSM_HD float norm_backward(float grad, const float* y, bool update_first, float before,
                                float* dy) {
  const Gates g = norm_forward(y, update_first, before);
  const GateGrads d = block_backward(grad, g.r, g.z, g.n, g.hn, before);
  dy[0] = update_first ? -d.z : d.r;
  dy[1] = update_first ? d.r : d.hn;
  dy[2] = update_first ? d.hn : d.z;
  return d.before;
}

// By which an action is divided: beyond its bounds it counts as one on them.
FASTRSSM_HD float bound_of(float action) {
  return action > 1.0f ? action : action < -1.0f ? -action : 1.0f;
}

// The standard deviation of split and of joint heads, and its derivative.
FASTRSSM_HD float std_of(float raw, bool split, float min_std) {
  return (split ? softplus_of(raw) : 2.0f * quick_sigmoid(0.5f * raw)) + min_std;
}
FASTRSSM_HD float std_slope(float raw, bool split) {
  if (split) return quick_sigmoid(raw);
  const float half = quick_sigmoid(0.5f * raw);
  return half * (1.0f - half);
}

// The largest of n numbers, and the sum of their exponentials below it.
struct Softmax {
  float top, total;
};
FASTRSSM_HD Softmax softmax_of(const float* x, int n) {
  Softmax sums = {x[0], 0.0f};
  for (int k = 1; k < n; ++k) sums.top = x[k] > sums.top ? x[k] : sums.top;
  for (int k = 0; k < n; ++k) sums.total += quick_exp(x[k] - sums.top);
  return sums;
}

FASTRSSM_HD std::uint32_t bfloat16_bits(float x) {
  BFloat16 rounded;
  narrow(x, &rounded);
  return rounded.bits;
}
FASTRSSM_HD std::uint32_t bfloat16_pair(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}

}  // namespace fastrssm::cluster
