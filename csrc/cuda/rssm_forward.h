// The forward cluster scan: one cluster takes a tile of rows through all times.
#pragma once

#include "cuda/rssm_draw.h"

namespace fastrssm::cluster {

template <class Machine, int kRowTiles>
class Forward : public Draws<Machine, kRowTiles, forward_held0(8 * kRowTiles), kForwardHeld1> {
 public:
  using Base = Draws<Machine, kRowTiles, forward_held0(8 * kRowTiles), kForwardHeld1>;
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
    this->read_firsts(0, n);
    this->read_ahead(0, n);
    x.threads([&](int thread) {
      fill(thread, p.h_operand + p.h_other * ((n + 1) & 1), 0, p.h,
           [&](int b, int u) { return g.deter0[(b0 + b) * p.D + u]; });
      fill(thread, p.x_operand, 0, {1, p.S, p.S}, [&](int b, int u) {
        return this->keeps(0, b) != 0.0f ? g.stoch0[(b0 + b) * p.S + u] : 0.0f;
      });
      if (p.action_feed >= 0) {
        fill(thread, p.x_operand, blocks_of(p.S), {1, p.A, p.A},
             [&](int b, int u) { return bounded(g.source[kAction][(b0 + b) * p.A + u]); });
      }
    });
    const Group& group = p.stage[p.cell].product.group[0];
    this->rows_of(group.units(), [&](int first, int shift) {
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, group.units());
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = to.active ? this->column_of(group, to.u + j) : -1;
          if (to.active) {
            this->carry_h(to.b, to.u + j) =
                column >= 0 && to.stored ? g.deter0[(b0 + to.b) * p.D + column] : 0.0f;
          }
        }
      });
    });
    x.copied();
    x.sync();
    multiply_state(n);
  }

  FASTRSSM_CLUSTER float bounded(float action) const {
    return p.bounded ? action / bound_of(action) : action;
  }

  // blocks of an operand from `block` on, from element (row, unit) of rows of the batch
  template <class Value>
  FASTRSSM_CLUSTER void fill(int thread, int operand, int block, const Axis& axis, Value value) {
    const int units = axis.blocks() * kTile;
#pragma unroll 1
    for (int i = thread; i < kRows * units; i += kThreads) {
      const int b = i / units, u = i % units, column = axis.place(u / kTile, u % kTile).column;
      if (column < 0) continue;
      const int to = ((block + u / kTile) * kRows + b) * kTile + u % kTile;
      const float from = b0 + b < p.B ? value(b, column) : 0.0f;
      this->template at<std::uint16_t>(operand)[to] =
          static_cast<std::uint16_t>(bfloat16_bits(from));
    }
  }

  // The state's part of the first product that reads it and the latent, as soon as the state is
  // there: it does not wait for the latent.
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
        multiply_main(stage.product);
      } else {
        this->multiply(stage.product);
      }
      retire(stage.product);
      switch (stage.kind) {
        case Kind::kNorm:
          this->norm(stage);
          break;
        case Kind::kBranch:
          this->branch(stage);
          break;
        case Kind::kCell:
        case Kind::kBlockCell:
          this->cell(stage);
          break;
        case Kind::kNormCell:
          this->norm_cell(stage);
          break;
        case Kind::kElu:
          hidden(stage);
          break;
        case Kind::kDrawClass:
          this->draw_class(stage);
          break;
        default:
          this->draw(stage);
      }
      // what follows stands where all ranks wait for each other
      if (s == p.main && more) {
        this->read_firsts(t + 1, n + 1);
        this->read_ahead(t + 1, n + 1);
      }
      if (stage.settles && more) settle();
      this->receive(stage);
    }
  }

  FASTRSSM_CLUSTER void multiply_main(const Product& product) {
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
  FASTRSSM_CLUSTER void retire(const Product& product) {
    if constexpr (Machine::kWatches) {
      for (int s = 0; s < product.segments; ++s) {
        const Segment& in = product.segment[s];
        if (in.again || in.local) continue;
        const int buffer = in.other * x.buffer(n + 1);
        x.retire(in.operand + buffer, in.columns.blocks() * kRows * kTile * 2);
      }
    }
  }

  // what was read ahead is taken, and the state's part of the next step multiplied
  FASTRSSM_CLUSTER void settle() {
    multiply_state(n + 1);
    x.copied();
    if (p.action_feed < 0) return;
    // each thread takes what it has copied itself: the others' is there only behind a `sync`
    const float* from = this->input(p.feed[p.action_feed], n + 1);
    std::uint16_t* operand = this->template at<std::uint16_t>(p.x_operand);
    x.warps([&](int warp) {
      x.lanes([&](int lane) {
#pragma unroll 1
        for (int b = warp; b < kRows; b += kWarps) {
#pragma unroll 1
          for (int u = lane; u < p.A; u += kWarp) {
            operand[((blocks_of(p.S) + u / kTile) * kRows + b) * kTile + u % kTile] =
                static_cast<std::uint16_t>(bfloat16_bits(bounded(from[b * p.A + u])));
          }
        }
      });
    });
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
          y[j][lane] = elu(this->sum_of_both(product, to.b, u) + this->vector(stage, 0, u) +
                           this->fed(stage, 0, to.b, u));
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

  typename Machine::template PerThread<Held> held_;
  typename Machine::template PerThread<Sums> state_;
};

}  // namespace fastrssm::cluster
