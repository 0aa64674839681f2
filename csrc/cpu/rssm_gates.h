// From the products of the cells to their gates and new states on blocks of rows, and their
// derivatives. Formulas: fastrssm/reference/gru_cell.py.
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

}  // namespace
}  // namespace fastrssm::cpu
