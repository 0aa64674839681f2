// The cluster scan on the host, for tests: the kernels' own source over threads that are loops,
// ranks that are fibers, barriers with phases and expected bytes, and stores that arrive late and
// in any order. What nobody reads any more becomes NaN, so a read before its data, or data before
// its reader is done, shows in the results. Not part of the module.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/rssm_cluster.h"

namespace fastrssm::cluster {
constexpr std::size_t kStack = 1 << 20;

// Errors that tests put in: the emulation must notice every one.
enum class Mutation : int { kNone, kParity, kBytes, kBuffer, kToken, kSkipWait, kBarrier };

struct Barrier {
  int phase = 0, arrivals = 1;
  std::int64_t bytes = 0, armed = 0;
};

struct Message {
  int peer, byte, count, barrier;
  unsigned char data[16];
};

class Cluster;

struct Rank {
  std::vector<unsigned char> memory;
  std::vector<bool> remote;  // 16-byte pieces that peers have written
  std::vector<Barrier> barriers;
  std::vector<float*> copies_to;
  std::vector<const float*> copies_from;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  int waits_for = -1, parity = 0;  // a barrier
  bool at_cluster_barrier = false, done = false;
};

class Cluster {
 public:
  Cluster(const Program& program, int index, int count, int order, int seed, Mutation mutation,
          int which)
      : p(program),
        ranks(program.ranks),
        index(index),
        count(count),
        order_(order),
        mutation(mutation),
        which(which) {
    random_.seed(static_cast<unsigned>(seed));
    for (Rank& rank : ranks) {
      // more than it declares: what is written behind the end must not stay unnoticed
      rank.memory.assign(p.shared, 0xff);
      rank.remote.assign(p.shared / 16, false);
      rank.barriers.resize(2 * kMaxStages);
      rank.stack.reset(new char[kStack]);
    }
  }

  template <class Body>
  void run(Body body) {
    struct Start {
      Cluster* cluster;
      Body* body;
      int rank;
      static void enter(unsigned high, unsigned low) {
        const auto address = static_cast<std::uintptr_t>(high) << 32 | low;
        Start* self = reinterpret_cast<Start*>(address);
        (*self->body)(self->rank);
        self->cluster->ranks[self->rank].done = true;
        self->cluster->leave(self->rank);
      }
    };
    std::vector<Start> starts;
    for (int r = 0; r < p.ranks; ++r) starts.push_back({this, &body, r});
    for (int r = 0; r < p.ranks; ++r) {
      Rank& rank = ranks[r];
      getcontext(&rank.context);
      rank.context.uc_stack.ss_sp = rank.stack.get();
      rank.context.uc_stack.ss_size = kStack;
      rank.context.uc_link = &scheduler_;
      const auto address = reinterpret_cast<std::uintptr_t>(&starts[r]);
      makecontext(&rank.context, reinterpret_cast<void (*)()>(&Start::enter), 2,
                  static_cast<unsigned>(address >> 32), static_cast<unsigned>(address));
    }
    schedule();
    if (error.empty() && !flying_.empty()) error = "a store was under way when its rank had left";
    for (const Rank& rank : ranks) {
      for (const Barrier& barrier : rank.barriers) {
        // armed for a step that does not come
        if (barrier.bytes != barrier.armed) fail("a barrier expected another number of bytes");
      }
    }
  }

  void leave(int r) { swapcontext(&ranks[r].context, &scheduler_); }
  void fail(const std::string& what) {
    if (error.empty()) error = what;
  }
  unsigned draw(unsigned n) { return static_cast<unsigned>(random_() % n); }

  void arrive(int r, int b, int bytes) {
    Barrier& barrier = ranks[r].barriers[b];
    if (barrier.arrivals == 0) return fail("a barrier was armed twice in a phase");
    barrier.arrivals = 0;
    barrier.armed = bytes;
    barrier.bytes += bytes;
    check(barrier);
  }

  void post(const Message& message) {
    flying_.push_back(message);
    // stores that take no time are one order among others
    if (order_ == 0) deliver(flying_.size() - 1);
  }

  const Program& p;
  std::vector<Rank> ranks;
  const int index, count;  // this cluster, and how many there are
  std::string error;

 private:
  void check(Barrier& barrier) {
    if (barrier.arrivals == 0 && barrier.bytes < 0) fail("a barrier got more bytes than expected");
    if (barrier.arrivals || barrier.bytes) return;
    barrier.arrivals = 1;
    ++barrier.phase;
  }

  void deliver(std::size_t i) {
    const Message message = flying_[i];
    flying_[i] = flying_.back();
    flying_.pop_back();
    Rank& to = ranks[message.peer];
    if (to.done) fail("a store reached a rank that had left");
    std::memcpy(&to.memory[message.byte], message.data, message.count);
    to.remote[message.byte / 16] = true;
    Barrier& barrier = to.barriers[message.barrier];
    barrier.bytes -= message.count;
    check(barrier);
  }

  bool ready(const Rank& rank) const {
    if (rank.done || rank.at_cluster_barrier) return false;
    return rank.waits_for < 0 || (rank.barriers[rank.waits_for].phase & 1) != rank.parity;
  }

  void schedule() {
    while (error.empty()) {
      std::vector<int> able;
      int waiting = 0, done = 0;
      for (int r = 0; r < p.ranks; ++r) {
        if (ready(ranks[r])) able.push_back(r);
        waiting += ranks[r].at_cluster_barrier;
        done += ranks[r].done;
      }
      if (done == p.ranks) return;
      if (waiting + done == p.ranks && waiting) {
        for (Rank& rank : ranks) rank.at_cluster_barrier = false;
        continue;
      }
      // order 1: stores as late as possible; 2: anything
      const bool late = order_ == 1 && !able.empty();
      if (!flying_.empty() && !late && (able.empty() || draw(4))) {
        for (unsigned i = 1 + draw(64); i > 0 && !flying_.empty(); --i) {
          deliver(draw(static_cast<unsigned>(flying_.size())));
        }
        continue;
      }
      if (able.empty()) return fail("all ranks wait for each other");
      Rank& next = ranks[able[draw(static_cast<unsigned>(able.size()))]];
      swapcontext(&scheduler_, &next.context);
    }
  }

  std::vector<Message> flying_;
  std::mt19937 random_;
  ucontext_t scheduler_;
  const int order_;

 public:
  const Mutation mutation;
  const int which;
};

// A rank of the emulated cluster, as rssm_cluster.h wants it.
class Machine {
 public:
  static constexpr bool kWatches = true;
  template <class T>
  using PerLane = std::array<T, kWarp>;
  template <class T>
  class PerThread {
   public:
    T& of(int warp, int lane) { return values_[warp * kWarp + lane]; }
    T& of_thread(int thread) { return values_[thread]; }

   private:
    std::vector<T> values_ = std::vector<T>(kThreads);
  };

  Machine(Cluster& cluster, int rank) : c(cluster), r(rank), me(cluster.ranks[rank]) {}

  int rank() const { return r; }
  int cluster() const { return c.index; }
  int clusters() const { return c.count; }
  unsigned char* shared() const { return me.memory.data(); }
  int buffer(int step) const { return c.mutation == Mutation::kBuffer ? 0 : step & 1; }

  template <class Body>
  void warps(Body body) {
    for (int warp = 0; warp < kWarps; ++warp) body(warp);
  }
  template <class Body>
  void lanes(Body body) {
    for (int lane = 0; lane < kWarp; ++lane) body(lane);
  }
  template <class Body>
  void threads(Body body) {
    for (int thread = 0; thread < kThreads; ++thread) body(thread);
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

  void sync() {
    if (c.draw(4) == 0) c.leave(r);
  }
  void set_up(int) {}
  void cluster_sync() {
    me.at_cluster_barrier = true;
    c.leave(r);
  }
  void arm(int barrier, int bytes) {
    c.arrive(r, barrier, bytes - (mutated(Mutation::kBytes, barrier) ? 16 : 0));
  }
  void wait(int barrier, int parity, int bytes) {
    if (!mutated(Mutation::kSkipWait, barrier)) {
      me.waits_for = barrier;
      me.parity = parity ^ mutated(Mutation::kParity, barrier);
      c.leave(r);
      me.waits_for = -1;
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
    me.copies_to.push_back(to);
    me.copies_from.push_back(from);
  }
  void copied() {
    for (std::size_t i = 0; i < me.copies_to.size(); ++i) *me.copies_to[i] = *me.copies_from[i];
    me.copies_to.clear();
    me.copies_from.clear();
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

  void retire(int byte, int bytes) {
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
  const int r;
  Rank& me;
};

}  // namespace fastrssm::cluster
