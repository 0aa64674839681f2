// What is drawn: a gaussian or a categorical latent, the action of a policy; and the gradients of
// their parameters.
#pragma once

#include "cuda/rssm_gates.h"

namespace fastrssm::cluster {

template <class Machine, int kRowTiles, int kHeld0, int kHeld1>
class Draws : public Cells<Machine, kRowTiles, kHeld0, kHeld1> {
 public:
  using Base = Cells<Machine, kRowTiles, kHeld0, kHeld1>;
  using Base::Base;
  using Base::g;
  using Base::kRows;
  using Base::p;
  using Base::rank;
  using Base::t;
  using Base::x;
  template <class T>
  using PerLane = typename Machine::template PerLane<T>;

 protected:
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

  // The latent of classes: the first whose probabilities, summed up, exceed the noise. A variable
  // is within a rank, and each of its units sums for itself.
  FASTRSSM_CLUSTER void draw_class(const Stage& stage) {
    const Product& product = stage.product;
    const Group& group = product.group[0];
    const int units = group.units(), before = rank * units, classes = p.classes;
    this->rows_of(units, [&](int first, int shift) {
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j;
          if (!to.active || before + u >= p.S) continue;
          this->scratch(to.b, u) = this->sum_of(product, 0, 0, to.b, u) + this->vector(stage, 0, u);
        }
      });
    });
    // a row is a warp's
    x.sync_warp();
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      PerLane<float> value[2];
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        // the next step sees no latent of another episode
        const bool kept = t + 1 == p.T || this->keep(to.b, 1) != 0.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int index = before + to.u + j, variable = index / classes;
          value[j][lane] = 0.0f;
          if (!to.active || index >= p.S) continue;
          const float* logits = &this->scratch(to.b, variable * classes - before);
          const Softmax sums = softmax_of(logits, classes);
          const float noise = this->fed(stage, 0, to.b, variable);
          const float even = g.unimix / static_cast<float>(classes);
          const float share = (1.0f - g.unimix) / sums.total;
          float bound = 0.0f;
          int chosen = 0;
          for (int k = 0; k < classes; ++k) {
            bound += share * quick_exp(logits[k] - sums.top) + even;
            chosen += bound <= noise;
          }
          // a total rounded to below 1
          chosen = chosen < classes ? chosen : classes - 1;
          value[j][lane] = chosen == index - variable * classes ? 1.0f : 0.0f;
        }
        sent[lane] = kept ? bfloat16_pair(value[0][lane], value[1][lane]) : 0u;
      });
      this->send(sent, first, shift, stage.target, group.per_rank, false, 0, group.blocks,
                 stage.barrier);
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int index = before + to.u + j;
          if (!to.active || !to.stored || index >= p.S) continue;
          g.stoch[to.row * p.S + index] = value[j][lane];
          g.mean[to.row * p.S + index] = this->scratch(to.b, to.u + j);
        }
      });
    });
    if (!group.owned(rank)) this->send_token(stage.barrier);
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
          const Place unit = to.active ? this->x_place(u) : Place{0, 0, -1};
          if (unit.column < 0 || unit.part) continue;
          const float grad = this->carry_x(to.b, u) + this->fed(stage, 0, to.b, u);
          d[0][j] = grad + this->fed(stage, 1, to.b, u);
          d[1][j] = (grad * this->fed(stage, 3, to.b, u) + this->fed(stage, 2, to.b, u)) *
                    std_slope(this->fed(stage, 4, to.b, u), p.split);
          if (!to.stored || !this->learns(stage)) continue;
          float* grads = g.gradients + stage.grad * p.T * p.B + to.row * 2 * p.S + unit.index;
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

  // from the latent of classes to its logits, straight through
  FASTRSSM_CLUSTER void undraw_class(const Stage& stage) {
    const int units = p.x_share * kTile, blocks = blocks_of(p.S), classes = p.classes;
    const int before = rank * units;
    this->rows_of(units, [&](int first, int shift) {
      PerLane<std::uint32_t> sent;
      x.lanes([&](int lane) {
        const At to = this->place(first + lane, shift, units);
        float d[2] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int u = to.u + j, index = before + u;
          if (!to.active || index >= p.S) continue;
          const int begin = index / classes * classes - before;
          const float* logits = this->fed_row(stage, 4, to.b) + begin;
          const Softmax sums = softmax_of(logits, classes);
          float dot = 0.0f;
          for (int k = 0; k < classes; ++k) {
            dot += (this->carry_x(to.b, begin + k) + this->fed(stage, 0, to.b, begin + k)) *
                   quick_exp(logits[k] - sums.top);
          }
          const float grad = this->carry_x(to.b, u) + this->fed(stage, 0, to.b, u);
          const float share = quick_exp(logits[u - begin] - sums.top) / sums.total;
          d[j] =
              (1.0f - g.unimix) * share * (grad - dot / sums.total) + this->fed(stage, 1, to.b, u);
          if (!to.stored || !this->learns(stage)) continue;
          g.gradients[stage.grad * p.T * p.B + to.row * p.S + index] = d[j];
        }
        sent[lane] = bfloat16_pair(d[0], d[1]);
      });
      this->send(sent, first, shift, stage.target, p.x_share, false, 0, blocks, stage.barrier);
    });
    if (rank * p.x_share >= blocks) this->send_token(stage.barrier);
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
          const Place unit = to.active ? this->x_place(u) : Place{0, 0, -1};
          if (unit.column < 0 || !unit.part) continue;
          const float grad = this->carry_x(to.b, u) + this->fed(stage, 0, to.b, u);
          const float y = this->fed(stage, 1, to.b, u);
          d[0][j] = grad * (1.0f - y * y);
          d[1][j] =
              d[0][j] * this->fed(stage, 2, to.b, u) * quick_sigmoid(this->fed(stage, 3, to.b, u));
          if (!to.stored || !this->learns(stage)) continue;
          float* grads = g.gradients + stage.grad * p.T * p.B + to.row * 2 * p.A + unit.index;
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
};

}  // namespace fastrssm::cluster
