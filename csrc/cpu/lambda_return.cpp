#include <algorithm>
#include <cstdint>

#include "common/number.h"
#include "cpu/ops.h"
#include "cpu/rows.h"
#include "cpu/simd.h"

namespace fastrssm::cpu {
namespace {

// columns that one thread walks through time together; what it carries stays in its cache
constexpr std::int64_t kColumns = 256;

// A step for `count` columns: carry and returns <- the return from here on, given the next.
template <typename T>
FASTRSSM_CLONES void step(const T* rewards, const T* next_values, const T* discounts,
                          ComputeOf<T>* carry, ComputeOf<T>* returns, std::int64_t count,
                          ComputeOf<T> discount, ComputeOf<T> lambda) {
  using A = ComputeOf<T>;
  const A share = A(1) - lambda;
  if (discounts == nullptr) {
#pragma omp simd
    for (std::int64_t b = 0; b < count; ++b) {
      const A mixed = share * widen(next_values[b]) + lambda * carry[b];
      returns[b] = carry[b] = widen(rewards[b]) + discount * mixed;
    }
  } else {
#pragma omp simd
    for (std::int64_t b = 0; b < count; ++b) {
      const A mixed = share * widen(next_values[b]) + lambda * carry[b];
      returns[b] = carry[b] = widen(rewards[b]) + widen(discounts[b]) * mixed;
    }
  }
}

// The same for the gradient: carry is what the earlier return passes on to this one, and becomes
// what this one passes on. `value_share` is how much of the next value a return contains.
template <typename T>
FASTRSSM_CLONES void step_gradient(const ComputeOf<T>* grad, const T* discounts,
                                   ComputeOf<T>* carry, T* rewards_grad, T* values_grad,
                                   ComputeOf<T>* reached, std::int64_t count, ComputeOf<T> discount,
                                   ComputeOf<T> lambda, ComputeOf<T> value_share) {
  using A = ComputeOf<T>;
#pragma omp simd
  for (std::int64_t b = 0; b < count; ++b) {
    reached[b] = grad[b] + carry[b];
    narrow(reached[b], rewards_grad + b);
  }
  if (discounts == nullptr) {
#pragma omp simd
    for (std::int64_t b = 0; b < count; ++b) {
      const A passed = discount * reached[b];
      carry[b] = lambda * passed;
      narrow(value_share * passed, values_grad + b);
    }
  } else {
#pragma omp simd
    for (std::int64_t b = 0; b < count; ++b) {
      const A passed = widen(discounts[b]) * reached[b];
      carry[b] = lambda * passed;
      narrow(value_share * passed, values_grad + b);
    }
  }
}

template <typename T, typename Next>
FASTRSSM_CLONES void discount_gradient(const ComputeOf<T>* reached, const T* next_values,
                                       const Next* next_returns, T* discounts_grad,
                                       std::int64_t count, ComputeOf<T> lambda) {
  using A = ComputeOf<T>;
#pragma omp simd
  for (std::int64_t b = 0; b < count; ++b) {
    const A mixed = (A(1) - lambda) * widen(next_values[b]) + lambda * widen(next_returns[b]);
    narrow(reached[b] * mixed, discounts_grad + b);
  }
}

// Calls run(offset of the first column at time 0, columns) for every block of columns.
template <typename Run>
void for_columns(std::int64_t N, std::int64_t T, std::int64_t B, int threads, Run run) {
  const std::int64_t blocks = (B + kColumns - 1) / kColumns;
#pragma omp parallel for num_threads(threads) if (N * T * B > kParallelFrom)
  for (std::int64_t i = 0; i < N * blocks; ++i) {
    const std::int64_t b = i % blocks * kColumns;
    run(i / blocks * T * B + b, std::min(kColumns, B - b));
  }
}

}  // namespace

template <typename E>
void lambda_return_forward(const E* rewards, const E* next_values, const E* discounts,
                           ComputeOf<E>* returns, std::int64_t N, std::int64_t T, std::int64_t B,
                           double discount, double lambda, int threads) {
  using A = ComputeOf<E>;
  for_columns(N, T, B, threads, [=](std::int64_t first, std::int64_t count) {
    A carry[kColumns];
    const std::int64_t last = first + (T - 1) * B;
    for (std::int64_t b = 0; b < count; ++b) carry[b] = widen(next_values[last + b]);
    for (std::int64_t at = last; at >= first; at -= B) {
      step(rewards + at, next_values + at, discounts == nullptr ? nullptr : discounts + at, carry,
           returns + at, count, A(discount), A(lambda));
    }
  });
}

template <typename E>
void lambda_return_backward(const ComputeOf<E>* grad, const ComputeOf<E>* returns,
                            const E* next_values, const E* discounts, E* rewards_grad,
                            E* values_grad, E* discounts_grad, std::int64_t N, std::int64_t T,
                            std::int64_t B, double discount, double lambda, int threads) {
  using A = ComputeOf<E>;
  for_columns(N, T, B, threads, [=](std::int64_t first, std::int64_t count) {
    A carry[kColumns] = {}, reached[kColumns];
    const std::int64_t last = first + (T - 1) * B;
    for (std::int64_t at = first; at <= last; at += B) {
      // the last return contains its value twice: mixed in, and as the bootstrap
      const A value_share = at == last ? A(1) : A(1) - A(lambda);
      step_gradient(grad + at, discounts == nullptr ? nullptr : discounts + at, carry,
                    rewards_grad + at, values_grad + at, reached, count, A(discount), A(lambda),
                    value_share);
      if (discounts == nullptr) continue;
      if (at == last) {
        discount_gradient(reached, next_values + at, next_values + at, discounts_grad + at, count,
                          A(lambda));
      } else {
        discount_gradient(reached, next_values + at, returns + at + B, discounts_grad + at, count,
                          A(lambda));
      }
    }
  });
}

#define FASTRSSM_INSTANTIATE(E)                                                                    \
  template void lambda_return_forward<E>(const E*, const E*, const E*, ComputeOf<E>*,              \
                                         std::int64_t, std::int64_t, std::int64_t, double, double, \
                                         int);                                                     \
  template void lambda_return_backward<E>(const ComputeOf<E>*, const ComputeOf<E>*, const E*,      \
                                          const E*, E*, E*, E*, std::int64_t, std::int64_t,        \
                                          std::int64_t, double, double, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)
FASTRSSM_INSTANTIATE(BFloat16)
#undef FASTRSSM_INSTANTIATE

}  // namespace fastrssm::cpu
