// What makes a step of products: gates of the cells and draws of latent and action on blocks of
// rows, and their derivatives. Formulas: fastrssm/reference/{gru_cell,rssm_step}.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/math.h"
#include "cpu/rssm_scan.h"
#include "cpu/simd.h"

namespace fastrssm::cpu {
namespace {

// c: [r | z | xn | hn] [M, 4D] without biases -> gates [r | z | n | hn] and the new state
template <typename T>
FASTRSSM_CLONES void torch_gru(const T* c, const T* input_bias, const T* state_bias, const T* h,
                               T* gates, T* deter, Size M, Size D) {
  for (Size m = 0; m < M; ++m) {
    const T *x = c + 4 * m * D, *before = h + m * D;
    T *save = gates + 4 * m * D, *to = deter + m * D;
#pragma omp simd
    for (Size d = 0; d < D; ++d) {
      const T r = sigmoid_of(x[d] + input_bias[d] + state_bias[d]);
      const T z = sigmoid_of(x[D + d] + input_bias[D + d] + state_bias[D + d]);
      const T hn = x[3 * D + d] + state_bias[2 * D + d];
      const T n = tanh_of(x[2 * D + d] + input_bias[2 * D + d] + r * hn);
      save[d] = r;
      save[D + d] = z;
      save[2 * D + d] = n;
      save[3 * D + d] = hn;
      to[d] = n + z * (before[d] - n);
    }
  }
}

// dgates: [dr | dz | dxn | dhn]; dh: the part of the gradient that passes the cell by
template <typename T>
FASTRSSM_CLONES void torch_gru_backward(const T* grad, const T* gates, const T* h, T* dgates, T* dh,
                                        Size M, Size D) {
  for (Size m = 0; m < M; ++m) {
    const T *g = grad + m * D, *save = gates + 4 * m * D, *before = h + m * D;
    T *to = dgates + 4 * m * D, *past = dh + m * D;
#pragma omp simd
    for (Size d = 0; d < D; ++d) {
      const T r = save[d], z = save[D + d], n = save[2 * D + d], hn = save[3 * D + d];
      const T dn = g[d] * (T(1) - z) * (T(1) - n * n);
      to[d] = dn * hn * r * (T(1) - r);
      to[D + d] = g[d] * (before[d] - n) * z * (T(1) - z);
      to[2 * D + d] = dn;
      to[3 * D + d] = dn * r;
      past[d] = g[d] * z;
    }
  }
}

// The order of the gates and what the update gate does differ: z, r, o and new = n + z (h - n), or
// r, c, u and new = h + u' (n - h) with u' = sigmoid(u - 1).
struct LnGruOrder {
  Size reset, candidate, update;
  bool keeps;  // the update gate is the share of the old state
  double update_shift;
};
inline LnGruOrder ln_gru_order(Cell cell) {
  if (cell == Cell::kLnGruA) return {1, 2, 0, true, 0.0};
  return {0, 1, 2, false, -1.0};
}

template <typename T, bool kScaled>
[[gnu::always_inline]] inline T gate_of(const T* x, const T* scale, const T* shift, Size i) {
  if constexpr (kScaled) return x[i] * scale[i] + shift[i];
  return x[i] + shift[i];
}

// One row of a block: x [3, own] -> the part of gates [4, D] and of the new state
template <typename T, bool kScaled>
[[gnu::always_inline]] inline void ln_gru_row(const T* x, const T* scale, const T* shift,
                                              const T* before, T* save, T* to, Size own, Size D,
                                              LnGruOrder order) {
  const Size at_r = order.reset * own, at_c = order.candidate * own, at_u = order.update * own;
  const T update_shift = static_cast<T>(order.update_shift);
  const T sign = order.keeps ? T(1) : T(-1);  // 1 - sigmoid(u) = sigmoid(-u)
#pragma omp simd
  for (Size d = 0; d < own; ++d) {
    const T r = sigmoid_of(gate_of<T, kScaled>(x, scale, shift, at_r + d));
    const T c = gate_of<T, kScaled>(x, scale, shift, at_c + d);
    const T u = gate_of<T, kScaled>(x, scale, shift, at_u + d);
    const T z = sigmoid_of(sign * (u + update_shift));
    const T n = tanh_of(r * c);
    save[d] = r;
    save[D + d] = z;
    save[2 * D + d] = n;
    save[3 * D + d] = c;
    to[d] = n + z * (before[d] - n);
  }
}

// x: [M, blocks, 3, D / blocks], normalised, or without bias: then shift is that, scale null
// -> gates [r | z | n | c] [M, 4D], z the share of the old state
template <typename T>
FASTRSSM_CLONES void ln_gru(const T* x, const T* scale, const T* shift, const T* h, T* gates,
                            T* deter, Size M, Size D, Size blocks, LnGruOrder order) {
  const Size own = D / blocks;
  for (Size m = 0; m < M; ++m) {
    for (Size first = 0; first < D; first += own) {
      const T *from = x + 3 * (m * D + first), *before = h + m * D + first;
      T *save = gates + 4 * m * D + first, *to = deter + m * D + first;
      const T* add = shift + 3 * first;
      if (scale) {
        ln_gru_row<T, true>(from, scale + 3 * first, add, before, save, to, own, D, order);
      } else {
        ln_gru_row<T, false>(from, nullptr, add, before, save, to, own, D, order);
      }
    }
  }
}

// da: [M, blocks, 3, D / blocks] in the cell's own order of gates
template <typename T>
FASTRSSM_CLONES void ln_gru_backward(const T* grad, const T* gates, const T* h, T* da, T* dh,
                                     Size M, Size D, Size blocks, LnGruOrder order) {
  const Size own = D / blocks;
  const T sign = order.keeps ? T(1) : T(-1);
  for (Size i = 0; i < M * blocks; ++i) {
    const Size m = i / blocks, first = i % blocks * own;
    const T *g = grad + m * D + first, *before = h + m * D + first;
    const T* save = gates + 4 * m * D + first;
    T *to = da + 3 * (m * D + first), *past = dh + m * D + first;
    T *dr = to + order.reset * own, *dc = to + order.candidate * own, *du = to + order.update * own;
#pragma omp simd
    for (Size d = 0; d < own; ++d) {
      const T r = save[d], z = save[D + d], n = save[2 * D + d], c = save[3 * D + d];
      const T dn = g[d] * (T(1) - z) * (T(1) - n * n);
      dr[d] = dn * c * r * (T(1) - r);
      dc[d] = dn * r;
      du[d] = sign * g[d] * (before[d] - n) * z * (T(1) - z);
      past[d] = g[d] * z;
    }
  }
}

// c: [mean | raw] [M, 2S] without biases -> mean, std and the draw; raw is kept
template <typename T>
FASTRSSM_CLONES void gaussian(const T* c, const T* mean_bias, const T* raw_bias, const T* noise,
                              T min_std, bool split, T* mean, T* std, T* raw, T* stoch, Size M,
                              Size S) {
  for (Size m = 0; m < M; ++m) {
    const T *x = c + 2 * m * S, *eps = noise + m * S;
    T *to_mean = mean + m * S, *to_std = std + m * S, *to_raw = raw + m * S, *to = stoch + m * S;
    if (split) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) {
        to_mean[s] = x[s] + mean_bias[s];
        to_raw[s] = x[S + s] + raw_bias[s];
        to_std[s] = softplus_of(to_raw[s]) + min_std;
        to[s] = to_mean[s] + to_std[s] * eps[s];
      }
    } else {
#pragma omp simd
      for (Size s = 0; s < S; ++s) {
        to_mean[s] = x[s] + mean_bias[s];
        to_raw[s] = x[S + s] + raw_bias[s];
        to_std[s] = T(2) * sigmoid_of(T(0.5) * to_raw[s]) + min_std;
        to[s] = to_mean[s] + to_std[s] * eps[s];
      }
    }
  }
}

// d: [dmean | draw] [M, 2S] from the gradient of the draw and those of mean and std, if any
template <typename T>
FASTRSSM_CLONES void gaussian_backward(const T* grad, const T* mean_grad, const T* std_grad,
                                       const T* noise, const T* raw, bool split, T* d, Size M,
                                       Size S) {
  for (Size m = 0; m < M; ++m) {
    const T *g = grad + m * S, *eps = noise + m * S, *x = raw + m * S;
    T *dmean = d + 2 * m * S, *draw = dmean + S;
#pragma omp simd
    for (Size s = 0; s < S; ++s) {
      dmean[s] = g[s];
      draw[s] = g[s] * eps[s];
    }
    if (mean_grad) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) dmean[s] += mean_grad[m * S + s];
    }
    if (std_grad) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) draw[s] += std_grad[m * S + s];
    }
    if (split) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) draw[s] *= sigmoid_of(x[s]);
    } else {
#pragma omp simd
      for (Size s = 0; s < S; ++s) {
        const T half = sigmoid_of(T(0.5) * x[s]);
        draw[s] *= half * (T(1) - half);
      }
    }
  }
}

// probabilities of one group, uniform share included
template <typename T>
[[gnu::always_inline]] inline void softmax(const T* logits, T unimix, T* probs, Size K) {
  T top = logits[0], sum = 0;
  for (Size k = 1; k < K; ++k) top = logits[k] > top ? logits[k] : top;
#pragma omp simd reduction(+ : sum)
  for (Size k = 0; k < K; ++k) {
    probs[k] = exp_of(logits[k] - top);
    sum += probs[k];
  }
  const T scale = (T(1) - unimix) / sum, floor = unimix / static_cast<T>(K);
#pragma omp simd
  for (Size k = 0; k < K; ++k) probs[k] = probs[k] * scale + floor;
}

// c: logits [M, S] without bias -> logits and a one-hot draw by the inverse of the distribution
template <typename T>
FASTRSSM_CLONES void categorical(const T* c, const T* bias, const T* noise, T unimix, T* logits,
                                 T* stoch, T* probs, Size M, Size S, Size groups) {
  const Size K = S / groups;
  for (Size m = 0; m < M; ++m) {
    const T* x = c + m * S;
    T *to_logits = logits + m * S, *to = stoch + m * S;
#pragma omp simd
    for (Size s = 0; s < S; ++s) to_logits[s] = x[s] + bias[s];
    for (Size g = 0; g < groups; ++g) {
      softmax(to_logits + g * K, unimix, probs, K);
      T total = 0;
      Size index = 0;
      for (Size k = 0; k < K; ++k) {
        total += probs[k];
        index += total <= noise[m * groups + g];
      }
      index = index < K ? index : K - 1;
      // no class is drawn where a probability is NaN
      const T none = total - total;
      for (Size k = 0; k < K; ++k) to[g * K + k] = (k == index ? T(1) : T(0)) + none;
    }
  }
}

// d: gradient of the logits [M, S], straight through the draw, plus their own if any
template <typename T>
FASTRSSM_CLONES void categorical_backward(const T* grad, const T* logits_grad, const T* logits,
                                          T unimix, T* d, T* probs, Size M, Size S, Size groups) {
  const Size K = S / groups;
  for (Size m = 0; m < M; ++m) {
    for (Size g = 0; g < groups; ++g) {
      const Size at = m * S + g * K;
      softmax(logits + at, T(0), probs, K);
      T dot = 0;
#pragma omp simd reduction(+ : dot)
      for (Size k = 0; k < K; ++k) dot += probs[k] * grad[at + k];
#pragma omp simd
      for (Size k = 0; k < K; ++k) d[at + k] = (T(1) - unimix) * probs[k] * (grad[at + k] - dot);
    }
    if (logits_grad) {
#pragma omp simd
      for (Size s = 0; s < S; ++s) d[m * S + s] += logits_grad[m * S + s];
    }
  }
}

// c: [mean | raw] [M, 2A] without biases -> a = tanh(mean + std noise), written with row distance
// ld
template <typename T>
FASTRSSM_CLONES void act(const T* c, const T* mean_bias, const T* raw_bias, const T* noise,
                         T min_std, T* raw, T* action, T* action_in, Size ld_in, Size M, Size A) {
  for (Size m = 0; m < M; ++m) {
    const T* x = c + 2 * m * A;
    for (Size a = 0; a < A; ++a) {
      const T r = x[A + a] + raw_bias[a];
      const T std = softplus_of(r) + min_std;
      raw[m * A + a] = r;
      action[m * A + a] = tanh_of(x[a] + mean_bias[a] + std * noise[m * A + a]);
      action_in[m * ld_in + a] = action[m * A + a];
    }
  }
}

// actions [M, A] beyond -1 and 1 come down to them; their factors have no gradient
template <typename T>
FASTRSSM_CLONES void bound_actions(const T* action, T* to, Size ld, Size M, Size A) {
  for (Size m = 0; m < M; ++m) {
    for (Size a = 0; a < A; ++a) {
      const T x = action[m * A + a], size = std::abs(x);
      to[m * ld + a] = size > T(1) ? x / size : x;
    }
  }
}
template <typename T>
FASTRSSM_CLONES void bound_actions_backward(const T* action, T* grad, Size ld, Size M, Size A) {
  for (Size m = 0; m < M; ++m) {
    for (Size a = 0; a < A; ++a) {
      const T size = std::abs(action[m * A + a]);
      if (size > T(1)) grad[m * ld + a] /= size;
    }
  }
}

// d: [dmean | draw] [M, 2A]
template <typename T>
FASTRSSM_CLONES void act_backward(const T* grad, Size ld_grad, const T* action_grad,
                                  const T* action, const T* noise, const T* raw, T* d, Size M,
                                  Size A) {
  for (Size m = 0; m < M; ++m) {
    for (Size a = 0; a < A; ++a) {
      const T y = action[m * A + a];
      const T g = grad[m * ld_grad + a] + (action_grad ? action_grad[m * A + a] : T(0));
      const T before = g * (T(1) - y * y);
      d[2 * m * A + a] = before;
      d[2 * m * A + A + a] = before * noise[m * A + a] * sigmoid_of(raw[m * A + a]);
    }
  }
}

}  // namespace
}  // namespace fastrssm::cpu
