#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "common/math.h"
#include "common/number.h"
#include "cuda/ops.h"

namespace fastrssm {
namespace {

constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;
constexpr unsigned kAllLanes = 0xffffffffu;

// One warp per row: lanes stride over the latent, then add up in a fixed order. Reads
// 4 * S * sizeof(T) bytes and writes 4 per row: bound by memory. Share of the bandwidth: no
// measurement yet.
template <typename T>
__global__ void gaussian_kl_forward_kernel(const T* __restrict__ post_mean,
                                           const T* __restrict__ post_std,
                                           const T* __restrict__ prior_mean,
                                           const T* __restrict__ prior_std, float* __restrict__ kl,
                                           std::int64_t N, std::int64_t S) {
  const std::int64_t n = blockIdx.x * std::int64_t{kWarpsPerBlock} + threadIdx.y;
  if (n >= N) return;
  const std::int64_t row = n * S;
  float sum = 0.0f;
  for (std::int64_t s = threadIdx.x; s < S; s += kWarp) {
    const std::int64_t at = row + s;
    sum += gaussian_kl_term(widen(post_mean[at]), widen(post_std[at]), widen(prior_mean[at]),
                            widen(prior_std[at]));
  }
  for (int lane = kWarp / 2; lane > 0; lane /= 2) sum += __shfl_down_sync(kAllLanes, sum, lane);
  if (threadIdx.x == 0) kl[n] = sum;
}

// One warp per row. Reads 4 * S * sizeof(T) + 8 bytes and writes 4 * S * sizeof(T) per row: bound
// by memory. Share of the bandwidth: no measurement yet.
template <typename T>
__global__ void gaussian_kl_backward_kernel(
    const float* __restrict__ grad, const float* __restrict__ kl, const T* __restrict__ post_mean,
    const T* __restrict__ post_std, const T* __restrict__ prior_mean,
    const T* __restrict__ prior_std, T* __restrict__ post_mean_grad, T* __restrict__ post_std_grad,
    T* __restrict__ prior_mean_grad, T* __restrict__ prior_std_grad, std::int64_t N, std::int64_t S,
    float post_scale, float prior_scale, float free_nats) {
  const std::int64_t n = blockIdx.x * std::int64_t{kWarpsPerBlock} + threadIdx.y;
  if (n >= N) return;
  const std::int64_t row = n * S;
  const float g = is_free(kl[n], free_nats) ? 0.0f : grad[n];
  for (std::int64_t s = threadIdx.x; s < S; s += kWarp) {
    const std::int64_t at = row + s;
    const auto d = gaussian_kl_term_gradient(widen(post_mean[at]), widen(post_std[at]),
                                             widen(prior_mean[at]), widen(prior_std[at]));
    narrow(post_scale * g * d.pm, post_mean_grad + at);
    narrow(post_scale * g * d.ps, post_std_grad + at);
    narrow(prior_scale * g * d.qm, prior_mean_grad + at);
    narrow(prior_scale * g * d.qs, prior_std_grad + at);
  }
}

unsigned grid_of(std::int64_t N) {
  return static_cast<unsigned>((N + kWarpsPerBlock - 1) / kWarpsPerBlock);
}

template <typename T>
int forward(const T* post_mean, const T* post_std, const T* prior_mean, const T* prior_std,
            float* kl, std::int64_t N, std::int64_t S, void* stream) {
  if (N == 0) return cudaSuccess;
  gaussian_kl_forward_kernel<<<grid_of(N), dim3(kWarp, kWarpsPerBlock), 0,
                               static_cast<cudaStream_t>(stream)>>>(post_mean, post_std, prior_mean,
                                                                    prior_std, kl, N, S);
  return cudaGetLastError();
}

template <typename T>
int backward(const float* grad, const float* kl, const T* post_mean, const T* post_std,
             const T* prior_mean, const T* prior_std, T* post_mean_grad, T* post_std_grad,
             T* prior_mean_grad, T* prior_std_grad, std::int64_t N, std::int64_t S,
             float post_scale, float prior_scale, float free_nats, void* stream) {
  if (N == 0) return cudaSuccess;
  gaussian_kl_backward_kernel<<<grid_of(N), dim3(kWarp, kWarpsPerBlock), 0,
                                static_cast<cudaStream_t>(stream)>>>(
      grad, kl, post_mean, post_std, prior_mean, prior_std, post_mean_grad, post_std_grad,
      prior_mean_grad, prior_std_grad, N, S, post_scale, prior_scale, free_nats);
  return cudaGetLastError();
}

}  // namespace
}  // namespace fastrssm

using fastrssm::BFloat16;

int fastrssm_gaussian_kl_forward(int stored, const void* post_mean, const void* post_std,
                                 const void* prior_mean, const void* prior_std, float* kl,
                                 std::int64_t N, std::int64_t S, void* stream) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return fastrssm::forward(static_cast<const T*>(post_mean), static_cast<const T*>(post_std),
                             static_cast<const T*>(prior_mean), static_cast<const T*>(prior_std),
                             kl, N, S, stream);
  };
  return stored == fastrssm::kFloat32 ? run(static_cast<float*>(nullptr))
                                      : run(static_cast<BFloat16*>(nullptr));
}

int fastrssm_gaussian_kl_backward(int stored, const float* grad, const float* kl,
                                  const void* post_mean, const void* post_std,
                                  const void* prior_mean, const void* prior_std,
                                  void* post_mean_grad, void* post_std_grad, void* prior_mean_grad,
                                  void* prior_std_grad, std::int64_t N, std::int64_t S,
                                  float post_scale, float prior_scale, float free_nats,
                                  void* stream) {
  const auto run = [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    return fastrssm::backward(grad, kl, static_cast<const T*>(post_mean),
                              static_cast<const T*>(post_std), static_cast<const T*>(prior_mean),
                              static_cast<const T*>(prior_std), static_cast<T*>(post_mean_grad),
                              static_cast<T*>(post_std_grad), static_cast<T*>(prior_mean_grad),
                              static_cast<T*>(prior_std_grad), N, S, post_scale, prior_scale,
                              free_nats, stream);
  };
  return stored == fastrssm::kFloat32 ? run(static_cast<float*>(nullptr))
                                      : run(static_cast<BFloat16*>(nullptr));
}
