#include <cuda_runtime_api.h>

#include "cuda/ops.h"

int fastrssm_cuda_probe() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  // forget the error: a later launch must report its own
  cudaGetLastError();
  return error != cudaSuccess || devices > 0 ? error : cudaErrorNoDevice;
}

const char* fastrssm_cuda_error(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
