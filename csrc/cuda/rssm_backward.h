// The backward cluster scan. Gradients of pre-activations are gathered as the forward scan gathers
// states, and every rank multiplies them with its slice of the transposed weights: no sums cross
// ranks, so their order is fixed. Weight gradients are products after the scan.
#pragma once

#include "cuda/rssm_norm.h"

namespace fastrssm::cluster {

template <class Machine, int kRowTiles>
class Backward : public Norms<Machine, kRowTiles, kBackwardHeld0, kBackwardHeld1> {
 public:
  using Base = Norms<Machine, kRowTiles, kBackwardHeld0, kBackwardHeld1>;
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
  FASTRSSM_CLUSTER float& carry_h(int b, int u) const {
    return this->template at<float>(p.carry_h)[b * kMaxSlice + u];
  }
  // of the latent, and of the actions behind it
  FASTRSSM_CLUSTER float& carry_x(int b, int u) const {
    return this->template at<float>(p.carry_x)[b * kMaxSlice + u];
  }
  // where a unit of this rank's slice of [stoch | action] comes from
  FASTRSSM_CLUSTER Place x_place(int u) const {
    const int block = rank * p.x_share + u / kTile;
    return block < p.x.blocks() ? p.x.place(block, u % kTile) : Place{0, 0, -1};
  }
  FASTRSSM_CLUSTER std::int64_t rows() const { return static_cast<std::int64_t>(p.T) * p.B; }

  FASTRSSM_CLUSTER void start() {
    x.sync();
    this->read_ahead(t, n, 0, 1);
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
        multiply_cell(stage.product);
      } else if (stage.product.segments) {
        this->multiply(stage.product);
      }
      if (Machine::kWatches && stage.product.segments) {
        const Segment& in = stage.product.segment[0];
        x.retire(in.operand, in.columns.blocks() * kRows * kTile * 2);
      }
      switch (stage.kind) {
        case Kind::kUndraw:
          undraw(stage);
          break;
        case Kind::kEluBack:
          hidden(stage);
          break;
        case Kind::kNormBack:
          this->norm_back(stage);
          break;
        case Kind::kGatesBack:
          gates(stage);
          break;
        case Kind::kCellBack:
          to_state(stage, 1, 0);
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
          unact(stage);
          break;
        default:
          to_state(stage, 1, 0);
          add_inputs(stage);
      }
      // a share of the next inputs, where all ranks wait for each other
      if (more) this->read_ahead(t - 1, n + 1, s, p.stages);
      if (stage.barrier >= 0) {
        this->receive(stage);
      } else {
        // sums were read, and nothing was received since
        x.sync();
      }
    }
    if (!more) return;
    x.copied();
    x.sync();
  }

  FASTRSSM_CLUSTER void multiply_cell(const Product& product) {
    x.warps([&](int warp) {
      PerLane<Sums> sums;
      this->template multiply_held<0, kBackwardHeld0>(product, 0, n, warp, held_, sums);
      if (warp < product.jobs) this->store_sums(product, 0, product.job[warp], sums);
    });
    x.sync();
  }

  // from the latent to [mean | raw std]
  FASTRSSM_CLUSTER void undraw(const Stage& stage) {
    const int units = p.x_share * kTile, blocks = blocks_of(p.S);
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent[2];
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float d[2][2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          const Place unit = to.active ? x_place(u) : Place{0, 0, -1};
          if (unit.column < 0 || unit.part) continue;
          const float grad = carry_x(to.b, u) + this->fed(stage, 0, to.b, u);
          d[0][j] = grad + this->fed(stage, 1, to.b, u);
          d[1][j] = (grad * this->fed(stage, 3, to.b, u) + this->fed(stage, 2, to.b, u)) *
                    std_slope(this->fed(stage, 4, to.b, u), p.split);
          if (!to.stored || !this->learns(stage)) continue;
          float* grads = g.gradients + stage.grad * rows() + to.row * 2 * p.S + unit.index;
          grads[0] = d[0][j];
          grads[p.S] = d[1][j];
        }
        sent[0][lane] = bfloat16_pair(d[0][0], d[0][1]);
        sent[1][lane] = bfloat16_pair(d[1][0], d[1][1]);
      });
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int target = stage.target + part * blocks * kRows * kTile * 2;
        this->send(sent[part], first, shift, target, p.x_share, false, 0, blocks, stage.barrier);
      }
    });
    if (rank * p.x_share >= blocks) this->send_token(stage.barrier);
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

  // from the new state to the gates [xn | r | z | hn]; stored as [r | z | xn | hn]
  FASTRSSM_CLUSTER void gates(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units();
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent[4];
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float d[4][2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          if (column < 0) continue;
          const float grad = carry_h(to.b, u) + this->fed(stage, 5, to.b, u) +
                             this->sum_of(stage.product, 0, 0, to.b, u);
          const float before = this->keep(to.b) * this->fed(stage, 4, to.b, u);
          const GateGrads back =
              cell_backward(grad, this->fed(stage, 0, to.b, u), this->fed(stage, 1, to.b, u),
                            this->fed(stage, 2, to.b, u), this->fed(stage, 3, to.b, u), before);
          carry_h(to.b, u) = back.before;
          d[0][j] = back.xn;
          d[1][j] = back.r;
          d[2][j] = back.z;
          d[3][j] = back.hn;
          if (!to.stored || !this->learns(stage)) continue;
          float* grads = g.gradients + stage.grad * rows() + to.row * 4 * p.D + column;
          grads[0] = back.r;
          grads[p.D] = back.z;
          grads[2 * p.D] = back.xn;
          grads[3 * p.D] = back.hn;
        }
#pragma unroll
        for (int gate = 0; gate < 4; ++gate)
          sent[gate][lane] = bfloat16_pair(d[gate][0], d[gate][1]);
      });
#pragma unroll
      for (int gate = 0; gate < 4; ++gate) {
        const int target = stage.target + gate * group.blocks * kRows * kTile * 2;
        this->send(sent[gate], first, shift, target, group.per_rank, false, 0, group.blocks,
                   stage.barrier);
      }
    });
    if (!group.owned(rank)) this->send_token(stage.barrier);
  }

  // to the state before the step: what passed the cell by is already there
  FASTRSSM_CLUSTER void to_state(const Stage& stage, int which, int segment) {
    const Product& product = stage.product;
    const Group& group = product.group[which];
    const int units = group.units();
    const bool cell = stage.kind == Kind::kCellBack;
    this->rows_of(units, [&](int first, int shift) {
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          if (!to.active || this->column_of(group, u) < 0) continue;
          const float keep = this->keep(to.b);
          const float total = keep * this->sum_of(product, which, segment, to.b, u);
          carry_h(to.b, u) = cell ? total + keep * carry_h(to.b, u) : total + carry_h(to.b, u);
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
          const Place unit = to.active ? x_place(u) : Place{0, 0, -1};
          if (unit.column < 0) continue;
          const float total = this->sum_of(stage.product, 0, 0, to.b, u);
          carry_x(to.b, u) = unit.part ? total : this->keep(to.b) * total;
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
          const Place unit = to.active ? x_place(u) : Place{0, 0, -1};
          if (unit.column < 0 || unit.part) continue;
          carry_x(to.b, u) += this->keep(to.b) * this->sum_of(stage.product, 0, 0, to.b, u);
        }
      });
    });
  }

  // from an action of the policy to its [mean | raw std]
  FASTRSSM_CLUSTER void unact(const Stage& stage) {
    const int units = p.x_share * kTile, skip = blocks_of(p.S), blocks = blocks_of(p.A);
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent[2];
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float d[2][2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          const Place unit = to.active ? x_place(u) : Place{0, 0, -1};
          if (unit.column < 0 || !unit.part) continue;
          const float grad = carry_x(to.b, u) + this->fed(stage, 0, to.b, u);
          const float y = this->fed(stage, 1, to.b, u);
          d[0][j] = grad * (1.0f - y * y);
          d[1][j] =
              d[0][j] * this->fed(stage, 2, to.b, u) * quick_sigmoid(this->fed(stage, 3, to.b, u));
          if (!to.stored || !this->learns(stage)) continue;
          float* grads = g.gradients + stage.grad * rows() + to.row * 2 * p.A + unit.index;
          grads[0] = d[0][j];
          grads[p.A] = d[1][j];
        }
        sent[0][lane] = bfloat16_pair(d[0][0], d[0][1]);
        sent[1][lane] = bfloat16_pair(d[1][0], d[1][1]);
      });
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const int target = stage.target + part * blocks * kRows * kTile * 2;
        this->send(sent[part], first, shift, target, p.x_share, false, skip, skip + blocks,
                   stage.barrier);
      }
    });
    const int end = (rank + 1) * p.x_share;
    if (end <= skip || rank * p.x_share >= skip + blocks) this->send_token(stage.barrier);
  }

  // the gradient of the first state
  FASTRSSM_CLUSTER void finish() {
    const int h_units = p.h_share * kTile, x_units = p.x_share * kTile;
    x.threads([&](int thread) {
      for (int i = thread; g.deter0_grad && i < kRows * h_units; i += kThreads) {
        const int b = i / h_units, column = rank * h_units + i % h_units;
        if (b0 + b >= p.B || column >= p.D) continue;
        g.deter0_grad[(b0 + b) * p.D + column] = carry_h(b, i % h_units);
      }
      for (int i = thread; g.stoch0_grad && i < kRows * x_units; i += kThreads) {
        const int b = i / x_units, column = rank * x_units + i % x_units;
        if (b0 + b >= p.B || column >= p.S) continue;
        g.stoch0_grad[(b0 + b) * p.S + column] = carry_x(b, i % x_units);
      }
    });
  }

  typename Machine::template PerThread<Held> held_;
};

}  // namespace fastrssm::cluster
