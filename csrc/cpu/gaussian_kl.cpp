#include <algorithm>
#include <cstdint>

#include "common/math.h"
#include "common/number.h"
#include "cpu/ops.h"
#include "cpu/simd.h"

namespace fastrssm::cpu {
namespace {

// elements below which waking a second thread costs more than it saves
constexpr std::int64_t kParallelFrom = 1 << 14;
// elements of a block; the scratch row of a block stays in the first-level cache
constexpr std::int64_t kBlock = 1024;

// A block is as many whole rows as fit, or a piece of one long row. Its elements are contiguous, so
// the loops below run over all of them at once: a latent of 30 wastes no vector lanes at row ends.
struct Blocks {
  std::int64_t N, S;
  std::int64_t rows = std::max<std::int64_t>(1, kBlock / std::max<std::int64_t>(1, S));
  std::int64_t count = (N + rows - 1) / rows;
  std::int64_t width = std::min(S, kBlock);
};

template <typename T>
FASTRSSM_CLONES void terms_of(const T* pm, const T* ps, const T* qm, const T* qs,
                              ComputeOf<T>* terms, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    terms[i] = gaussian_kl_term(widen(pm[i]), widen(ps[i]), widen(qm[i]), widen(qs[i]));
  }
}

// sums[row] += the sum of a row of terms [rows, width]
template <typename A>
FASTRSSM_CLONES void add_rows(const A* terms, A* sums, std::int64_t rows, std::int64_t width) {
  for (std::int64_t row = 0; row < rows; ++row) {
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t s = 0; s < width; ++s) sum += terms[row * width + s];
    sums[row] += sum;
  }
}

template <typename T>
FASTRSSM_CLONES void gradients_of(const T* pm, const T* ps, const T* qm, const T* qs,
                                  const ComputeOf<T>* grad, T* pm_grad, T* ps_grad, T* qm_grad,
                                  T* qs_grad, std::int64_t count, ComputeOf<T> post_scale,
                                  ComputeOf<T> prior_scale) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) {
    const auto d =
        gaussian_kl_term_gradient(widen(pm[i]), widen(ps[i]), widen(qm[i]), widen(qs[i]));
    narrow(post_scale * grad[i] * d.pm, pm_grad + i);
    narrow(post_scale * grad[i] * d.ps, ps_grad + i);
    narrow(prior_scale * grad[i] * d.qm, qm_grad + i);
    narrow(prior_scale * grad[i] * d.qs, qs_grad + i);
  }
}

}  // namespace

template <typename T>
void gaussian_kl_forward(const T* post_mean, const T* post_std, const T* prior_mean,
                         const T* prior_std, ComputeOf<T>* kl, std::int64_t N, std::int64_t S,
                         int threads) {
  const Blocks blocks{N, S};
#pragma omp parallel for num_threads(threads) if (N * S > kParallelFrom)
  for (std::int64_t block = 0; block < blocks.count; ++block) {
    ComputeOf<T> terms[kBlock];
    const std::int64_t first = block * blocks.rows;
    const std::int64_t rows = std::min(blocks.rows, N - first);
    std::fill_n(kl + first, rows, ComputeOf<T>(0));
    for (std::int64_t s = 0; s < S; s += blocks.width) {
      const std::int64_t width = std::min(blocks.width, S - s);
      const std::int64_t at = first * S + s;
      terms_of(post_mean + at, post_std + at, prior_mean + at, prior_std + at, terms, rows * width);
      add_rows(terms, kl + first, rows, width);
    }
  }
}

template <typename T>
void gaussian_kl_backward(const ComputeOf<T>* grad, const ComputeOf<T>* kl, const T* post_mean,
                          const T* post_std, const T* prior_mean, const T* prior_std,
                          T* post_mean_grad, T* post_std_grad, T* prior_mean_grad,
                          T* prior_std_grad, std::int64_t N, std::int64_t S, double post_scale,
                          double prior_scale, double free_nats, int threads) {
  using A = ComputeOf<T>;
  const Blocks blocks{N, S};
#pragma omp parallel for num_threads(threads) if (N * S > kParallelFrom)
  for (std::int64_t block = 0; block < blocks.count; ++block) {
    A row_grad[kBlock];
    const std::int64_t first = block * blocks.rows;
    const std::int64_t rows = std::min(blocks.rows, N - first);
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int64_t n = first + row;
      const A g = is_free(kl[n], A(free_nats)) ? A(0) : grad[n];
      std::fill_n(row_grad + row * blocks.width, blocks.width, g);
    }
    for (std::int64_t s = 0; s < S; s += blocks.width) {
      const std::int64_t at = first * S + s;
      gradients_of(post_mean + at, post_std + at, prior_mean + at, prior_std + at, row_grad,
                   post_mean_grad + at, post_std_grad + at, prior_mean_grad + at,
                   prior_std_grad + at, rows * std::min(blocks.width, S - s), A(post_scale),
                   A(prior_scale));
    }
  }
}

#define FASTRSSM_INSTANTIATE(T)                                                               \
  template void gaussian_kl_forward<T>(const T*, const T*, const T*, const T*, ComputeOf<T>*, \
                                       std::int64_t, std::int64_t, int);                      \
  template void gaussian_kl_backward<T>(const ComputeOf<T>*, const ComputeOf<T>*, const T*,   \
                                        const T*, const T*, const T*, T*, T*, T*, T*,         \
                                        std::int64_t, std::int64_t, double, double, double, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)
FASTRSSM_INSTANTIATE(BFloat16)
#undef FASTRSSM_INSTANTIATE

}  // namespace fastrssm::cpu
