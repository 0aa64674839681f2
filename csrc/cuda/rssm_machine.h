// The device as rssm_cluster.h wants it: a block of a cluster on sm_90.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/rssm_cluster.h"

namespace fastrssm::cluster {

constexpr unsigned kAllLanes = 0xffffffffu;
// tries of a barrier, each of which may sleep, before a launch fails instead of hanging
constexpr unsigned kTries = 1u << 26;

class DeviceMachine {
 public:
  static constexpr bool kWatches = false;
  template <class T>
  struct PerLane {
    T value;
    FASTRSSM_CLUSTER T& operator[](int) { return value; }
    FASTRSSM_CLUSTER const T& operator[](int) const { return value; }
  };
  template <class T>
  struct PerThread {
    T value;
    FASTRSSM_CLUSTER T& of(int, int) { return value; }
  };

  FASTRSSM_CLUSTER DeviceMachine(unsigned char* shared, int barrier_bytes, int ranks)
      : shared_(shared),
        ranks_(ranks),
        barriers_(static_cast<std::uint32_t>(__cvta_generic_to_shared(shared)) + barrier_bytes) {}

  FASTRSSM_CLUSTER int rank() const {
    std::uint32_t found;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(found));
    return static_cast<int>(found);
  }
  FASTRSSM_CLUSTER int cluster() const { return static_cast<int>(blockIdx.x) / ranks_; }
  FASTRSSM_CLUSTER int clusters() const { return static_cast<int>(gridDim.x) / ranks_; }
  FASTRSSM_CLUSTER unsigned char* shared() const { return shared_; }
  FASTRSSM_CLUSTER int buffer(int step) const { return step & 1; }

  template <class Body>
  FASTRSSM_CLUSTER void warps(Body body) {
    body(static_cast<int>(threadIdx.x) / kWarp);
  }
  template <class Body>
  FASTRSSM_CLUSTER void lanes(Body body) {
    body(static_cast<int>(threadIdx.x) % kWarp);
  }
  template <class Body>
  FASTRSSM_CLUSTER void threads(Body body) {
    body(static_cast<int>(threadIdx.x));
  }
  template <class T>
  FASTRSSM_CLUSTER T from_lane(const PerLane<T>& values, int, int source) const {
    return __shfl_sync(kAllLanes, values.value, source);
  }
  FASTRSSM_CLUSTER void add_lanes(PerLane<float>& values, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      values.value += __shfl_xor_sync(kAllLanes, values.value, distance);
    }
  }

  FASTRSSM_CLUSTER void sync() { __syncthreads(); }
  FASTRSSM_CLUSTER void sync_warp() { __syncwarp(); }
  FASTRSSM_CLUSTER void set_up(int barriers) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < barriers; ++i) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers_ + 8 * i));
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
  }
  FASTRSSM_CLUSTER void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
  FASTRSSM_CLUSTER void arm(int barrier, int bytes) {
    if (threadIdx.x) return;
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barriers_ + 8 * barrier),
        "r"(bytes)
        : "memory");
  }
  // The plain form: what arrived was written to this block's own shared memory.
  FASTRSSM_CLUSTER void wait(int barrier, int parity, int bytes) {
    const std::uint32_t address = barriers_ + 8 * barrier;
    std::uint32_t done = 0;
    for (unsigned tries = 0; !done; ++tries) {
      asm volatile(
          "{\n"
          ".reg .pred done;\n"
          "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n"
          "}\n"
          : "=r"(done)
          : "r"(address), "r"(parity)
          : "memory");
      if (tries == kTries) __trap();
    }
    arm(barrier, bytes);
  }
  FASTRSSM_CLUSTER void send(int peer, int byte, const Words& words, int barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(of_peer(own(byte), peer)),
        "r"(words.word[0]), "r"(words.word[1]), "r"(words.word[2]), "r"(words.word[3]),
        "r"(of_peer(barriers_ + 8 * barrier, peer))
        : "memory");
  }
  FASTRSSM_CLUSTER void send_pair(int peer, int byte, float one, float two, int barrier) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
            of_peer(own(byte), peer)),
        "f"(one), "f"(two), "r"(of_peer(barriers_ + 8 * barrier, peer))
        : "memory");
  }

  FASTRSSM_CLUSTER void copy(float* to, const float* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                     static_cast<std::uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(from)
                 : "memory");
  }
  FASTRSSM_CLUSTER void copied() { asm volatile("cp.async.wait_all;" ::: "memory"); }

  template <class Sums>
  FASTRSSM_CLUSTER void mma(const PerLane<Words>& a, const unsigned char* tile, PerLane<Sums>& sums,
                            int rows) {
    const uint2 b = *reinterpret_cast<const uint2*>(tile + threadIdx.x % kWarp * 8);
    float* c = sums.value.c[rows];
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
        "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a.value.word[0]), "r"(a.value.word[1]), "r"(a.value.word[2]), "r"(a.value.word[3]),
          "r"(b.x), "r"(b.y));
  }
  FASTRSSM_CLUSTER void retire(int, int) {}

 private:
  FASTRSSM_CLUSTER std::uint32_t own(int byte) const {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared_)) + byte;
  }
  FASTRSSM_CLUSTER static std::uint32_t of_peer(std::uint32_t address, int peer) {
    std::uint32_t found;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(found) : "r"(address), "r"(peer));
    return found;
  }

  unsigned char* shared_;
  const int ranks_;
  std::uint32_t barriers_;
};

using Kernel = void (*)(const Program, const Pointers);
// The kernels of rssm_forward.cu and rssm_backward.cu, for 8 or 16 rows a cluster.
Kernel forward_kernel(int rows);
Kernel backward_kernel(int rows);

}  // namespace fastrssm::cluster
