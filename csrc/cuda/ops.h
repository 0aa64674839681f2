// The CUDA launchers: raw device pointers, sizes and the caller's stream. They neither allocate nor
// wait, and return a cudaError_t as int. `stored` is a fastrssm::Stored: the type behind void*.
#pragma once

#include <cstdint>

extern "C" {

// 0 when there are a driver and a GPU.
int fastrssm_cuda_probe();
const char* fastrssm_cuda_error(int error);

// Inputs [N, S], kl [N].
int fastrssm_gaussian_kl_forward(int stored, const void* post_mean, const void* post_std,
                                 const void* prior_mean, const void* prior_std, float* kl,
                                 std::int64_t N, std::int64_t S, void* stream);

// grad, kl [N]; the rest [N, S]. Scales and free nats as on the CPU.
int fastrssm_gaussian_kl_backward(int stored, const float* grad, const float* kl,
                                  const void* post_mean, const void* post_std,
                                  const void* prior_mean, const void* prior_std,
                                  void* post_mean_grad, void* post_std_grad, void* prior_mean_grad,
                                  void* prior_std_grad, std::int64_t N, std::int64_t S,
                                  float post_scale, float prior_scale, float free_nats,
                                  void* stream);
}
