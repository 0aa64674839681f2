// The backward cluster scan. Gradients of pre-activations are gathered as the forward scan gathers
// states, and every rank multiplies them with its slice of the transposed weights: no sums cross
// ranks, so their order is fixed. Weight gradients are products after the scan.
#pragma once

#include "cuda/rssm_draw.h"

namespace fastrssm::cluster {

template <class Machine, int kRowTiles>
class Backward : public Draws<Machine, kRowTiles, kBackwardHeld0, kBackwardHeld1> {
 public:
  using Base = Draws<Machine, kRowTiles, kBackwardHeld0, kBackwardHeld1>;
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
  using typename Base::Sums;
  template <class T>
  using PerLane = typename Machine::template PerLane<T>;

  // every tile of rows whose turn it is among the clusters
  FASTRSSM_CLUSTER void run() {
    this->begin(held_);
    for (b0 = x.cluster() * std::int64_t{kRows}; b0 < p.B;
         b0 += x.clusters() * std::int64_t{kRows}) {
      t = p.T - 1;
      start();
      for (; t >= 0; --t, ++n) step();
      finish();
    }
    // no rank may leave while others write to it
    x.cluster_sync();
  }

 private:
  FASTRSSM_CLUSTER std::int64_t rows() const { return static_cast<std::int64_t>(p.T) * p.B; }

  FASTRSSM_CLUSTER void start() {
    x.sync();
    this->read_firsts(t, n);
    this->read_ahead(t, n);
    x.threads([&](int thread) {
      for (int i = thread; i < kRows * kMaxSlice; i += kThreads) {
        this->template at<float>(p.carry_h)[i] = this->template at<float>(p.carry_x)[i] = 0.0f;
      }
    });
    x.copied();
    x.sync();
  }

  FASTRSSM_CLUSTER void step() {
    const bool more = t > 0;
    for (int s = 0; s < p.stages; ++s) {
      const Stage& stage = p.stage[s];
      if (s == p.main) {
        multiply_main(stage.product);
      } else if (s == p.second) {
        multiply_second(stage.product);
      } else if (stage.product.segments) {
        this->multiply(stage.product);
      }
      retire(stage.product);
      switch (stage.kind) {
        case Kind::kUndraw:
          this->undraw(stage);
          break;
        case Kind::kUndrawClass:
          this->undraw_class(stage);
          break;
        case Kind::kEluBack:
          hidden(stage);
          break;
        case Kind::kNormBack:
          this->norm_back(stage);
          break;
        case Kind::kGatesBack:
          this->gates(stage);
          break;
        case Kind::kBlockGatesBack:
          this->gates_in_blocks(stage);
          break;
        case Kind::kNormGatesBack:
          this->norm_gates_back(stage);
          break;
        case Kind::kBranchBack:
          this->branch_back(stage);
          break;
        case Kind::kInputsBack:
          to_state(stage);
          to_inputs(stage);
          break;
        case Kind::kCellBack:
          to_state(stage);
          if (stage.barrier >= 0) {
            // what follows waits for warps that send, not for those that only read sums here
            x.sync();
            this->norm_back(stage);
          } else {
            to_inputs(stage);
          }
          break;
        case Kind::kPreBack:
          to_inputs(stage);
          break;
        case Kind::kUnact:
          this->unact(stage);
          break;
        default:
          to_state(stage);
          add_inputs(stage);
      }
      // the next inputs of a stage that is over, where all ranks wait for each other
      if (more) {
        if (s == 0) {
          this->read_firsts(t - 1, n + 1);
          this->read_ahead(t - 1, n + 1, p.stages - 2);
          this->read_ahead(t - 1, n + 1, p.stages - 1);
        } else if (s + 1 < p.stages) {
          this->read_ahead(t - 1, n + 1, s - 1);
        }
      }
      this->receive(stage);
    }
    if (!more) return;
    x.copied();
    x.sync();
  }

  // operands that nobody reads any more
  FASTRSSM_CLUSTER void retire(const Product& product) {
    if constexpr (Machine::kWatches) {
      for (int s = 0; s < product.segments; ++s) {
        const Segment& in = product.segment[s];
        if (in.again || in.local) continue;
        x.retire(in.operand, in.columns.blocks() * kRows * kTile * 2);
      }
    }
  }

  FASTRSSM_CLUSTER void multiply_main(const Product& product) {
    x.warps([&](int warp) {
      PerLane<Sums> sums;
      this->template multiply_held<0, kBackwardHeld0>(product, 0, n, warp, held_, sums);
      if (warp < product.jobs) this->store_sums(product, 0, product.job[warp], sums);
    });
    x.sync();
  }

  FASTRSSM_CLUSTER void multiply_second(const Product& product) {
    x.warps([&](int warp) {
      if (warp >= product.jobs) return;
      const Job& job = product.job[warp];
      PerLane<Sums> sums;
      this->template multiply_held<kSecondFirst, kSecondHeld0>(product, 0, n, warp, held_, sums);
      this->store_sums(product, 0, job, sums);
      this->template multiply_held<kSecondFirst + kSecondHeld0, kSecondHeld1>(product, 1, n, warp,
                                                                              held_, sums);
      this->store_sums(product, 1, job, sums);
    });
    x.sync();
  }

  // d = elu'(y) sums
  FASTRSSM_CLUSTER void hidden(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units(), width = group.rows.size + group.rows.last;
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float d[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          if (column < 0) continue;
          d[j] =
              this->sum_of(stage.product, 0, 0, to.b, u) * elu_slope(this->fed(stage, 0, to.b, u));
          if (!to.stored || !this->learns(stage)) continue;
          g.gradients[stage.grad * rows() + to.row * width + column] = d[j];
        }
        sent[lane] = bfloat16_pair(d[0], d[1]);
      });
      this->send(sent, first, shift, stage.target, group.per_rank, false, 0, group.blocks,
                 stage.barrier);
    });
    if (!group.owned(rank)) this->send_token(stage.barrier);
  }

  // to the state before the step: what passed the cell by is already there
  FASTRSSM_CLUSTER void to_state(const Stage& stage) {
    const Product& product = stage.product;
    const Group& group = product.group[1];
    const int units = group.units();
    const bool cell = stage.kind != Kind::kPolicyBack;
    this->rows_of(units, [&](int first, int shift) {
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          if (!to.active || this->column_of(group, u) < 0) continue;
          float total = this->sum_of(product, 1, 0, to.b, u);
          if (product.segments > 1) total += this->sum_of(product, 1, 1, to.b, u);
          const float carried = this->carry_h(to.b, u);
          const float keep = this->keep(to.b);
          this->carry_h(to.b, u) = keep * total + (cell ? keep * carried : carried);
        }
      });
    });
  }

  // to [stoch | action]
  FASTRSSM_CLUSTER void to_inputs(const Stage& stage) {
    const int units = p.x_share * kTile;
    this->rows_of(units, [&](int first, int shift) {
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          const Place unit = to.active ? this->x_place(u) : Place{0, 0, -1};
          if (unit.column < 0) continue;
          float total = this->sum_of(stage.product, 0, 0, to.b, u);
          if (p.bounded && unit.part) total /= bound_of(this->fed(stage, 0, to.b, u));
          this->carry_x(to.b, u) = unit.part ? total : this->keep(to.b) * total;
          if (unit.part && g.given_action_grad && to.stored) {
            g.given_action_grad[to.row * p.A + unit.index] = total;
          }
        }
      });
    });
  }

  // what the policy saw of the latent
  FASTRSSM_CLUSTER void add_inputs(const Stage& stage) {
    const int units = p.x_share * kTile;
    this->rows_of(units, [&](int first, int shift) {
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          const Place unit = to.active ? this->x_place(u) : Place{0, 0, -1};
          if (unit.column < 0 || unit.part) continue;
          this->carry_x(to.b, u) += this->keep(to.b) * this->sum_of(stage.product, 0, 0, to.b, u);
        }
      });
    });
  }

  // the gradient of the first state
  FASTRSSM_CLUSTER void finish() {
    const int h_units = p.h_share * kTile, x_units = p.x_share * kTile;
    x.threads([&](int thread) {
      for (int i = thread; g.deter0_grad && i < kRows * h_units; i += kThreads) {
        const int b = i / h_units, u = i % h_units, block = rank * p.h_share + u / kTile;
        const int column = block < p.h.blocks() ? p.h.place(block, u % kTile).column : -1;
        if (b0 + b >= p.B || column < 0) continue;
        g.deter0_grad[(b0 + b) * p.D + column] = this->carry_h(b, u);
      }
      for (int i = thread; g.stoch0_grad && i < kRows * x_units; i += kThreads) {
        const int b = i / x_units, column = rank * x_units + i % x_units;
        if (b0 + b >= p.B || column >= p.S) continue;
        g.stoch0_grad[(b0 + b) * p.S + column] = this->carry_x(b, i % x_units);
      }
    });
  }

  typename Machine::template PerThread<Held> held_;
};

}  // namespace fastrssm::cluster
