// LayerNorm and SiLU over the units of all ranks, forward and backward: sums of rows are exchanged
// first, each rank then finishes its own units. Doing that once and not in every rank costs one
// exchange and saves fifteen sixteenths of the activations.
#pragma once

#include "cuda/rssm_product.h"

namespace fastrssm::cluster {

constexpr float kNormEps = 1e-5f;

template <class Machine, int kRowTiles, int kHeld0, int kHeld1>
class Norms : public Engine<Machine, kRowTiles, kHeld0, kHeld1> {
 public:
  using Base = Engine<Machine, kRowTiles, kHeld0, kHeld1>;
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
  // y = silu(norm(sums) scale + shift), sent to all ranks
  FASTRSSM_CLUSTER void norm(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units(), owned = group.owned(rank);
    const float own = static_cast<float>(this->units_of(group, rank));
    this->rows_of(units, [&](int first, int shift) {
      PerLane<float> total, squares;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        total[lane] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          if (!to.active || this->column_of(group, u) < 0) continue;
          const float value = this->sum_of(stage.product, 0, 0, to.b, u) +
                              this->vector(stage, 0, u) + this->fed(stage, 0, to.b, u);
          scratch(to.b, u) = value;
          total[lane] += value;
        }
      });
      x.add_lanes(total, 1 << shift);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        squares[lane] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (!to.active || this->column_of(group, to.u + j) < 0) continue;
          const float d = scratch(to.b, to.u + j) - total[lane] / own;
          squares[lane] += d * d;
        }
      });
      x.add_lanes(squares, 1 << shift);
      if (owned) this->send_stats(stage, total, squares, first, shift);
    });
    finish_stats(stage, owned);
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float mean, rstd, y[2] = {};
        moments(stage, to.b, &mean, &rstd);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          if (column < 0) continue;
          const float hat = (scratch(to.b, u) - mean) * rstd;
          y[j] = silu(hat * this->vector(stage, 1, u) + this->vector(stage, 2, u));
          if (!g.kept || !to.stored) continue;
          const std::int64_t rows = static_cast<std::int64_t>(p.T) * p.B;
          g.kept[stage.keep * rows + to.row * group.rows.size + column] = hat;
          if (column == 0) g.kept[stage.keep_rstd * rows + to.row] = rstd;
        }
        sent[lane] = bfloat16_pair(y[0], y[1]);
      });
      this->send(sent, first, shift, stage.target, group.per_rank, false, 0, group.blocks,
                 stage.barrier);
    });
    if (!owned) this->send_token(stage.barrier);
  }

  // Gradient of the sums from that of y, in the product's sums; sent to all ranks. Group 0.
  FASTRSSM_CLUSTER void norm_back(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units(), owned = group.owned(rank), width = group.rows.size;
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
          const float hat = this->fed(stage, 0, to.b, u), scale = this->vector(stage, 1, u);
          const float a = hat * scale + this->vector(stage, 2, u);
          const float da = this->sum_of(stage.product, 0, 0, to.b, u) * silu_slope(a);
          if (to.stored && this->learns(stage)) {
            g.gradients[stage.grad_affine * rows + to.row * width + column] = da;
          }
          scratch(to.b, u) = da * scale;
          total[lane] += da * scale;
          dot[lane] += da * scale * hat;
        }
      });
      x.add_lanes(total, 1 << shift);
      x.add_lanes(dot, 1 << shift);
      if (owned) this->send_stats(stage, total, dot, first, shift);
    });
    finish_stats(stage, owned);
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float total = 0.0f, dot = 0.0f, d[2] = {};
        for (int r = 0; r < p.ranks; ++r) {
          if (!group.owned(r)) continue;
          total += stats(stage, r, to.b)[0];
          dot += stats(stage, r, to.b)[1];
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          if (column < 0) continue;
          const float inverse = 1.0f / static_cast<float>(width);
          d[j] = (scratch(to.b, u) - (total + this->fed(stage, 0, to.b, u) * dot) * inverse) *
                 this->fed(stage, 1, to.b, 0);
          if (to.stored && this->learns(stage)) {
            g.gradients[stage.grad * rows + to.row * width + column] = d[j];
          }
        }
        sent[lane] = bfloat16_pair(d[0], d[1]);
      });
      this->send(sent, first, shift, stage.target, group.per_rank, false, 0, group.blocks,
                 stage.barrier);
    });
    if (!owned) this->send_token(stage.barrier);
  }

 private:
  FASTRSSM_CLUSTER float& scratch(int b, int u) const {
    return this->template at<float>(p.scratch)[b * kMaxSlice + u];
  }
  FASTRSSM_CLUSTER const float* stats(const Stage& stage, int owner, int b) const {
    return this->template at<float>(stage.stats) + (owner * kRows + b) * 2;
  }
  FASTRSSM_CLUSTER void finish_stats(const Stage& stage, int owned) {
    if (!owned) this->send_token(stage.stats_barrier);
    x.wait(stage.stats_barrier, n & 1, stage.stats_bytes);
  }
  // mean and reciprocal deviation of a row from the sums of all ranks, in their order
  FASTRSSM_CLUSTER void moments(const Stage& stage, int b, float* mean, float* rstd) const {
    const Group& group = stage.product.group[0];
    const float width = static_cast<float>(group.rows.size);
    float total = 0.0f, squares = 0.0f;
    for (int r = 0; r < p.ranks; ++r) {
      if (group.owned(r)) total += stats(stage, r, b)[0];
    }
    *mean = total / width;
    for (int r = 0; r < p.ranks; ++r) {
      if (!group.owned(r)) continue;
      const float count = static_cast<float>(this->units_of(group, r));
      const float apart = stats(stage, r, b)[0] / count - *mean;
      squares += stats(stage, r, b)[1] + count * apart * apart;
    }
    *rstd = 1.0f / square_root_of(squares / width + kNormEps);
  }
};

}  // namespace fastrssm::cluster
