#include <cuda_runtime.h>

#include <atomic>
#include <memory>

#include "cuda/ops.h"
#include "cuda/rssm_launch.h"
#include "cuda/rssm_machine.h"

namespace fastrssm::cluster {
namespace {

constexpr int kPackThreads = 256;
constexpr int kMaxDevices = 64;

// One lane of a tile of weights per thread: gathers 8 numbers, writes 16 bytes. Once per optimiser
// step; bound by memory.
__global__ void rssm_pack_kernel(const __grid_constant__ Program p,
                                 const __grid_constant__ LayerWeights layers, std::int64_t items,
                                 unsigned char* packed) {
  const std::int64_t item = blockIdx.x * std::int64_t{kPackThreads} + threadIdx.x;
  if (item < items) pack_lane(p, layers, item, packed);
}

const char* make(const std::int64_t* layout, int backward, int ranks, int rows, Program* p) {
  return (backward ? make_backward : make_forward)(sizes_of(layout), ranks, rows, p);
}

// What a kernel needs beyond the defaults, set once per device.
cudaError_t prepare(Kernel kernel, int backward, int rows) {
  static std::atomic<bool> done[4][kMaxDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  std::atomic<bool>& known = done[2 * (backward != 0) + (rows == 8)][device % kMaxDevices];
  if (device < kMaxDevices && known) return cudaSuccess;
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaError_t error =
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedLimit);
  if (error) return error;
  error = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  known = error == cudaSuccess;
  return error;
}

struct Config {
  cudaLaunchAttribute cluster;
  cudaLaunchConfig_t launch;

  Config(const Program& p, int clusters, void* stream) : cluster(), launch() {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = p.ranks;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    launch.gridDim = dim3(p.ranks * clusters);
    launch.blockDim = dim3(kThreads);
    launch.dynamicSmemBytes = p.shared;
    launch.stream = static_cast<cudaStream_t>(stream);
    launch.attrs = &cluster;
    launch.numAttrs = 1;
  }
};

Kernel kernel_of(int backward, int rows) {
  return backward ? backward_kernel(rows) : forward_kernel(rows);
}

}  // namespace
}  // namespace fastrssm::cluster

using namespace fastrssm::cluster;

const char* fastrssm_cluster_sizes(const std::int64_t* layout, int backward, int ranks, int rows,
                                   std::int64_t* sizes) {
  const auto p = std::make_unique<Program>();
  const char* refusal = make(layout, backward, ranks, rows, p.get());
  sizes[0] = static_cast<std::int64_t>(p->tiles) * ranks * kTileBytes;
  sizes[1] = kept_width(sizes_of(layout));
  sizes[2] = p->gradients;
  return refusal;
}

int fastrssm_cluster_count(int device, const std::int64_t* layout, int backward, int ranks,
                           int rows, int* count) {
  *count = 0;
  const auto p = std::make_unique<Program>();
  if (make(layout, backward, ranks, rows, p.get())) return cudaSuccess;
  int major = 0, before = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  // the kernels are Hopper's alone
  if (error || major != 9) return error;
  if ((error = cudaGetDevice(&before)) || (error = cudaSetDevice(device))) return error;
  const Kernel kernel = kernel_of(backward, rows);
  error = prepare(kernel, backward, rows);
  if (!error) {
    const Config config(*p, 1, nullptr);
    error = cudaOccupancyMaxActiveClusters(count, kernel, &config.launch);
    if (error == cudaErrorInvalidClusterSize) {
      *count = 0;
      cudaGetLastError();
      error = cudaSuccess;
    }
  }
  cudaSetDevice(before);
  return error;
}

int fastrssm_cluster_pack(const std::int64_t* layout, int backward, int ranks, int rows,
                          const std::uintptr_t* layers, int count, void* packed, void* stream) {
  const auto p = std::make_unique<Program>();
  if (make(layout, backward, ranks, rows, p.get())) return cudaErrorInvalidValue;
  LayerWeights weights = {};
  for (int l = 0; l < count; ++l) weights.weight[l] = reinterpret_cast<const float*>(layers[4 * l]);
  const std::int64_t items = static_cast<std::int64_t>(p->tiles) * ranks * kWarp;
  const auto blocks = static_cast<unsigned>((items + kPackThreads - 1) / kPackThreads);
  rssm_pack_kernel<<<blocks, kPackThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      *p, weights, items, static_cast<unsigned char*>(packed));
  return cudaGetLastError();
}

int fastrssm_cluster_run(const std::int64_t* layout, int backward, int ranks, int rows,
                         int clusters, const double* constants, int learns,
                         const std::uintptr_t* tensors, int layers, void* stream) {
  const auto p = std::make_unique<Program>();
  if (make(layout, backward, ranks, rows, p.get())) return cudaErrorInvalidValue;
  const Kernel kernel = kernel_of(backward, rows);
  if (const cudaError_t error = prepare(kernel, backward, rows)) return error;
  const Pointers pointers = pointers_of(tensors, layers, constants, learns != 0);
  const Config config(*p, clusters, stream);
  const cudaError_t error = cudaLaunchKernelEx(&config.launch, kernel, *p, pointers);
  return error ? error : cudaGetLastError();
}
