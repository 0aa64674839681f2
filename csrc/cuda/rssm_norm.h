// LayerNorm or RMS norm, and SiLU, forward and backward. Over the units of all ranks sums of rows
// are exchanged first, each rank then finishes its own units. Doing that once and not in every rank
// costs one exchange and saves fifteen sixteenths of the activations. A branch of block_gru is
// narrow enough to be one rank's, and needs none.
#pragma once

#include "cuda/rssm_product.h"

namespace fastrssm::cluster {

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
  // y = silu(norm(sums) scale + shift), sent to all ranks or kept for this one
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
          const float value = this->sum_of_both(stage.product, to.b, u) +
                              this->vector(stage, 0, u) + this->fed(stage, 0, to.b, u);
          scratch(to.b, u) = value;
          total[lane] += p.rms ? 0.0f : value;
        }
      });
      x.add_lanes(total, 1 << shift);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        squares[lane] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (!to.active || this->column_of(group, to.u + j) < 0) continue;
          const float d = scratch(to.b, to.u + j) - (p.rms ? 0.0f : total[lane] / own);
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
          g.kept[stage.keep * rows + to.row * group.rows.units() + column] = hat;
          if (column == 0) g.kept[stage.keep_rstd * rows + to.row] = rstd;
        }
        sent[lane] = bfloat16_pair(y[0], y[1]);
      });
      if (stage.barrier < 0) {
        this->keep_own(sent, first, shift, stage.target, units);
        return;
      }
      this->send(sent, first, shift, stage.target, group.per_rank, false, 0, group.blocks,
                 stage.barrier);
    });
    if (!owned && stage.barrier >= 0) this->send_token(stage.barrier);
  }

  // Gradient of the sums from that of y, in the product's sums; sent to all ranks. Group 0.
  FASTRSSM_CLUSTER void norm_back(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units(), owned = group.owned(rank);
    const int width = group.rows.units();
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
          total[lane] += p.rms ? 0.0f : da * scale;
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
        float total, dot, d[2] = {};
        totals(stage, to.b, &total, &dot);
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

  // the branches of block_gru
  FASTRSSM_CLUSTER void branch(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units(), width = group.rows.size;
    const std::int64_t rows = static_cast<std::int64_t>(p.T) * p.B;
    this->rows_of(units, [&](int first, int shift) {
      PerLane<float> squares, value[2];
      PerLane<std::uint32_t> sent;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        squares[lane] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const bool is = to.active && this->column_of(group, to.u + j) >= 0;
          value[j][lane] = is ? this->sum_of_both(stage.product, to.b, to.u + j) +
                                    this->vector(stage, 0, to.u + j)
                              : 0.0f;
          squares[lane] += value[j][lane] * value[j][lane];
        }
      });
      x.add_lanes(squares, 1 << shift);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        const float mean = squares[lane] / static_cast<float>(width);
        squares[lane] = 1.0f / square_root_of(mean + stage.eps);
        float y[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          value[j][lane] *= squares[lane];
          if (to.active) y[j] = silu(value[j][lane] * this->vector(stage, 1, to.u + j));
        }
        sent[lane] = bfloat16_pair(y[0], y[1]);
      });
      this->send(sent, first, shift, stage.target, group.per_rank, false, 0, group.blocks,
                 stage.barrier);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = to.active ? this->column_of(group, to.u + j) : -1;
          if (column < 0 || !to.stored || !g.kept) continue;
          g.kept[stage.keep * rows + to.row * 3 * width + column] = value[j][lane];
          if (to.u + j == 0) g.kept[stage.keep_rstd * rows + to.row * 3 + rank] = squares[lane];
        }
      });
    });
    if (!group.owned(rank)) this->send_token(stage.barrier);
  }

  // and their gradients
  FASTRSSM_CLUSTER void branch_back(const Stage& stage) {
    const Group& group = stage.product.group[0];
    const int units = group.units(), width = group.rows.size;
    const std::int64_t rows = static_cast<std::int64_t>(p.T) * p.B;
    this->rows_of(units, [&](int first, int shift) {
      PerLane<float> dot, da[2];
      PerLane<std::uint32_t> sent;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        dot[lane] = 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          da[j][lane] = 0.0f;
          if (column < 0) continue;
          const float hat = this->fed(stage, 0, to.b, u), scale = this->vector(stage, 1, u);
          da[j][lane] = this->sum_of(stage.product, 0, 0, to.b, u) * silu_slope(hat * scale);
          dot[lane] += da[j][lane] * scale * hat;
        }
      });
      x.add_lanes(dot, 1 << shift);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        const float mean = dot[lane] / static_cast<float>(width);
        float d[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, column = to.active ? this->column_of(group, u) : -1;
          if (column < 0) continue;
          d[j] = (da[j][lane] * this->vector(stage, 1, u) - this->fed(stage, 0, to.b, u) * mean) *
                 this->fed(stage, 1, to.b, rank);
          if (!to.stored || !this->learns(stage)) continue;
          const std::int64_t at = to.row * 3 * width + column;
          g.gradients[stage.grad * rows + at] = d[j];
          g.gradients[stage.grad_affine * rows + at] = da[j][lane];
        }
        sent[lane] = bfloat16_pair(d[0], d[1]);
      });
      this->send(sent, first, shift, stage.target, group.per_rank, false, 0, group.blocks,
                 stage.barrier);
    });
    if (!group.owned(rank)) this->send_token(stage.barrier);
  }

  FASTRSSM_CLUSTER float& scratch(int b, int u, int plane = 0) const {
    return this->template at<float>(p.scratch)[(plane * kRows + b) * kMaxSlice + u];
  }
  FASTRSSM_CLUSTER void finish_stats(const Stage& stage, int owned) {
    if (!owned) this->send_token(stage.stats_barrier);
    x.wait(stage.stats_barrier, n & 1, stage.stats_bytes);
  }
  // the two sums of a row over all ranks, in their order
  FASTRSSM_CLUSTER void totals(const Stage& stage, int b, float* one, float* two) const {
    *one = *two = 0.0f;
    for (int r = 0; r < p.ranks; ++r) {
      if (!stage.product.group[0].owned(r)) continue;
      *one += stats(stage, r, b)[0];
      *two += stats(stage, r, b)[1];
    }
  }

  // mean and reciprocal deviation of a row from the sums of all ranks, in their order
  FASTRSSM_CLUSTER void moments(const Stage& stage, int b, float* mean, float* rstd) const {
    const Group& group = stage.product.group[0];
    const float width = static_cast<float>(group.rows.units() * group.copies);
    float total = 0.0f, squares = 0.0f;
    for (int r = 0; r < p.ranks; ++r) {
      if (group.owned(r)) total += stats(stage, r, b)[0];
    }
    *mean = total / width;
    for (int r = 0; r < p.ranks; ++r) {
      if (!group.owned(r)) continue;
      squares += stats(stage, r, b)[1];
      if (p.rms) continue;
      const float count = static_cast<float>(this->units_of(group, r) * group.copies);
      const float apart = stats(stage, r, b)[0] / count - *mean;
      squares += count * apart * apart;
    }
    *rstd = 1.0f / square_root_of(squares / width + stage.eps);
  }

 private:
  FASTRSSM_CLUSTER const float* stats(const Stage& stage, int owner, int b) const {
    return this->template at<float>(stage.stats) + (owner * kRows + b) * 2;
  }
};

}  // namespace fastrssm::cluster
