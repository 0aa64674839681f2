// The cluster scan on the host, for tests: the kernels' own source over lanes that are loops, warps
// that are fibers and run in any order between two `sync`, barriers with phases and expected bytes,
// and stores that arrive late and in any order. What nobody reads any more becomes NaN, so a read
// before its data, or data before its reader is done, shows in the results. Not part of the module.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/rssm_cluster.h"

namespace fastrssm::cluster {
constexpr std::size_t kStack = 1 << 17;

// Errors that tests put in: the emulation must notice every one.
enum class Mutation : int { kNone, kParity, kBytes, kBuffer, kToken, kSkipWait, kBarrier, kSync };

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
  int at_sync = 0;  // warps
  int generation = 0;
  int left = kWarps;
};

struct Fiber {
  int rank, warp;
  std::vector<float*> copies_to;
  std::vector<const float*> copies_from;
  std::unique_ptr<char[]> stack;
  ucontext_t context;
  int waits_for = -1, parity = 0;  // a barrier
  int waits_until = 0;             // a generation of its rank
  int syncs = 0;
  bool at_cluster_barrier = false, done = false;
};

class Cluster {
 public:
  Cluster(const Program& program, int index, int count, int order, int seed, Mutation mutation,
          int which)
      : p(program),
        ranks(program.ranks),
        fibers(program.ranks * kWarps),
        index(index),
        count(count),
        order_(order),
        mutation(mutation),
        which(which) {
    random_.seed(static_cast<unsigned>(seed));
    slow_ = static_cast<int>(draw(static_cast<unsigned>(fibers.size())));
    for (Rank& rank : ranks) {
      // more than it declares: what is written behind the end must not stay unnoticed
      rank.memory.assign(p.shared, 0xff);
      rank.remote.assign(p.shared / 16, false);
      rank.barriers.resize(2 * kMaxStages);
    }
    for (std::size_t i = 0; i < fibers.size(); ++i) {
      fibers[i].rank = static_cast<int>(i) / kWarps;
      fibers[i].warp = static_cast<int>(i) % kWarps;
      fibers[i].stack.reset(new char[kStack]);
    }
  }

  template <class Body>
  void run(Body body) {
    struct Start {
      Cluster* cluster;
      Body* body;
      Fiber* fiber;
      static void enter(unsigned high, unsigned low) {
        const auto address = static_cast<std::uintptr_t>(high) << 32 | low;
        Start* self = reinterpret_cast<Start*>(address);
        (*self->body)(*self->fiber);
        self->fiber->done = true;
        --self->cluster->ranks[self->fiber->rank].left;
        self->cluster->leave(*self->fiber);
      }
    };
    std::vector<Start> starts;
    for (Fiber& fiber : fibers) starts.push_back({this, &body, &fiber});
    for (std::size_t i = 0; i < fibers.size(); ++i) {
      Fiber& fiber = fibers[i];
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler_;
      const auto address = reinterpret_cast<std::uintptr_t>(&starts[i]);
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Start::enter), 2,
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

  void leave(Fiber& fiber) { swapcontext(&fiber.context, &scheduler_); }
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
  std::vector<Fiber> fibers;
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
    if (!to.left) fail("a store reached a rank that had left");
    std::memcpy(&to.memory[message.byte], message.data, message.count);
    to.remote[message.byte / 16] = true;
    Barrier& barrier = to.barriers[message.barrier];
    barrier.bytes -= message.count;
    check(barrier);
  }

  bool ready(const Fiber& fiber) const {
    const Rank& rank = ranks[fiber.rank];
    if (fiber.done || fiber.at_cluster_barrier || rank.generation < fiber.waits_until) return false;
    return fiber.waits_for < 0 || (rank.barriers[fiber.waits_for].phase & 1) != fiber.parity;
  }

  void schedule() {
    std::vector<int> able;
    while (error.empty()) {
      able.clear();
      std::size_t waiting = 0, done = 0;
      for (std::size_t i = 0; i < fibers.size(); ++i) {
        if (static_cast<int>(i) != slow_ && ready(fibers[i])) able.push_back(static_cast<int>(i));
        waiting += fibers[i].at_cluster_barrier;
        done += fibers[i].done;
      }
      if (done == fibers.size()) return;
      if (waiting + done == fibers.size() && waiting) {
        for (Fiber& fiber : fibers) fiber.at_cluster_barrier = false;
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
      // one warp goes on only when nothing else does
      if (able.empty() && ready(fibers[slow_])) able.push_back(slow_);
      if (able.empty()) return fail("all wait for each other");
      // who is able stays so: a few go on before all are asked again
      for (unsigned n = 1 + draw(16); n > 0 && !able.empty(); --n) {
        std::swap(able[draw(static_cast<unsigned>(able.size()))], able.back());
        swapcontext(&scheduler_, &fibers[able.back()].context);
        able.pop_back();
      }
    }
  }

  std::vector<Message> flying_;
  std::mt19937 random_;
  ucontext_t scheduler_;
  const int order_;
  int slow_ = 0;

 public:
  const Mutation mutation;
  const int which;
};

}  // namespace fastrssm::cluster
