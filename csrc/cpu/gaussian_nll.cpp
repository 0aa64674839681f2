#include <algorithm>
#include <cstdint>

#include "common/math.h"
#include "common/number.h"
#include "cpu/ops.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace fastrssm::cpu {
namespace {

// Without std, which is null then, it is 1.
template <typename T>
FASTRSSM_CLONES void terms_of(const T* target, const T* mean, const T* std, ComputeOf<T>* terms,
                              std::int64_t count, ComputeOf<T> constant) {
  using A = ComputeOf<T>;
  if (std == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const A z = widen(target[i]) - widen(mean[i]);
      terms[i] = A(0.5) * z * z + constant;
    }
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const A s = widen(std[i]), z = (widen(target[i]) - widen(mean[i])) / s;
      terms[i] = A(0.5) * z * z + (log_of(s) + constant);
    }
  }
}

template <typename T>
FASTRSSM_CLONES void multiply_by(const T* factors, ComputeOf<T>* terms, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) terms[i] *= widen(factors[i]);
}

template <typename A>
FASTRSSM_CLONES void add_rows_of(const A* terms, A* sums, std::int64_t rows, std::int64_t width) {
  add_rows(terms, sums, rows, width);
}

// grad: of each element
template <typename T>
FASTRSSM_CLONES void gradients_of(const T* target, const T* mean, const T* std,
                                  const ComputeOf<T>* grad, T* mean_grad, T* std_grad,
                                  std::int64_t count) {
  using A = ComputeOf<T>;
  if (std == nullptr) {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      narrow(grad[i] * (widen(mean[i]) - widen(target[i])), mean_grad + i);
    }
  } else {
#pragma omp simd
    for (std::int64_t i = 0; i < count; ++i) {
      const A inverse = A(1) / widen(std[i]);
      const A z = (widen(target[i]) - widen(mean[i])) * inverse;
      const A g = grad[i] * inverse;
      narrow(-g * z, mean_grad + i);
      narrow(g * (A(1) - z * z), std_grad + i);
    }
  }
}

}  // namespace

template <typename T>
void gaussian_nll_forward(const T* target, const T* mean, const T* std, const T* mask,
                          ComputeOf<T>* nll, std::int64_t N, std::int64_t S,
                          std::int64_t mask_width, double constant, bool weight_by_std,
                          int threads) {
  using A = ComputeOf<T>;
  const Blocks blocks{N, S};
#pragma omp parallel for num_threads(threads) if (N * S > kParallelFrom)
  for (std::int64_t block = 0; block < blocks.count; ++block) {
    A terms[kBlock];
    const std::int64_t first = block * blocks.rows;
    const std::int64_t rows = std::min(blocks.rows, N - first);
    std::fill_n(nll + first, rows, A(0));
    for (std::int64_t s = 0; s < S; s += blocks.width) {
      const std::int64_t width = std::min(blocks.width, S - s), count = rows * width;
      const std::int64_t at = first * S + s;
      const T* block_std = std == nullptr ? nullptr : std + at;
      terms_of(target + at, mean + at, block_std, terms, count, A(constant));
      if (weight_by_std && std != nullptr) multiply_by(block_std, terms, count);
      if (mask_width > 1) multiply_by(mask + at, terms, count);
      add_rows_of(terms, nll + first, rows, width);
    }
    if (mask_width == 1) multiply_by(mask + first, nll + first, rows);
  }
}

template <typename T>
void gaussian_nll_backward(const ComputeOf<T>* grad, const T* target, const T* mean, const T* std,
                           const T* mask, T* mean_grad, T* std_grad, std::int64_t N, std::int64_t S,
                           std::int64_t mask_width, bool weight_by_std, int threads) {
  using A = ComputeOf<T>;
  const Blocks blocks{N, S};
#pragma omp parallel for num_threads(threads) if (N * S > kParallelFrom)
  for (std::int64_t block = 0; block < blocks.count; ++block) {
    A element_grad[kBlock];
    const std::int64_t first = block * blocks.rows;
    const std::int64_t rows = std::min(blocks.rows, N - first);
    for (std::int64_t s = 0; s < S; s += blocks.width) {
      const std::int64_t width = std::min(blocks.width, S - s), count = rows * width;
      const std::int64_t at = first * S + s;
      for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t n = first + row;
        const A g = mask_width == 1 ? grad[n] * widen(mask[n]) : grad[n];
        std::fill_n(element_grad + row * width, width, g);
      }
      const bool has_std = std != nullptr;
      if (weight_by_std && has_std) multiply_by(std + at, element_grad, count);
      if (mask_width > 1) multiply_by(mask + at, element_grad, count);
      gradients_of(target + at, mean + at, has_std ? std + at : nullptr, element_grad,
                   mean_grad + at, has_std ? std_grad + at : nullptr, count);
    }
  }
}

#define FASTRSSM_INSTANTIATE(T)                                                                 \
  template void gaussian_nll_forward<T>(const T*, const T*, const T*, const T*, ComputeOf<T>*,  \
                                        std::int64_t, std::int64_t, std::int64_t, double, bool, \
                                        int);                                                   \
  template void gaussian_nll_backward<T>(const ComputeOf<T>*, const T*, const T*, const T*,     \
                                         const T*, T*, T*, std::int64_t, std::int64_t,          \
                                         std::int64_t, bool, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)
FASTRSSM_INSTANTIATE(BFloat16)
#undef FASTRSSM_INSTANTIATE

}  // namespace fastrssm::cpu
