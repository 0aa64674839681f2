// The cells whose gates have a LayerNorm: ln_gru_a and ln_gru_d, forward and backward.
#pragma once

#include "cuda/rssm_norm.h"

namespace fastrssm::cluster {

template <class Machine, int kRowTiles, int kHeld0, int kHeld1>
class NormCells : public Norms<Machine, kRowTiles, kHeld0, kHeld1> {
 public:
  using Base = Norms<Machine, kRowTiles, kHeld0, kHeld1>;
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
  // the state from gates that are normalised over all ranks
  FASTRSSM_CLUSTER void norm_cell(const Stage& stage) {
    const Product& product = stage.product;
    const Group& group = product.group[0];
    const int units = group.units(), owned = group.owned(rank);
    const int target = stage.target + stage.other * x.buffer(n);
    const float own = 3.0f * static_cast<float>(this->units_of(group, rank));
    this->rows_of(units, [&](int first, int shift) {
      PerLane<float> total, squares;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        total[lane] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          if (!to.active || this->column_of(group, u) < 0) continue;
          const float keep = this->keep(to.b);
#pragma unroll 1
          for (int gate = 0; gate < 3; ++gate) {
            const int row = product.row(0, u / kTile, gate);
            const float value = this->sum(product, 0, row, to.b, u % kTile) +
                                keep * this->sum(product, 1, row, to.b, u % kTile) +
                                this->vector(stage, gate, u);
            this->scratch(to.b, u, gate) = value;
            total[lane] += value;
          }
        }
      });
      x.add_lanes(total, 1 << shift);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        squares[lane] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (!to.active || this->column_of(group, to.u + j) < 0) continue;
#pragma unroll 1
          for (int gate = 0; gate < 3; ++gate) {
            const float d = this->scratch(to.b, to.u + j, gate) - total[lane] / own;
            squares[lane] += d * d;
          }
        }
      });
      x.add_lanes(squares, 1 << shift);
      if (owned) this->send_stats(stage, total, squares, first, shift);
    });
    this->finish_stats(stage, owned);
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      PerLane<float> rstd;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float mean, h[2] = {};
        this->moments(stage, to.b, &mean, &rstd[lane]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          if (!to.active || this->column_of(group, u) < 0) continue;
          float y[3];
#pragma unroll
          for (int gate = 0; gate < 3; ++gate) {
            float& hat = this->scratch(to.b, u, gate);
            hat = (hat - mean) * rstd[lane];
            y[gate] = affine(stage, gate, u, hat);
          }
          const float before = this->keep(to.b) * this->carry_h(to.b, u);
          this->carry_h(to.b, u) = h[j] = norm_forward(y, p.update_first, before).h;
        }
        sent[lane] = bfloat16_pair(h[0], h[1]);
      });
      this->send(sent, first, shift, target, group.per_rank, false, 0, group.blocks, stage.barrier);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        const std::int64_t rows = static_cast<std::int64_t>(p.T) * p.B;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          if (column < 0 || !to.stored) continue;
          g.deter[to.row * p.D + column] = this->carry_h(to.b, u);
          if (!g.kept) continue;
          float* keep = g.kept + stage.keep * rows + to.row * 3 * p.D + column;
#pragma unroll 1
          for (int gate = 0; gate < 3; ++gate) keep[gate * p.D] = this->scratch(to.b, u, gate);
          if (column == 0) g.kept[stage.keep_rstd * rows + to.row] = rstd[lane];
        }
      });
    });
    if (!owned) this->send_token(stage.barrier);
  }

  // and back to the gradients of the gates before their norm, sent to all ranks
  FASTRSSM_CLUSTER void norm_gates_back(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units(), owned = group.owned(rank);
    const std::int64_t rows = static_cast<std::int64_t>(p.T) * p.B;
    this->rows_of(units, [&](int first, int shift) {
      PerLane<float> total, dot;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        total[lane] = dot[lane] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          if (column < 0) continue;
          const float grad = this->carry_h(to.b, u) + this->fed(stage, 5, to.b, u) +
                             this->sum_of(stage.product, 0, 0, to.b, u);
          float y[3], dy[3];
#pragma unroll
          for (int gate = 0; gate < 3; ++gate) {
            y[gate] = affine(stage, gate, u, this->fed(stage, gate, to.b, u));
          }
          const float before = this->keep(to.b) * this->fed(stage, 4, to.b, u);
          this->carry_h(to.b, u) = norm_backward(grad, y, p.update_first, before, dy);
#pragma unroll
          for (int gate = 0; gate < 3; ++gate) this->scratch(to.b, u, gate) = dy[gate];
#pragma unroll 1
          for (int gate = 0; gate < 3; ++gate) {
            float& d = this->scratch(to.b, u, gate);
            if (to.stored && this->learns(stage)) {
              g.gradients[stage.grad_affine * rows + to.row * 3 * p.D + gate * p.D + column] = d;
            }
            d *= this->vector(stage, 3 + gate, u);
            total[lane] += d;
            dot[lane] += d * this->fed(stage, gate, to.b, u);
          }
        }
      });
      x.add_lanes(total, 1 << shift);
      x.add_lanes(dot, 1 << shift);
      if (owned) this->send_stats(stage, total, dot, first, shift);
    });
    this->finish_stats(stage, owned);
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent[3];
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        const float inverse = 1.0f / static_cast<float>(3 * p.D);
        float total, dot, d[3][2] = {};
        this->totals(stage, to.b, &total, &dot);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          if (column < 0) continue;
#pragma unroll
          for (int gate = 0; gate < 3; ++gate) {
            const float mean = (total + this->fed(stage, gate, to.b, u) * dot) * inverse;
            d[gate][j] = (this->scratch(to.b, u, gate) - mean) * this->fed(stage, 3, to.b, 0);
            if (!to.stored || !this->learns(stage)) continue;
            g.gradients[stage.grad * rows + to.row * 3 * p.D + gate * p.D + column] = d[gate][j];
          }
        }
#pragma unroll
        for (int gate = 0; gate < 3; ++gate) {
          sent[gate][lane] = bfloat16_pair(d[gate][0], d[gate][1]);
        }
      });
#pragma unroll
      for (int gate = 0; gate < 3; ++gate) {
        const int target = stage.target + gate * group.blocks * kRows * kTile * 2;
        this->send(sent[gate], first, shift, target, group.per_rank, false, 0, group.blocks,
                   stage.barrier);
      }
    });
    if (!owned) this->send_token(stage.barrier);
  }

 private:
  FASTRSSM_CLUSTER float affine(const Stage& stage, int gate, int u, float hat) const {
    return hat * this->vector(stage, 3 + gate, u) + this->vector(stage, 6 + gate, u);
  }
};

}  // namespace fastrssm::cluster
