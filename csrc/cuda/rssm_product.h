// The slices of the weights that a rank holds, and their products with operands that all ranks have
// gathered.
#pragma once

#include "cuda/rssm_cluster.h"

namespace fastrssm::cluster {

template <class Machine, int kRowTiles, int kHeld0, int kHeld1>
class Engine : public Member<Machine, kRowTiles> {
 public:
  using Base = Member<Machine, kRowTiles>;
  using Base::Base;
  using Base::g;
  using Base::kRows;
  using Base::n;
  using Base::p;
  using Base::rank;
  using Base::x;
  template <class T>
  using PerLane = typename Machine::template PerLane<T>;
  static constexpr int kSumTile = kRows * kSumRow;
  struct Sums {
    float c[kRowTiles][4];
  };
  struct Held {
    std::uint32_t a[kHeld0 + kHeld1][4];
  };

 protected:
  FASTRSSM_CLUSTER void begin(typename Machine::template PerThread<Held>& held) {
    x.threads([&](int thread) {
      for (int i = thread; i < p.shared / 4; i += kThreads)
        this->template at<std::uint32_t>(0)[i] = 0;
    });
    x.sync();
    x.set_up(p.barriers);
    for (int s = 0; s < p.stages; ++s) {
      const Stage& stage = p.stage[s];
      if (stage.barrier >= 0) x.arm(stage.barrier, stage.bytes);
      if (stage.stats_barrier >= 0) x.arm(stage.stats_barrier, stage.stats_bytes);
      load_weights(stage.product, held);
      load_vectors(stage);
    }
    x.sync();
    x.cluster_sync();
  }

  FASTRSSM_CLUSTER void load_weights(const Product& product,
                                     typename Machine::template PerThread<Held>& held) {
    const unsigned char* from =
        g.packed + (static_cast<std::int64_t>(rank) * p.tiles + product.packed) * kTileBytes;
    if (!product.held) {
      const int words = product.rows * product.depth() * (kTileBytes / 16);
      x.threads([&](int thread) {
        for (int i = thread; i < words; i += kThreads) {
          this->template at<Words>(product.weights)[i] = reinterpret_cast<const Words*>(from)[i];
        }
      });
      return;
    }
    if (&product == &p.stage[p.main].product) {
      load_held<0, kHeld0>(product, 0, from, held);
      load_held<kHeld0, kHeld1>(product, 1, from, held);
    } else if constexpr (kHeld0 >= kSecondFirst + kSecondHeld0 + kSecondHeld1) {
      load_held<kSecondFirst, kSecondHeld0>(product, 0, from, held);
      load_held<kSecondFirst + kSecondHeld0, kSecondHeld1>(product, 1, from, held);
    }
  }

  // a warp's tiles of a segment: the first kCount in registers, the others in shared memory
  template <int kFirst, int kCount>
  FASTRSSM_CLUSTER void load_held(const Product& product, int s, const unsigned char* from,
                                  typename Machine::template PerThread<Held>& held) {
    x.warps([&](int warp) {
      x.lanes([&](int lane) {
        Held& registers = held.of(warp, lane);
        const bool works = warp < product.jobs;
        const Job& job = product.job[works ? warp : 0];
        const int count = works ? job.count[s] : 0;
        const Words* tile =
            reinterpret_cast<const Words*>(from) + lane +
            (job.row * product.depth() + (s ? product.segment[0].tiles : 0) + job.first[s]) * kWarp;
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
          const Words words = i < count ? tile[i * kWarp] : Words{};
#pragma unroll
          for (int r = 0; r < 4; ++r) registers.a[kFirst + i][r] = words.word[r];
        }
        Words* rest = this->template at<Words>(product.weights) + lane +
                      (warp * (product.rest0 + product.rest1) + (s ? product.rest0 : 0)) * kWarp;
        for (int i = kCount; i < count; ++i) rest[(i - kCount) * kWarp] = tile[i * kWarp];
      });
    });
  }

  FASTRSSM_CLUSTER float part_of(int layer, int part, int column) const {
    const float* from = layer < 0 ? nullptr : g.part[layer][part];
    return from && column >= 0 ? from[column] : 0.0f;
  }

  FASTRSSM_CLUSTER void load_vectors(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units();
    if (stage.layer < 0) return;
    x.threads([&](int thread) {
      for (int u = thread; u < units; u += kThreads) {
        float* to = this->template at<float>(p.vectors) + stage.vectors + u;
        if (group.paired) {
          const int index = rank * units + u, size = group.rows.size;
          for (int part = 0; part < 2; ++part) {
            to[part * units] = part_of(stage.layer, 0, index < size ? part * size + index : -1);
          }
          continue;
        }
        const int column = this->column_of(group, u), D = p.D;
        if (stage.kind == Kind::kBranch || stage.kind == Kind::kBranchBack) {
          const int block = rank * group.per_rank + u / kTile;
          const Place of = block < group.blocks ? group.rows.place(block, u % kTile) : Place{};
          for (int part = 0; part < 2; ++part) {
            to[part * units] = column < 0 ? 0.0f : part_of(stage.layer + of.part, part, of.index);
          }
          continue;
        }
        if (stage.kind == Kind::kBlockCell) {
          for (int gate = 0; gate < 3; ++gate) {
            const int place = (column / p.own * 3 + gate) * p.own + column % p.own;
            to[gate * units] = part_of(stage.layer, 0, column < 0 ? -1 : place);
          }
          continue;
        }
        if (stage.kind == Kind::kNormCell || stage.kind == Kind::kNormGatesBack) {
          for (int i = 0; i < 9; ++i) {
            to[i * units] = part_of(stage.layer, i / 3, column < 0 ? -1 : i % 3 * D + column);
          }
          continue;
        }
        if (stage.kind == Kind::kCell) {
          for (int gate = 0; gate < 3; ++gate) {
            const int place = column < 0 ? -1 : gate * D + column;
            const float input = part_of(stage.layer, 0, place);
            const float state = part_of(stage.layer + 1, 0, place);
            to[gate * units] = gate < 2 ? input + state : input;
            if (gate == 2) to[3 * units] = state;
          }
          continue;
        }
        for (int part = 0; part < 3; ++part) {
          to[part * units] = part_of(stage.layer, part, column);
        }
      }
    });
  }

  // of segment s in step `step`: the second segment is the state before it
  FASTRSSM_CLUSTER const unsigned char* input_tile(const Segment& in, int s, int step,
                                                   int tile) const {
    const int buffer = in.other * x.buffer(step + s);
    return x.shared() + in.operand + buffer + tile * kRows * kTile * 2;
  }

  FASTRSSM_CLUSTER void add_tile(const PerLane<Words>& a, const unsigned char* tile,
                                 PerLane<Sums>& sums) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) x.mma(a, tile + r * 8 * kTile * 2, sums, r);
  }

  // the tile of segment s at which a job's sums begin
  FASTRSSM_CLUSTER int begin_of(const Product& product, const Job& job, int s) const {
    const Group& group = product.group[job.group];
    const int before = rank * group.per_rank, block = before + job.block;
    // behind the last block weights are zero, and any operand does
    if (block >= group.blocks) return 0;
    return group.begin(product.segment[s].local ? job.block : block, s);
  }

  FASTRSSM_CLUSTER void store_sums(const Product& product, int segment, const Job& job,
                                   const PerLane<Sums>& sums) {
    float* to = this->template at<float>(p.sums) +
                ((segment * product.splits + job.split) * product.rows + job.row) * kSumTile;
    x.lanes([&](int lane) {
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int b = r * 8 + lane % 4 * 2 + c % 2, i = lane / 4 + c / 2 * 8;
          to[b * kSumRow + i] = sums[lane].c[r][c];
        }
      }
    });
  }

  // sums of one segment of the held product in step `step`, of this warp's tiles
  template <int kFirst, int kCount>
  FASTRSSM_CLUSTER void multiply_held(const Product& product, int s, int step, int warp,
                                      typename Machine::template PerThread<Held>& held,
                                      PerLane<Sums>& sums) {
    x.lanes([&](int lane) { sums[lane] = Sums{}; });
    if (warp >= product.jobs) return;
    const Job& job = product.job[warp];
    const Segment& in = product.segment[s];
    const int begin = begin_of(product, job, s), first = job.first[s], count = job.count[s];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // in fours, so that loads may go ahead
      if (i % 4 == 0 && i >= count) break;
      // behind the last tile weights are zero, and any operand does
      const int tile = first + i < in.tiles ? first + i : in.tiles - 1;
      PerLane<Words> a;
      x.lanes([&](int lane) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[lane].word[r] = held.of(warp, lane).a[kFirst + i][r];
      });
      add_tile(a, input_tile(in, s, step, begin + tile), sums);
    }
    const Words* rest = this->template at<Words>(product.weights) +
                        (warp * (product.rest0 + product.rest1) + (s ? product.rest0 : 0)) * kWarp;
    for (int i = kCount; i < count; ++i) {
      PerLane<Words> a;
      x.lanes([&](int lane) { a[lane] = rest[(i - kCount) * kWarp + lane]; });
      add_tile(a, input_tile(in, s, step, begin + first + i), sums);
    }
  }

  // a product whose weights are all in shared memory
  FASTRSSM_CLUSTER void multiply(const Product& product) {
    x.warps([&](int warp) {
      if (warp >= product.jobs) return;
      const Job& job = product.job[warp];
      const Words* weights =
          this->template at<Words>(product.weights) + job.row * product.depth() * kWarp;
      for (int s = 0; s < product.segments; ++s) {
        const Segment& in = product.segment[s];
        const int begin = begin_of(product, job, s);
        PerLane<Sums> sums;
        x.lanes([&](int lane) { sums[lane] = Sums{}; });
#pragma unroll 2
        for (int k = job.first[s]; k < job.first[s] + job.count[s]; ++k) {
          PerLane<Words> a;
          x.lanes([&](int lane) {
            a[lane] = weights[((s ? product.segment[0].tiles : 0) + k) * kWarp + lane];
          });
          add_tile(a, input_tile(in, s, n, begin + k), sums);
        }
        store_sums(product, s, job, sums);
      }
    });
    x.sync();
  }

  // the sum of an output: unit i of a tile row, over the splits in rising order
  FASTRSSM_CLUSTER float sum(const Product& product, int segment, int row, int b, int i) const {
    const float* from = this->template at<float>(p.sums) + b * kSumRow + i +
                        (segment * product.splits * product.rows + row) * kSumTile;
    float total = from[0];
    for (int split = 1; split < product.splits; ++split) {
      total += from[split * product.rows * kSumTile];
    }
    return total;
  }
  // of a unit of the slice of a group without copies
  FASTRSSM_CLUSTER float sum_of(const Product& product, int group, int segment, int b,
                                int u) const {
    return sum(product, segment, product.row(group, u / kTile, 0), b, u % kTile);
  }
  // the same of both segments; the second one is of the state, zero where an episode begins
  FASTRSSM_CLUSTER float sum_of_both(const Product& product, int b, int u) const {
    const float total = sum_of(product, 0, 0, b, u);
    return product.segments > 1 ? total + this->keep(b) * sum_of(product, 0, 1, b, u) : total;
  }
};

}  // namespace fastrssm::cluster
