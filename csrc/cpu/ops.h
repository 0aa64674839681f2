// The CPU kernels. Row-major, contiguous; `threads` is how many may work, results do not depend on
// it.
#pragma once

#include <cstdint>

#include "common/number.h"

namespace fastrssm::cpu {

// Inputs [N, S], kl [N]: KL(post || prior) summed over S.
template <typename T>
void gaussian_kl_forward(const T* post_mean, const T* post_std, const T* prior_mean,
                         const T* prior_std, ComputeOf<T>* kl, std::int64_t N, std::int64_t S,
                         int threads);

// grad, kl [N]; the rest [N, S]. Gradients of the posterior are scaled by post_scale, those of the
// prior by prior_scale; rows whose kl is below free_nats get zero.
template <typename T>
void gaussian_kl_backward(const ComputeOf<T>* grad, const ComputeOf<T>* kl, const T* post_mean,
                          const T* post_std, const T* prior_mean, const T* prior_std,
                          T* post_mean_grad, T* post_std_grad, T* prior_mean_grad,
                          T* prior_std_grad, std::int64_t N, std::int64_t S, double post_scale,
                          double prior_scale, double free_nats, int threads);

// Most classes of a variable; more have no kernel.
constexpr std::int64_t kMostClasses = 1024;

// What the gradients of a variable need, beside its logits: the largest of them, what turns
// exponentials of logits less the largest into probabilities s and t, and, for mixtures q and p,
// the sums of s log(q / p) and of t q / p.
enum Statistic {
  kPostLargest,
  kPriorLargest,
  kPostScale,
  kPriorScale,
  kLogRatio,
  kRatio,
  kStatistics
};

// Logits [N, G, K], kl [N]: KL(post || prior) summed over G variables of K classes. `unimix` is the
// share of the uniform distribution in both. statistics [N, kStatistics, G], or null if there will
// be no backward.
template <typename T>
void categorical_kl_forward(const T* post_logits, const T* prior_logits, ComputeOf<T>* kl,
                            ComputeOf<T>* statistics, std::int64_t N, std::int64_t G,
                            std::int64_t K, double unimix, int threads);

// grad [N]; gradients [N, G, K]; the rest as above. Scales and free nats as in
// gaussian_kl_backward.
template <typename T>
void categorical_kl_backward(const ComputeOf<T>* grad, const T* post_logits, const T* prior_logits,
                             const ComputeOf<T>* kl, const ComputeOf<T>* statistics, T* post_grad,
                             T* prior_grad, std::int64_t N, std::int64_t G, std::int64_t K,
                             double unimix, double post_scale, double prior_scale, double free_nats,
                             int threads);

// target, mean, std [N, S], nll [N]: negative log likelihood summed over S, each element plus
// `constant`, then times std if weight_by_std, times mask [N, mask_width]. std may be null, and is
// 1 then; mask_width is 0 without a mask, 1 or S.
template <typename T>
void gaussian_nll_forward(const T* target, const T* mean, const T* std, const T* mask,
                          ComputeOf<T>* nll, std::int64_t N, std::int64_t S,
                          std::int64_t mask_width, double constant, bool weight_by_std,
                          int threads);

// grad [N]; the rest as above. The weight std has no gradient; without std std_grad is not written.
template <typename T>
void gaussian_nll_backward(const ComputeOf<T>* grad, const T* target, const T* mean, const T* std,
                           const T* mask, T* mean_grad, T* std_grad, std::int64_t N, std::int64_t S,
                           std::int64_t mask_width, bool weight_by_std, int threads);

// All [N, T, B]: N batches of B sequences. discounts may be null, and is `discount` then.
template <typename E>
void lambda_return_forward(const E* rewards, const E* next_values, const E* discounts,
                           ComputeOf<E>* returns, std::int64_t N, std::int64_t T, std::int64_t B,
                           double discount, double lambda, int threads);

// Without discounts discounts_grad is not written.
template <typename E>
void lambda_return_backward(const ComputeOf<E>* grad, const ComputeOf<E>* returns,
                            const E* next_values, const E* discounts, E* rewards_grad,
                            E* values_grad, E* discounts_grad, std::int64_t N, std::int64_t T,
                            std::int64_t B, double discount, double lambda, int threads);

}  // namespace fastrssm::cpu
