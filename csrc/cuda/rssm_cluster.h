// What the forward and the backward cluster scan share: the slice of a rank, the exchange of
// results, and inputs that are read ahead. Products are in rssm_product.h.
//
// One source for the device and for its emulation on the host. A `Machine` says how threads are
// walked through: on the device `warps` and `lanes` call once, with the caller's own numbers, and
// `PerThread` is a register; on the host they are loops, and `PerThread` is an array. Between two
// `sync` no thread reads what another has written, and shuffles stand outside of branches.
#pragma once

#include "cuda/rssm_math.h"
#include "cuda/rssm_program.h"

#ifdef __CUDACC__
#define FASTRSSM_CLUSTER __device__ __forceinline__
#else
#define FASTRSSM_CLUSTER inline
#endif

namespace fastrssm::cluster {

// Device addresses of a launch; null: absent.
struct Pointers {
  const float* source[kSources];
  const unsigned char* is_first;
  const float *deter0, *stoch0;
  const float* part[kMaxLayers][3];  // bias, scale, shift
  const unsigned char* packed;
  float *deter, *stoch, *mean, *std, *action, *kept;
  float *gradients, *deter0_grad, *stoch0_grad, *given_action_grad;
  float min_std, unimix, action_min_std;
  // gradients of the world model's pre-activations are wanted, not only those of the policy's
  bool learns;
};

struct Words {
  std::uint32_t word[4];
};

// A lane's place in a slice of units: two neighbours of one row of the batch.
struct At {
  int b, u;          // row of the tile, unit of the slice
  bool active;       // not only there to fill the warp
  bool stored;       // a row of the batch
  std::int64_t row;  // t * B + row of the batch
};

template <class Machine, int kRowTiles>
class Member {
 public:
  static constexpr int kRows = kRowTiles * 8;

  FASTRSSM_CLUSTER Member(Machine& machine, const Program& program, const Pointers& pointers)
      : x(machine), p(program), g(pointers), rank(machine.rank()) {}

 protected:
  template <class T>
  FASTRSSM_CLUSTER T* at(int byte) const {
    return reinterpret_cast<T*>(x.shared() + byte);
  }
  // 1 << shift lanes are a row of pairs
  FASTRSSM_CLUSTER int shift_of(int units) const {
    int shift = 2;
    while ((2 << shift) < units) ++shift;
    return shift;
  }
  FASTRSSM_CLUSTER At place(int element, int shift, int units) const {
    At to;
    to.b = element >> shift;
    to.u = (element & ((1 << shift) - 1)) * 2;
    to.active = to.u < units;
    to.stored = b0 + to.b < p.B;
    to.row = static_cast<std::int64_t>(t) * p.B + b0 + to.b;
    return to;
  }
  // calls body(first, shift) in every warp for each 32 lanes of the rows of a slice
  template <class Body>
  FASTRSSM_CLUSTER void rows_of(int units, Body body) {
    const int shift = shift_of(units);
    x.warps([&](int warp) {
      for (int first = warp * kWarp; first < kRows << shift; first += kThreads) body(first, shift);
    });
  }

  // column of a unit of this rank's slice; -1: padding
  FASTRSSM_CLUSTER int column_of(const Group& group, int u) const {
    const int block = rank * group.per_rank + u / kTile;
    return block < group.blocks ? group.rows.place(block, u % kTile).column : -1;
  }
  // where a unit of this rank's slice of [stoch | action] comes from
  FASTRSSM_CLUSTER Place x_place(int u) const {
    const int block = rank * p.x_share + u / kTile;
    return block < p.x.blocks() ? p.x.place(block, u % kTile) : Place{0, 0, -1};
  }
  // the state in float32, and on the way back gradients: of the state, of [stoch | action]
  FASTRSSM_CLUSTER float& carry_h(int b, int u) const {
    return at<float>(p.carry_h)[b * kMaxSlice + u];
  }
  FASTRSSM_CLUSTER float& carry_x(int b, int u) const {
    return at<float>(p.carry_x)[b * kMaxSlice + u];
  }
  // whether the gradient of a stage's pre-activations is stored
  FASTRSSM_CLUSTER bool learns(const Stage& stage) const { return g.learns || stage.policy; }
  FASTRSSM_CLUSTER float vector(const Stage& stage, int part, int u) const {
    return at<float>(p.vectors)[stage.vectors + part * stage.product.group[0].units() + u];
  }

  // ---- exchange

  // Sends pairs of a slice to all ranks; four lanes join theirs to 16 bytes. Of the blocks, which
  // are of 16 units or, paired, of 8, those in [from, to) are sent, the first of them to `target`.
  FASTRSSM_CLUSTER void send(const typename Machine::template PerLane<std::uint32_t>& pairs,
                             int first, int shift, int target, int per_rank, bool paired, int from,
                             int to, int barrier) {
    const int units = per_rank * (paired ? kTile / 2 : kTile);
    x.lanes([&](int lane) {
      Words words;
#pragma unroll
      for (int i = 0; i < 4; ++i) words.word[i] = x.from_lane(pairs, lane, lane / 4 * 4 + i);
      const int element = first + lane;
      const int b = element >> shift, u = (element & ((1 << shift) - 1)) / 4 * 8;
      const int chunk =
          paired ? rank * per_rank + u / 8 : (rank * per_rank + u / kTile) * 2 + u / 8 % 2;
      const int block = paired ? chunk : chunk / 2;
      if (u >= units || block < from || block >= to) return;
      const int offset = paired ? chunk : chunk - 2 * from;
      const int byte = target + (offset / 2 * kRows + b) * kTile * 2 + offset % 2 * 16;
      for (int peer = lane % 4; peer < p.ranks; peer += 4) x.send(peer, byte, words, barrier);
    });
  }
  // what a rank without blocks sends
  FASTRSSM_CLUSTER void send_token(int barrier) {
    x.warps([&](int warp) {
      if (warp) return;
      x.lanes([&](int lane) {
        if (lane < p.ranks) x.send(lane, p.token + rank * 16, Words{}, barrier);
      });
    });
  }
  // The same for an operand of this rank's own units.
  FASTRSSM_CLUSTER void keep_own(const typename Machine::template PerLane<std::uint32_t>& pairs,
                                 int first, int shift, int target, int units) {
    x.lanes([&](int lane) {
      const At to = place(first + lane, shift, units);
      if (!to.active) return;
      const int pair = (to.u / kTile * kRows + to.b) * kTile + to.u % kTile;
      at<std::uint32_t>(target)[pair / 2] = pairs[lane];
    });
  }
  FASTRSSM_CLUSTER void receive(const Stage& stage) {
    if (stage.barrier >= 0) {
      x.wait(stage.barrier, n & 1, stage.bytes);
    } else {
      // sums were read, and nothing was received since
      x.sync();
    }
  }

  // ---- norms over the units of all ranks

  // Sends two sums of each row of this rank, and waits for those of all ranks.
  FASTRSSM_CLUSTER void send_stats(const Stage& stage,
                                   const typename Machine::template PerLane<float>& one,
                                   const typename Machine::template PerLane<float>& two, int first,
                                   int shift) {
    x.lanes([&](int lane) {
      const int b = (first + lane) >> shift, lanes = 1 << shift;
      for (int peer = ((first + lane) & (lanes - 1)); peer < p.ranks; peer += lanes) {
        x.send_pair(peer, stage.stats + (rank * kRows + b) * 8, one[lane], two[lane],
                    stage.stats_barrier);
      }
    });
  }
  FASTRSSM_CLUSTER int units_of(const Group& group, int owner) const {
    const int left = group.rows.units() - owner * group.units();
    return left < 0 ? 0 : left < group.units() ? left : group.units();
  }

  // ---- inputs

  FASTRSSM_CLUSTER float* input(const Feed& feed, int step) const {
    return at<float>(p.inputs) + feed.place + (step & 1) * feed.other;
  }
  FASTRSSM_CLUSTER float fed(const Stage& stage, int which, int b, int u) const {
    const int i = stage.feed[which];
    if (i < 0) return 0.0f;
    const Feed& feed = p.feed[i];
    return input(feed, n)[b * feed.units() + (feed.whole && feed.axis.last == 1 ? 0 : u)];
  }
  // the row of such numbers
  FASTRSSM_CLUSTER const float* fed_row(const Stage& stage, int which, int b) const {
    const Feed& feed = p.feed[stage.feed[which]];
    return input(feed, n) + b * feed.units();
  }

  // Begins to copy the inputs of a stage, or of all, for step count `step`. A warp takes a row;
  // each thread will read what it copies only behind `copied` and a `sync`.
  FASTRSSM_CLUSTER void read_ahead(int time, int step, int stage = -1) {
    for (int f = 0; f < p.feeds; ++f) {
      const Feed& feed = p.feed[f];
      if (stage >= 0 && feed.stage != stage) continue;
      const float* from = g.source[feed.source];
      if (!from) continue;
      const bool start = feed.before && time == 0;
      const int units = feed.units();
      float* to = input(feed, step);
      const std::int64_t base =
          (static_cast<std::int64_t>(time - (feed.before ? 1 : 0)) * p.B + b0) * feed.ld +
          feed.at * p.T * p.B + feed.column;
      x.warps([&](int warp) {
        x.lanes([&](int lane) {
#pragma unroll 1
          for (int b = warp; b < kRows; b += kWarps) {
#pragma unroll 1
            for (int u = lane; u < units; u += kWarp) {
              const int column = feed.whole ? u : column_of(feed, u);
              if (column < 0 || b0 + b >= p.B) {
                to[b * units + u] = 0.0f;
                continue;
              }
              const std::int64_t row = static_cast<std::int64_t>(b) * feed.ld + column;
              x.copy(to + b * units + u, start ? g.deter0 + b0 * feed.ld + row : from + base + row);
            }
          }
        });
      });
    }
  }
  FASTRSSM_CLUSTER int column_of(const Feed& feed, int u) const {
    const int width = feed.narrow ? kTile / 2 : kTile;
    const int block = rank * feed.per_rank + u / width - feed.first;
    if (feed.narrow) {
      const int index = block * width + u % width;
      return index < feed.axis.last ? index : -1;
    }
    return block < 0 || block >= feed.axis.blocks() ? -1 : feed.axis.place(block, u % width).column;
  }

  // 0 where an episode begins at `time`, else 1
  FASTRSSM_CLUSTER float keeps(int time, int b) const {
    const bool inside = g.is_first && b0 + b < p.B;
    return inside && g.is_first[static_cast<std::int64_t>(time) * p.B + b0 + b] ? 0.0f : 1.0f;
  }
  // The same of this step, or `later` steps after it, from what was read ahead.
  FASTRSSM_CLUSTER float keep(int b, int later = 0) const {
    if (!g.is_first || b0 + b >= p.B) return 1.0f;
    const unsigned char* first = at<unsigned char>(p.firsts) + ((n + later) & 1) * kFirstBytes;
    return first[(first_address(t + later) & 3) + b] ? 0.0f : 1.0f;
  }
  FASTRSSM_CLUSTER std::uintptr_t first_address(int time) const {
    return reinterpret_cast<std::uintptr_t>(g.is_first) + static_cast<std::int64_t>(time) * p.B +
           b0;
  }
  // Copies are of four bytes: whole words around those of the rows. At the ends of the array, where
  // a word is not all its own, bytes are read.
  FASTRSSM_CLUSTER void read_firsts(int time, int step) {
    if (!g.is_first) return;
    const std::uintptr_t begin = first_address(time);
    const std::int64_t left = p.B - b0, rows = left < kRows ? left : kRows;
    const int words = static_cast<int>(((begin & 3) + rows + 3) / 4);
    const std::uintptr_t from = begin & ~std::uintptr_t{3};
    const auto low = reinterpret_cast<std::uintptr_t>(g.is_first);
    const std::uintptr_t high = low + static_cast<std::int64_t>(p.T) * p.B;
    unsigned char* to = at<unsigned char>(p.firsts) + (step & 1) * kFirstBytes;
    x.threads([&](int thread) {
      if (thread >= words) return;
      const std::uintptr_t word = from + 4 * thread;
      if (word >= low && word + 4 <= high) {
        x.copy(reinterpret_cast<float*>(to) + thread, reinterpret_cast<const float*>(word));
        return;
      }
#pragma unroll 1
      for (std::uintptr_t byte = word; byte < word + 4; ++byte) {
        if (byte >= low && byte < high) {
          to[byte - from] = *reinterpret_cast<const unsigned char*>(byte);
        }
      }
    });
  }

  Machine& x;
  const Program& p;
  const Pointers& g;
  const int rank;
  std::int64_t b0 = 0;  // first row of the tile
  int t = 0;            // time
  int n = 0;            // steps so far, of all tiles: phases and buffers follow it
};

}  // namespace fastrssm::cluster
