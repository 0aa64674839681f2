// The cells without a norm of their gates: from sums to the new state, and back to the gates.
#pragma once

#include "cuda/rssm_norm_gates.h"

namespace fastrssm::cluster {

template <class Machine, int kRowTiles, int kHeld0, int kHeld1>
class Cells : public NormCells<Machine, kRowTiles, kHeld0, kHeld1> {
 public:
  using Base = NormCells<Machine, kRowTiles, kHeld0, kHeld1>;
  using Base::Base;
  using Base::g;
  using Base::kRows;
  using Base::n;
  using Base::p;
  using Base::rank;
  using Base::x;
  template <class T>
  using PerLane = typename Machine::template PerLane<T>;

 protected:
  // torch's GRU, and block_gru from its own product
  FASTRSSM_CLUSTER void cell(const Stage& stage) {
    const Product& product = stage.product;
    const Group& group = product.group[0];
    const int units = group.units(), target = stage.target + stage.other * x.buffer(n);
    const bool in_blocks = stage.kind == Kind::kBlockCell;
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
          float part[2][3] = {};
#pragma unroll
          for (int gate = 0; gate < 3; ++gate) {
            const int row = product.row(0, u / kTile, gate);
            part[0][gate] = this->sum(product, 0, row, to.b, i) + this->vector(stage, gate, u);
            if (!in_blocks) part[1][gate] = keep * this->sum(product, 1, row, to.b, i);
          }
          const float before = keep * this->carry_h(to.b, u);
          const Gates gates =
              in_blocks ? block_forward(part[0][0], part[0][1], part[0][2] - 1.0f, before)
                        : cell_forward(part[0][0] + part[1][0], part[0][1] + part[1][1], part[0][2],
                                       part[1][2] + this->vector(stage, 3, u), before);
          this->carry_h(to.b, u) = h[j] = gates.h;
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
          const float grad = this->carry_h(to.b, u) + this->fed(stage, 5, to.b, u) +
                             this->sum_of(stage.product, 0, 0, to.b, u);
          const float before = this->keep(to.b) * this->fed(stage, 4, to.b, u);
          const GateGrads back =
              cell_backward(grad, this->fed(stage, 0, to.b, u), this->fed(stage, 1, to.b, u),
                            this->fed(stage, 2, to.b, u), this->fed(stage, 3, to.b, u), before);
          this->carry_h(to.b, u) = back.before;
          d[0][j] = back.xn;
          d[1][j] = back.r;
          d[2][j] = back.z;
          d[3][j] = back.hn;
          if (!to.stored || !this->learns(stage)) continue;
          float* grads = g.gradients + stage.grad * p.T * p.B + to.row * 4 * p.D + column;
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

  // The same of block_gru: [r | c | u] of each block, for the product with its own weights.
  FASTRSSM_CLUSTER void gates_in_blocks(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units(), own = blocks_of(p.own);
    this->rows_of(units, [&](int first, int shift) {
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        if (!to.active) return;
        float d[3][2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = this->column_of(group, u);
          if (column < 0) continue;
          const float grad = this->carry_h(to.b, u) + this->fed(stage, 5, to.b, u) +
                             this->sum_of(stage.product, 0, 0, to.b, u);
          const float before = this->keep(to.b) * this->fed(stage, 4, to.b, u);
          const GateGrads back =
              block_backward(grad, this->fed(stage, 0, to.b, u), this->fed(stage, 1, to.b, u),
                             this->fed(stage, 2, to.b, u), this->fed(stage, 3, to.b, u), before);
          this->carry_h(to.b, u) = back.before;
          d[0][j] = back.r;
          d[1][j] = back.hn;
          d[2][j] = back.z;
          if (!to.stored || !this->learns(stage)) continue;
          float* grads = g.gradients + stage.grad * p.T * p.B + to.row * 3 * p.D + column;
          grads[0] = back.r;
          grads[p.D] = back.hn;
          grads[2 * p.D] = back.z;
        }
        int tile = to.u / kTile, skipped = 0;
        for (; tile >= own; tile -= own) skipped += 3 * own;
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
          const int pair = ((skipped + gate * own + tile) * kRows + to.b) * kTile + to.u % kTile;
          this->template at<std::uint32_t>(stage.target)[pair / 2] =
              bfloat16_pair(d[gate][0], d[gate][1]);
        }
      });
    });
  }
};

}  // namespace fastrssm::cluster
