// The forward cluster scan: one cluster takes a tile of rows through all times.
#pragma once

#include "cuda/rssm_norm.h"

namespace fastrssm::cluster {

template <class Machine, int kRowTiles>
class Forward : public Norms<Machine, kRowTiles, forward_held0(8 * kRowTiles), kForwardHeld1> {
 public:
  using Base = Norms<Machine, kRowTiles, forward_held0(8 * kRowTiles), kForwardHeld1>;
  using Base::b0;
  using Base::Base;
  using Base::g;
  using Base::kRows;
  using Base::n;
  using Base::p;
  using Base::rank;
  using Base::t;
  using Base::x;
  using typename Base::Held;
  static constexpr int kHeld0 = forward_held0(8 * kRowTiles);
  using typename Base::Sums;
  template <class T>
  using PerLane = typename Machine::template PerLane<T>;

  // every tile of rows whose turn it is among the clusters
  FASTRSSM_CLUSTER void run() {
    this->begin(held_);
    for (b0 = x.cluster() * std::int64_t{kRows}; b0 < p.B;
         b0 += x.clusters() * std::int64_t{kRows}) {
      t = 0;
      start();
      for (t = 0; t < p.T; ++t, ++n) step();
    }
    // no rank may leave while others write to it
    x.cluster_sync();
  }

 private:
  FASTRSSM_CLUSTER const Stage& main() const { return p.stage[p.main]; }

  // the state before the first step, in every rank; its own slice in float32 too
  FASTRSSM_CLUSTER void start() {
    x.sync();
    this->read_ahead(0, n, 0, 1);
    x.threads([&](int thread) {
      fill(thread, p.h_operand + p.h_other * ((n + 1) & 1), 0, p.D,
           [&](int b, int u) { return g.deter0[(b0 + b) * p.D + u]; });
      fill(thread, p.x_operand, 0, p.S, [&](int b, int u) {
        return this->keeps(0, b) != 0.0f ? g.stoch0[(b0 + b) * p.S + u] : 0.0f;
      });
      if (p.action_feed >= 0) {
        fill(thread, p.x_operand, blocks_of(p.S), p.A,
             [&](int b, int u) { return g.source[kAction][(b0 + b) * p.A + u]; });
      }
    });
    const Group& group = main().product.group[0];
    this->rows_of(group.units(), [&](int first, int shift) {
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, group.units());
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = to.active ? this->column_of(group, to.u + j) : -1;
          if (to.active) {
            carry(to.b, to.u + j) =
                column >= 0 && to.stored ? g.deter0[(b0 + to.b) * p.D + column] : 0.0f;
          }
        }
      });
    });
    x.copied();
    x.sync();
    multiply_state(n);
  }

  // an operand [units] of this rank from element (row, unit) of rows of the batch
  template <class Value>
  FASTRSSM_CLUSTER void fill(int thread, int operand, int block, int units, Value value) {
#pragma unroll 1
    for (int i = thread; i < kRows * units; i += kThreads) {
      const int b = i / units, u = i % units;
      const int to = ((block + u / kTile) * kRows + b) * kTile + u % kTile;
      const float from = b0 + b < p.B ? value(b, u) : 0.0f;
      this->template at<std::uint16_t>(operand)[to] =
          static_cast<std::uint16_t>(bfloat16_bits(from));
    }
  }

  // The state's part of the gates, as soon as the state is there: it does not wait for the latent.
  FASTRSSM_CLUSTER void multiply_state(int step) {
    x.warps([&](int warp) {
      PerLane<Sums> sums;
      this->template multiply_held<kHeld0, kForwardHeld1>(main().product, 1, step, warp, held_,
                                                          sums);
      x.lanes([&](int lane) { state_.of(warp, lane) = sums[lane]; });
    });
  }

  FASTRSSM_CLUSTER void step() {
    const bool more = t + 1 < p.T;
    for (int s = 0; s < p.stages; ++s) {
      const Stage& stage = p.stage[s];
      if (s == p.main) {
        multiply_cell(stage.product);
      } else {
        this->multiply(stage.product);
      }
      retire(stage);
      switch (stage.kind) {
        case Kind::kNorm:
          this->norm(stage);
          break;
        case Kind::kCell:
          cell(stage);
          break;
        case Kind::kElu:
          hidden(stage);
          break;
        default:
          draw(stage);
      }
      // what follows stands where all ranks wait for each other
      if (s == p.main && more) this->read_ahead(t + 1, n + 1, 0, 1);
      if (stage.settles && more) settle();
      this->receive(stage);
    }
  }

  FASTRSSM_CLUSTER void multiply_cell(const Product& product) {
    x.warps([&](int warp) {
      PerLane<Sums> sums;
      this->template multiply_held<0, kHeld0>(product, 0, n, warp, held_, sums);
      if (warp >= product.jobs) return;
      const Job& job = product.job[warp];
      this->store_sums(product, 0, job, sums);
      x.lanes([&](int lane) { sums[lane] = state_.of(warp, lane); });
      this->store_sums(product, 1, job, sums);
    });
    x.sync();
  }

  // operands that nobody reads any more
  FASTRSSM_CLUSTER void retire(const Stage& stage) {
    if (!Machine::kWatches) return;
    const Product& product = stage.product;
    for (int s = 0; s < product.segments; ++s) {
      const Segment& in = product.segment[s];
      const bool policy = stage.kind == Kind::kElu && product.segments > 1;
      const bool early = in.other && s == 0;
      if (policy || early) continue;
      const int buffer = in.other * x.buffer(n + 1);
      x.retire(in.operand + buffer, in.columns.blocks() * kRows * kTile * 2);
    }
  }

  // what was read ahead is taken, and the state's part of the next step multiplied
  FASTRSSM_CLUSTER void settle() {
    multiply_state(n + 1);
    x.copied();
    if (p.action_feed < 0) return;
    // each thread takes what it has copied itself: the others' is there only behind a `sync`
    const float* from = this->input_buffer(n + 1) + p.feed[p.action_feed].place;
    std::uint16_t* operand = this->template at<std::uint16_t>(p.x_operand);
    x.warps([&](int warp) {
      x.lanes([&](int lane) {
#pragma unroll 1
        for (int b = warp; b < kRows; b += kWarps) {
#pragma unroll 1
          for (int u = lane; u < p.A; u += kWarp) {
            operand[((blocks_of(p.S) + u / kTile) * kRows + b) * kTile + u % kTile] =
                static_cast<std::uint16_t>(bfloat16_bits(from[b * p.A + u]));
          }
        }
      });
    });
  }

  FASTRSSM_CLUSTER void cell(const Stage& stage) {
    const Product& product = stage.product;
    const Group& group = product.group[0];
    const int units = group.units(), target = stage.target + stage.other * x.buffer(n);
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      PerLane<Gates> kept[2];
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float h[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, i = u % kTile,
                    column = to.active ? this->column_of(group, u) : -1;
          kept[j][lane] = Gates{};
          if (column < 0) continue;
          const float keep = this->keep(to.b);
          float part[2][3];
#pragma unroll
          for (int gate = 0; gate < 3; ++gate) {
            const int row = product.row(0, u / kTile, gate);
            part[0][gate] = this->sum(product, 0, row, to.b, i) + this->vector(stage, gate, u);
            part[1][gate] = keep * this->sum(product, 1, row, to.b, i);
          }
          const Gates gates =
              cell_forward(part[0][0] + part[1][0], part[0][1] + part[1][1], part[0][2],
                           part[1][2] + this->vector(stage, 3, u), keep * carry(to.b, u));
          carry(to.b, u) = h[j] = gates.h;
          kept[j][lane] = gates;
        }
        sent[lane] = bfloat16_pair(h[0], h[1]);
      });
      this->send(sent, first, shift, target, group.per_rank, false, 0, group.blocks, stage.barrier);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = to.active ? this->column_of(group, to.u + j) : -1;
          if (column < 0 || !to.stored) continue;
          const Gates& gates = kept[j][lane];
          g.deter[to.row * p.D + column] = gates.h;
          if (!g.kept) continue;
          float* keep = g.kept + stage.keep * p.T * p.B + to.row * 4 * p.D + column;
          keep[0] = gates.r;
          keep[p.D] = gates.z;
          keep[2 * p.D] = gates.n;
          keep[3 * p.D] = gates.hn;
        }
      });
    });
    if (!group.owned(rank)) this->send_token(stage.barrier);
  }

  // y = elu(sums)
  FASTRSSM_CLUSTER void hidden(const Stage& stage) {
    const Product& product = stage.product;
    const Group& group = product.group[0];
    const int units = group.units(), width = group.rows.size + group.rows.last;
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      PerLane<float> y[2];
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          y[j][lane] = 0.0f;
          if (!to.active || this->column_of(group, u) < 0) continue;
          float total = this->sum_of(product, 0, 0, to.b, u) + this->vector(stage, 0, u) +
                        this->fed(stage, 0, to.b, u);
          // a policy's second segment is the state, zero where an episode begins
          if (product.segments > 1) {
            total += this->keep(to.b) * this->sum_of(product, 0, 1, to.b, u);
          }
          y[j][lane] = elu(total);
        }
        sent[lane] = bfloat16_pair(y[0][lane], y[1][lane]);
      });
      this->send(sent, first, shift, stage.target, group.per_rank, false, 0, group.blocks,
                 stage.barrier);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = to.active ? this->column_of(group, to.u + j) : -1;
          if (column < 0 || !to.stored || !g.kept) continue;
          g.kept[stage.keep * p.T * p.B + to.row * width + column] = y[j][lane];
        }
      });
    });
    if (!group.owned(rank)) this->send_token(stage.barrier);
  }

  // the latent, or the action of a policy
  FASTRSSM_CLUSTER void draw(const Stage& stage) {
    const Product& product = stage.product;
    const Group& group = product.group[0];
    const bool acts = stage.kind == Kind::kAct;
    const int units = group.units(), size = group.rows.size;
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      PerLane<float> mean[2], raw[2], value[2];
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        const float min_std = acts ? g.action_min_std : g.min_std;
        float operand[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, block = u / 8, i = u % 8;
          mean[j][lane] = raw[j][lane] = value[j][lane] = 0.0f;
          if (!to.active || rank * units + u >= size) continue;
          mean[j][lane] = this->sum(product, 0, block, to.b, i) + this->vector(stage, 0, u);
          raw[j][lane] = this->sum(product, 0, block, to.b, i + 8) + this->vector(stage, 1, u);
          const float std = std_of(raw[j][lane], acts || p.split, min_std);
          value[j][lane] = mean[j][lane] + std * this->fed(stage, 0, to.b, u);
          if (acts) value[j][lane] = quick_tanh(value[j][lane]);
          // the next step sees no latent of another episode
          const bool last = acts || t + 1 == p.T;
          operand[j] = last || this->keep(to.b, 1) != 0.0f ? value[j][lane] : 0.0f;
        }
        sent[lane] = bfloat16_pair(operand[0], operand[1]);
      });
      this->send(sent, first, shift, stage.target, group.per_rank, true, 0, group.blocks,
                 stage.barrier);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int index = rank * units + to.u + j;
          if (!to.active || !to.stored || index >= size) continue;
          const std::int64_t at = to.row * size + index;
          (acts ? g.action : g.stoch)[at] = value[j][lane];
          if (!acts) {
            g.mean[at] = mean[j][lane];
            g.std[at] = std_of(raw[j][lane], p.split, g.min_std);
          }
          if (g.kept) g.kept[stage.keep * p.T * p.B + at] = raw[j][lane];
        }
      });
    });
    if (!group.owned(rank)) this->send_token(stage.barrier);
  }

  FASTRSSM_CLUSTER float& carry(int b, int u) const {
    return this->template at<float>(p.carry_h)[b * kMaxSlice + u];
  }

  typename Machine::template PerThread<Held> held_;
  typename Machine::template PerThread<Sums> state_;
};

}  // namespace fastrssm::cluster
