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

// The scans of an RSSM on thread-block clusters of sm_90. `layout`: T, B and the numbers of
// ops.rssm_plan.Plan.structure; `ranks` blocks of a cluster take `rows` rows of the batch.

// Bytes of packed weights, numbers a row that are kept, and of gradients. Returns why such a
// cluster cannot hold the scan, or null.
const char* fastrssm_cluster_sizes(const std::int64_t* layout, int backward, int ranks, int rows,
                                   std::int64_t* sizes);
// How many clusters the device runs at once: 0 where it is none of sm_90.
int fastrssm_cluster_count(int device, const std::int64_t* layout, int backward, int ranks,
                           int rows, int* count);
// layers: weight, bias, scale and shift of each.
int fastrssm_cluster_pack(const std::int64_t* layout, int backward, int ranks, int rows,
                          const std::uintptr_t* layers, int count, void* packed, void* stream);
// constants: min_std, unimix, action_min_std; tensors: as listed in rssm_launch.h; learns:
// gradients of the world model's pre-activations are stored, not only those of the policy's.
int fastrssm_cluster_run(const std::int64_t* layout, int backward, int ranks, int rows,
                         int clusters, const double* constants, int learns,
                         const std::uintptr_t* tensors, int layers, void* stream);
}
