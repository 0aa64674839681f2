// What the kernels' source runs on in the emulation: the counterpart of rssm_machine.h.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/rssm_emulator.h"

namespace fastrssm::cluster {

// A warp of a rank of the emulated cluster, as rssm_cluster.h wants it.
class Machine {
 public:
  static constexpr bool kWatches = true;
  template <class T>
  using PerLane = std::array<T, kWarp>;
  template <class T>
  class PerThread {
   public:
    T& of(int, int lane) { return values_[lane]; }

   private:
    std::vector<T> values_ = std::vector<T>(kWarp);
  };

  Machine(Cluster& cluster, Fiber& fiber)
      : c(cluster), self(fiber), r(fiber.rank), me(cluster.ranks[fiber.rank]) {}

  int rank() const { return r; }
  int cluster() const { return c.index; }
  int clusters() const { return c.count; }
  unsigned char* shared() const { return me.memory.data(); }
  int buffer(int step) const { return c.mutation == Mutation::kBuffer ? 0 : step & 1; }

  template <class Body>
  void warps(Body body) {
    body(self.warp);
  }
  template <class Body>
  void lanes(Body body) {
    for (int lane = 0; lane < kWarp; ++lane) body(lane);
  }
  template <class Body>
  void threads(Body body) {
    for (int lane = 0; lane < kWarp; ++lane) body(self.warp * kWarp + lane);
  }
  template <class T>
  T from_lane(const PerLane<T>& values, int, int source) const {
    return values[source];
  }
  // sums over groups of `lanes` neighbours, in the order of a butterfly
  void add_lanes(PerLane<float>& values, int lanes) {
    for (int distance = lanes / 2; distance > 0; distance /= 2) {
      const PerLane<float> before = values;
      for (int lane = 0; lane < kWarp; ++lane) {
        values[lane] = before[lane] + before[lane ^ distance];
      }
    }
  }

  void sync_warp() {}
  void sync() {
    if (mutated(Mutation::kSync, self.syncs++)) return;
    self.waits_until = me.generation + 1;
    if (++me.at_sync == kWarps) {
      me.at_sync = 0;
      ++me.generation;
    }
    c.leave(self);
  }
  void set_up(int) { sync(); }
  void cluster_sync() {
    self.at_cluster_barrier = true;
    c.leave(self);
  }
  void arm(int barrier, int bytes) {
    if (self.warp) return;
    c.arrive(r, barrier, bytes - (mutated(Mutation::kBytes, barrier) ? 16 : 0));
  }
  void wait(int barrier, int parity, int bytes) {
    if (!mutated(Mutation::kSkipWait, barrier)) {
      self.waits_for = barrier;
      self.parity = parity ^ mutated(Mutation::kParity, barrier);
      c.leave(self);
      self.waits_for = -1;
    }
    arm(barrier, bytes);
  }
  void send(int peer, int byte, const Words& words, int barrier) {
    const bool token = byte >= c.p.token && byte < c.p.token + kMaxRanks * 16;
    if (token && c.mutation == Mutation::kToken) return;
    if (byte < 0 || byte % 16 || byte + 16 > c.p.shared) return c.fail("a store to nowhere");
    Message message = {peer, byte, 16, on(barrier), {}};
    std::memcpy(message.data, words.word, 16);
    c.post(message);
  }
  void send_pair(int peer, int byte, float one, float two, int barrier) {
    if (byte < 0 || byte % 8 || byte + 8 > c.p.shared) return c.fail("a store to nowhere");
    Message message = {peer, byte, 8, on(barrier), {}};
    std::memcpy(message.data, &one, 4);
    std::memcpy(message.data + 4, &two, 4);
    c.post(message);
  }

  void copy(float* to, const float* from) {
    *to = NAN;
    self.copies_to.push_back(to);
    self.copies_from.push_back(from);
  }
  void copied() {
    for (std::size_t i = 0; i < self.copies_to.size(); ++i)
      *self.copies_to[i] = *self.copies_from[i];
    self.copies_to.clear();
    self.copies_from.clear();
  }

  // mma.sync.m16n8k16: lane l holds outputs l / 4 and l / 4 + 8, inputs 2 (l % 4) + {0, 1, 8, 9}
  // of both operands, and rows 2 (l % 4) + {0, 1} of the sums
  template <class Sums>
  void mma(const PerLane<Words>& a, const unsigned char* tile, PerLane<Sums>& sums, int rows) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      std::uint32_t b[2];
      std::memcpy(b, tile + lane * 8, 8);
      for (int r = 0; r < 4; ++r) {
        for (int j = 0; j < 2; ++j) {
          const int k = lane % 4 * 2 + j;
          left[lane / 4 + r % 2 * 8][k + r / 2 * 8] = part(a[lane].word[r], j);
          if (r < 2) right[k + r * 8][lane / 4] = part(b[r], j);
        }
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int c = 0; c < 4; ++c) {
        const int i = lane / 4 + c / 2 * 8, b = lane % 4 * 2 + c % 2;
        float total = sums[lane].c[rows][c];
        for (int k = 0; k < 16; ++k) total += left[i][k] * right[k][b];
        sums[lane].c[rows][c] = total;
      }
    }
  }

  // by a warp that has a part in every exchange, before it sends
  void retire(int byte, int bytes) {
    if (self.warp) return;
    for (int i = byte / 16; i < (byte + bytes) / 16; ++i) {
      if (me.remote[i]) std::memset(&me.memory[i * 16], 0xff, 16);
    }
  }

 private:
  bool mutated(Mutation kind, int barrier) const {
    return c.mutation == kind && c.which == barrier;
  }
  int on(int barrier) const {
    return mutated(Mutation::kBarrier, barrier) ? (barrier + 1) % c.p.barriers : barrier;
  }
  static float part(std::uint32_t word, int j) {
    return widen(BFloat16{static_cast<std::uint16_t>(j ? word >> 16 : word)});
  }

  Cluster& c;
  Fiber& self;
  const int r;
  Rank& me;
};

}  // namespace fastrssm::cluster
