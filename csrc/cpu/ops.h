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

}  // namespace fastrssm::cpu
