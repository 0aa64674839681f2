// Sums, activations and norms of a scan on blocks of rows, and their derivatives. Row-major;
// `ld...` is a distance between rows. Formulas: fastrssm/reference/rssm_step.py.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/math.h"
#include "cpu/rssm_scan.h"
#include "cpu/simd.h"

namespace fastrssm::cpu {
namespace {

// to [M, N] += from [M, N]
template <typename T>
FASTRSSM_CLONES void add_to(T* to, Size ld_to, const T* from, Size ld_from, Size M, Size N) {
  for (Size m = 0; m < M; ++m) {
    T* sum = to + m * ld_to;
    const T* add = from + m * ld_from;
#pragma omp simd
    for (Size n = 0; n < N; ++n) sum[n] += add[n];
  }
}

// to[n] += sum over rows of dy[., n], or of dy[., n] x[., n]; a few rows are summed at a time, so
// that the error grows slowly with their number
template <typename T>
FASTRSSM_CLONES void add_column_sums(const T* dy, const T* x, Size ld, Size R, Size N, T* to) {
  constexpr Size kColumns = 64, kRows = 16;
  for (Size first = 0; first < N; first += kColumns) {
    const Size width = N - first < kColumns ? N - first : kColumns;
    T total[kColumns] = {};
    for (Size begin = 0; begin < R; begin += kRows) {
      const Size end = R - begin < kRows ? R : begin + kRows;
      T some[kColumns] = {};
      for (Size r = begin; r < end; ++r) {
        const T* from = dy + r * ld + first;
        if (x) {
          const T* factor = x + r * ld + first;
#pragma omp simd
          for (Size i = 0; i < width; ++i) some[i] += from[i] * factor[i];
        } else {
#pragma omp simd
          for (Size i = 0; i < width; ++i) some[i] += from[i];
        }
      }
      for (Size i = 0; i < kColumns; ++i) total[i] += some[i];
    }
    for (Size i = 0; i < width; ++i) to[first + i] += total[i];
  }
}

// y = elu(c + offset); offset has its own row distance, 0 for a bias
template <typename T>
FASTRSSM_CLONES void add_elu(const T* c, Size ldc, const T* offset, Size ld_offset, T* y, Size M,
                             Size N) {
  for (Size m = 0; m < M; ++m) {
    const T *from = c + m * ldc, *add = offset + m * ld_offset;
    T* to = y + m * N;
#pragma omp simd
    for (Size n = 0; n < N; ++n) {
      const T x = from[n] + add[n];
      const T negative = expm1_of(x);
      to[n] = x > T(0) ? x : negative;
    }
  }
}

// dx = dy elu'(x), from y = elu(x)
template <typename T>
FASTRSSM_CLONES void elu_backward(const T* dy, Size ldy, const T* y, T* dx, Size M, Size N) {
  for (Size m = 0; m < M; ++m) {
    const T *from = dy + m * ldy, *out = y + m * N;
    T* to = dx + m * N;
#pragma omp simd
    for (Size n = 0; n < N; ++n) {
      const T slope = out[n] > T(0) ? T(1) : out[n] + T(1);
      to[n] = from[n] * slope;
    }
  }
}

// c += offset; hat = (c - mean) rstd
template <typename T>
FASTRSSM_CLONES void add_normalise(T* c, Size ldc, const T* offset, Size ld_offset, Norm norm,
                                   T* hat, T* rstd, Size M, Size N) {
  for (Size m = 0; m < M; ++m) {
    T* x = c + m * ldc;
    const T* add = offset + m * ld_offset;
    T* to = hat + m * N;
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (Size n = 0; n < N; ++n) {
      x[n] += add[n];
      sum += x[n];
    }
    const T mean = norm.centred ? sum / static_cast<T>(N) : T(0);
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (Size n = 0; n < N; ++n) squares += (x[n] - mean) * (x[n] - mean);
    const T scale = T(1) / std::sqrt(squares / static_cast<T>(N) + static_cast<T>(norm.eps));
    rstd[m] = scale;
#pragma omp simd
    for (Size n = 0; n < N; ++n) to[n] = (x[n] - mean) * scale;
  }
}

// y = silu(hat scale + shift); null shift: zero
template <typename T, bool kShifted>
[[gnu::always_inline]] inline void affine_silu_rows(const T* hat, const T* scale, const T* shift,
                                                    T* y, Size ldy, Size M, Size N) {
  for (Size m = 0; m < M; ++m) {
    const T* from = hat + m * N;
    T* to = y + m * ldy;
#pragma omp simd
    for (Size n = 0; n < N; ++n) {
      T a = from[n] * scale[n];
      if constexpr (kShifted) a += shift[n];
      to[n] = a * sigmoid_of(a);
    }
  }
}
template <typename T>
FASTRSSM_CLONES void affine_silu(const T* hat, const T* scale, const T* shift, T* y, Size ldy,
                                 Size M, Size N) {
  if (shift) {
    affine_silu_rows<T, true>(hat, scale, shift, y, ldy, M, N);
  } else {
    affine_silu_rows<T, false>(hat, scale, shift, y, ldy, M, N);
  }
}

// da = dy silu'(a), a = hat scale + shift; null shift: zero
template <typename T, bool kShifted>
[[gnu::always_inline]] inline void silu_backward_rows(const T* dy, Size ldy, const T* hat,
                                                      const T* scale, const T* shift, T* da, Size M,
                                                      Size N) {
  for (Size m = 0; m < M; ++m) {
    const T *from = dy + m * ldy, *x = hat + m * N;
    T* to = da + m * N;
#pragma omp simd
    for (Size n = 0; n < N; ++n) {
      T a = x[n] * scale[n];
      if constexpr (kShifted) a += shift[n];
      const T s = sigmoid_of(a);
      to[n] = from[n] * s * (T(1) + a * (T(1) - s));
    }
  }
}
template <typename T>
FASTRSSM_CLONES void silu_backward(const T* dy, Size ldy, const T* hat, const T* scale,
                                   const T* shift, T* da, Size M, Size N) {
  if (shift) {
    silu_backward_rows<T, true>(dy, ldy, hat, scale, shift, da, M, N);
  } else {
    silu_backward_rows<T, false>(dy, ldy, hat, scale, shift, da, M, N);
  }
}

// dx of hat = normalise(x), a = hat scale + shift, from da
template <typename T>
FASTRSSM_CLONES void normalise_backward(const T* da, const T* hat, const T* scale, const T* rstd,
                                        Norm norm, T* dx, Size M, Size N) {
  for (Size m = 0; m < M; ++m) {
    const T *from = da + m * N, *x = hat + m * N;
    T* to = dx + m * N;
    T sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (Size n = 0; n < N; ++n) {
      const T d = from[n] * scale[n];
      sum += d;
      dot += d * x[n];
    }
    sum = norm.centred ? sum / static_cast<T>(N) : T(0);
    dot /= static_cast<T>(N);
    const T r = rstd[m];
#pragma omp simd
    for (Size n = 0; n < N; ++n) to[n] = (from[n] * scale[n] - sum - x[n] * dot) * r;
  }
}

}  // namespace
}  // namespace fastrssm::cpu
