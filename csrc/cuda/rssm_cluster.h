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
  float min_std, action_min_std;
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
  FASTRSSM_CLUSTER int lanes_of(int units) const {
    int lanes = 4;
    while (2 * lanes < units) lanes *= 2;
    return lanes;
  }
  FASTRSSM_CLUSTER At place(int element, int lanes, int units) const {
    At to;
    to.b = element / lanes;
    to.u = element % lanes * 2;
    to.active = to.u < units;
    to.stored = b0 + to.b < p.B;
    to.row = static_cast<std::int64_t>(t) * p.B + b0 + to.b;
    return to;
  }
  // calls body(first) in every warp for each 32 lanes of the rows of a slice
  template <class Body>
  FASTRSSM_CLUSTER void rows_of(int units, Body body) {
    const int lanes = lanes_of(units);
    x.warps([&](int warp) {
      for (int first = warp * kWarp; first < kRows * lanes; first += kThreads) body(first, lanes);
    });
  }

  // column of a unit of this rank's slice; -1: padding
  FASTRSSM_CLUSTER int column_of(const Group& group, int u) const {
    const int block = rank * group.per_rank + u / kTile;
    return block < group.blocks ? group.rows.place(block, u % kTile).column : -1;
  }
  FASTRSSM_CLUSTER float vector(const Stage& stage, int part, int u) const {
    return at<float>(p.vectors)[stage.vectors + part * stage.product.group[0].units() + u];
  }

  // ---- exchange

  // Sends pairs of a slice to all ranks; four lanes join theirs to 16 bytes. `skip`: blocks of the
  // target before that of the group's first; `from`: the group's first block that is sent.
  FASTRSSM_CLUSTER void send(const typename Machine::template PerLane<std::uint32_t>& pairs,
                             int first, int lanes, int target, int per_rank, bool paired, int from,
                             int to, int barrier) {
    const int units = per_rank * (paired ? kTile / 2 : kTile);
    x.lanes([&](int lane) {
      Words words;
#pragma unroll
      for (int i = 0; i < 4; ++i) words.word[i] = x.from_lane(pairs, lane, lane / 4 * 4 + i);
      const int b = (first + lane) / lanes, u = (first + lane) % lanes / 4 * 8;
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
  FASTRSSM_CLUSTER void receive(const Stage& stage) { x.wait(stage.barrier, n & 1, stage.bytes); }

  // ---- norms over the units of all ranks

  // Sends two sums of each row of this rank, and waits for those of all ranks.
  FASTRSSM_CLUSTER void send_stats(const Stage& stage,
                                   const typename Machine::template PerLane<float>& one,
                                   const typename Machine::template PerLane<float>& two, int first,
                                   int lanes) {
    x.lanes([&](int lane) {
      const int b = (first + lane) / lanes;
      for (int peer = (first + lane) % lanes; peer < p.ranks; peer += lanes) {
        x.send_pair(peer, stage.stats + (rank * kRows + b) * 8, one[lane], two[lane],
                    stage.stats_barrier);
      }
    });
  }
  FASTRSSM_CLUSTER int units_of(const Group& group, int owner) const {
    const int left = group.rows.size - owner * group.units();
    return left < 0 ? 0 : left < group.units() ? left : group.units();
  }

  // ---- inputs

  FASTRSSM_CLUSTER float* input_buffer(int step) const {
    return at<float>(p.input_buffers) + (step & 1) * p.input_floats;
  }
  FASTRSSM_CLUSTER float fed(const Stage& stage, int which, int b, int u) const {
    const int i = stage.feed[which];
    if (i < 0) return 0.0f;
    const Feed& feed = p.feed[i];
    return input_buffer(
        n)[feed.place + b * feed.units() + (feed.whole && feed.axis.last == 1 ? 0 : u)];
  }

  // Begins to copy all inputs of a step into the buffer of step count `step`.
  FASTRSSM_CLUSTER void read_ahead(int time, int step) {
    for (int f = 0; f < p.feeds; ++f) {
      const Feed& feed = p.feed[f];
      const float* from = g.source[feed.source];
      const bool start = feed.before && time == 0;
      const int units = feed.units();
      float* to = input_buffer(step) + feed.place;
      if (!from) continue;
      const std::int64_t base =
          (static_cast<std::int64_t>(time - (feed.before ? 1 : 0)) * p.B + b0) * feed.ld +
          feed.at * p.T * p.B + feed.column;
      x.threads([&](int thread) {
        for (int i = thread; i < kRows * units; i += kThreads) {
          const int b = i / units, u = i % units;
          const int column = feed.whole ? u : column_of(feed, u);
          if (column < 0 || b0 + b >= p.B) {
            to[i] = 0.0f;
          } else {
            const std::int64_t row = static_cast<std::int64_t>(b) * feed.ld + column;
            x.copy(to + i, start ? g.deter0 + b0 * feed.ld + row : from + base + row);
          }
        }
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
  FASTRSSM_CLUSTER float* keep_of(int step) const { return at<float>(p.keep) + (step & 1) * kRows; }

  Machine& x;
  const Program& p;
  const Pointers& g;
  const int rank;
  std::int64_t b0 = 0;  // first row of the tile
  int t = 0;            // time
  int n = 0;            // steps so far, of all tiles: phases and buffers follow it
};

}  // namespace fastrssm::cluster
