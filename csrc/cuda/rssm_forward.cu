#include "cuda/rssm_forward.h"
#include "cuda/rssm_machine.h"

namespace fastrssm::cluster {
namespace {

// A cluster takes 8 or 16 rows of the batch through the sequence, its weights resident in registers
// and shared memory. Bound by latency: NOTES.md has the prediction; no measurement yet.
template <int kRowTiles>
__global__ void __launch_bounds__(kThreads, 1)
    rssm_forward_kernel(const __grid_constant__ Program p, const __grid_constant__ Pointers g) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  DeviceMachine machine(shared, p.barrier_bytes, p.ranks);
  Forward<DeviceMachine, kRowTiles> scan(machine, p, g);
  scan.run();
#endif
}

}  // namespace

Kernel forward_kernel(int rows) {
  return rows == 8 ? rssm_forward_kernel<1> : rssm_forward_kernel<2>;
}

}  // namespace fastrssm::cluster
