// Gradients of weights: the backward scan leaves those of pre-activations for a chunk of steps, and
// products over the rows of the chunk follow.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/rssm_plan.h"
#include "cpu/rssm_pointwise.h"

namespace fastrssm::cpu {
namespace {

// Gradients of pre-activations in some successive steps [steps, B, width]. `affine` ones are those
// after a norm and before its activation.
template <typename T>
struct ChunkGrads {
  Kept<T> pre, pre_affine, gates, cell_affine, mix, mix_affine;
  std::vector<Kept<T>> branch, branch_affine;
  std::vector<Kept<T>> head, head_affine, policy;  // of every layer; affine: of hidden ones
};

// Lays the arrays of a chunk out one after the other; null `buffer` only counts.
template <typename T>
class ChunkLayout {
 public:
  ChunkLayout(T* buffer, Size rows, Size B) : buffer_(buffer), rows_(rows), B_(B) {}
  Kept<T> take(Size width) {
    const Size place = used_;
    used_ += (rows_ * width + 15) / 16 * 16;
    return {buffer_ ? buffer_ + place : nullptr, width, B_};
  }
  Size used() const { return used_; }

 private:
  T* buffer_;
  Size rows_, B_, used_ = 0;
};

template <typename T>
ChunkGrads<T> lay_out(ChunkLayout<T>& chunk, const ScanLayout& layout, const Plan& plan) {
  ChunkGrads<T> d;
  const bool torch_gru = layout.cell == Cell::kTorchGru;
  if (layout.pre_width) {
    d.pre = chunk.take(layout.pre_width);
    d.pre_affine = chunk.take(layout.pre_width);
  }
  d.gates = chunk.take(torch_gru ? 4 * layout.D : 3 * layout.D);
  if (layout.ln_gru()) d.cell_affine = chunk.take(3 * layout.D);
  if (layout.in_blocks()) {
    d.mix = chunk.take(layout.D);
    d.mix_affine = chunk.take(layout.D);
    for (Size i = 0; i < ScanLayout::kBranches; ++i) {
      d.branch.push_back(chunk.take(layout.branch));
      d.branch_affine.push_back(chunk.take(layout.branch));
    }
  }
  for (Size l = 0; l + 1 < layout.head_layers; ++l) {
    d.head.push_back(chunk.take(plan.head.hidden()));
    if (!layout.split()) d.head_affine.push_back(chunk.take(plan.head.hidden()));
  }
  d.head.push_back(chunk.take(layout.stats()));
  for (Size l = 0; l + 1 < layout.policy_layers; ++l) {
    d.policy.push_back(chunk.take(plan.policy.hidden()));
  }
  if (layout.policy_layers) d.policy.push_back(chunk.take(2 * layout.A));
  return d;
}

// Adds what a chunk contributes to the gradients of weights; sums over rows are in rising order.
template <typename T>
class WeightGrads {
 public:
  WeightGrads(const Plan& plan, const ScanLayout& layout, const Gemm<T>& gemm,
              const ScanOutputs<T>& out, const KeptArrays<T>& kept,
              const std::vector<LayerOf<T>>& grads, int threads)
      : plan_(plan),
        layout_(layout),
        places_(layout),
        gemm_(gemm),
        out_(out),
        kept_(kept),
        grads_(grads),
        threads_(threads) {}

  bool any() const {
    return std::any_of(grads_.begin(), grads_.end(), [](const LayerOf<T>& g) {
      return g.weight || g.bias || g.scale || g.shift;
    });
  }

  void clear() {
    // the products of a layer cover its weight
    for (const Product& p : plan_.forward) {
      T* w = grads_[p.layer].weight;
      if (!w) continue;
      for (Size n = 0; n < p.N; ++n) {
        std::memset(w + (p.row + n) * p.ld + p.column, 0, p.K * sizeof(T));
      }
    }
    const auto zero = [](T* to, Size n) {
      if (to) std::memset(to, 0, n * sizeof(T));
    };
    for (Size l = 0; l < places_.count; ++l) {
      const Size n = out_of(l);
      zero(grads_[l].bias, n);
      zero(grads_[l].scale, n);
      zero(grads_[l].shift, n);
    }
  }

  // rows [first, first + R) of [T * B], the chunk's own
  void add(const ChunkGrads<T>& d, Size first, Size R) {
    first_ = first;
    R_ = R;
    const Size D = layout_.D, x = layout_.action_in(), in = layout_.cell_in();
    const T* cell_in = rows(kept_.action_in);
    if (layout_.pre_width) {
      outer({d.pre.data, in, in}, {{cell_in, x, x}}, {{grads_[places_.pre].weight, x}});
      vectors(places_.pre, d.pre.data, in, in, d.pre_affine.data, rows(kept_.pre_hat));
      cell_in = rows(kept_.pre);
    }
    const T *h = rows(kept_.deter_in), *gates = d.gates.data;
    if (layout_.cell == Cell::kTorchGru) {
      T *w = grads_[places_.cell_input].weight, *u = grads_[places_.cell_state].weight;
      const Columns<T> reads{cell_in, in, in}, state{h, D, D};
      outer({gates, 4 * D, 2 * D}, {reads, state}, {{w, in}, {u, D}});
      outer({gates + 2 * D, 4 * D, D}, {reads}, {{part(w, 2 * D * in), in}});
      outer({gates + 3 * D, 4 * D, D}, {state}, {{part(u, 2 * D * D), D}});
      sums(grads_[places_.cell_input].bias, gates, nullptr, 4 * D, 3 * D);
      T* bias = grads_[places_.cell_state].bias;
      sums(bias, gates, nullptr, 4 * D, 2 * D);
      sums(bias ? bias + 2 * D : nullptr, gates + 3 * D, nullptr, 4 * D, D);
    } else if (layout_.in_blocks()) {
      blocks(d);
    } else {
      T* w = grads_[places_.cell_input].weight;
      outer({gates, 3 * D, 3 * D}, {{cell_in, in, in}, {h, D, D}},
            {{w, in + D}, {part(w, in), in + D}});
      vectors(places_.cell_input, gates, 3 * D, 3 * D, d.cell_affine.data, rows(kept_.cell_hat));
    }
    const Size width = d.head[0].width;
    outer({d.head[0].data, width, width}, {{out_.deter + first_ * D, D, D}},
          {{grads_[places_.head].weight, D}});
    network(plan_.head, d.head, d.head_affine, kept_.head, &kept_.head_hat);
    if (!layout_.policy_layers) return;
    const Size F = D + layout_.S;
    const Kept<T>& p = d.policy[0];
    T* w = grads_[places_.policy].weight;
    outer({p.data, p.width, p.width}, {{h, D, D}, {rows(kept_.action_in), x, layout_.S}},
          {{w, F}, {part(w, D), F}});
    network(plan_.policy, d.policy, {}, kept_.policy, nullptr);
  }

 private:
  const T* rows(const Kept<T>& array) const { return array.data + first_ * array.width; }

  // numbers of a bias of layer l
  Size out_of(Size l) const {
    if (l == places_.pre) return layout_.pre_width;
    if (l < places_.head) return 3 * layout_.D;
    if (l >= places_.branches && l < places_.policy) {
      return l < places_.branches + ScanLayout::kBranches ? layout_.branch : layout_.D;
    }
    const bool is_head = l < places_.policy;
    const Net& net = is_head ? plan_.head : plan_.policy;
    const Size out = l - net.layer + 1 == net.layers ? net.out : net.width;
    return net.split ? 2 * out : out;
  }

  static T* part(T* weight, Size offset) { return weight ? weight + offset : nullptr; }

  // weight += dy^T x for each x
  void outer(Columns<T> dy, std::vector<Columns<T>> x,
             std::vector<typename OuterProducts<T>::Target> weights) {
    static thread_local Scratch scratch;
    if (!weights[0].data && !weights.back().data) return;
    const OuterProducts<T> products{{dy}, std::move(x), std::move(weights)};
    void* workspace = scratch.take<char>(outer_product_bytes(gemm_, products, threads_));
    add_outer_products(gemm_, products, R_, workspace, threads_);
  }

  // to[n] += sum over rows of dy[., n] (times x[., n])
  void sums(T* to, const T* dy, const T* x, Size ld, Size N) {
    if (!to) return;
    constexpr Size kShare = 256;
#pragma omp parallel for num_threads(threads_) schedule(static)
    for (Size n = 0; n < N; n += kShare) {
      add_column_sums(dy + n, x ? x + n : nullptr, ld, R_, std::min(kShare, N - n), to + n);
    }
  }

  // the bias, and the scale and shift of a normalised layer
  void vectors(Size l, const T* d, Size ld, Size N, const T* affine, const T* hat) {
    sums(grads_[l].bias, d, nullptr, ld, N);
    if (!affine) return;
    sums(grads_[l].scale, affine, hat, N, N);
    sums(grads_[l].shift, affine, nullptr, N, N);
  }

  // the layers of block_gru
  void blocks(const ChunkGrads<T>& d) {
    const Size D = layout_.D, S = layout_.S, x = layout_.action_in(), own = layout_.own();
    const Size count = ScanLayout::kBranches, width = layout_.branch, ld = layout_.mix_in();
    const T *h = rows(kept_.deter_in), *action_in = rows(kept_.action_in);
    const T* const inputs[] = {h, action_in, action_in + S};
    for (Size i = 0; i < count; ++i) {
      const Size l = places_.branches + i, in = layout_.branch_in(i);
      outer({d.branch[i].data, width, width}, {{inputs[i], i ? x : D, in}},
            {{grads_[l].weight, in}});
      vectors(l, d.branch[i].data, width, width, d.branch_affine[i].data,
              rows(kept_.branch_hat[i]));
    }
    const Size mix = places_.branches + count, all = count * width;
    const T *d_mix = d.mix.data, *y = rows(kept_.mix), *gates = d.gates.data;
    T *w = grads_[mix].weight, *u = grads_[places_.cell_input].weight;
    outer({d_mix, D, D}, {{rows(kept_.branch), all, all}}, {{part(w, own), ld}});
    for (Size g = 0; g < layout_.blocks; ++g) {
      const Size at = g * own;
      outer({d_mix + at, D, own}, {{h + at, D, own}}, {{part(w, at * ld), ld}});
      outer({gates + 3 * at, 3 * D, 3 * own}, {{y + at, D, own}}, {{part(u, 3 * at * own), own}});
    }
    vectors(mix, d_mix, D, D, d.mix_affine.data, rows(kept_.mix_hat));
    vectors(places_.cell_input, gates, 3 * D, 3 * D, nullptr, nullptr);
  }

  // all but the weight of the first layer, whose input differs
  void network(const Net& net, const std::vector<Kept<T>>& d, const std::vector<Kept<T>>& affine,
               const std::vector<Kept<T>>& y, const std::vector<Kept<T>>* hat) {
    for (Size l = 0; l < net.layers; ++l) {
      const Size out = l + 1 == net.layers ? net.out : net.width, row = net.split ? 2 * out : out;
      const bool normed = !net.split && l + 1 < net.layers;
      vectors(net.layer + l, d[l].data, row, row, normed ? affine[l].data : nullptr,
              normed ? rows((*hat)[l]) : nullptr);
      if (l == 0) continue;
      const T *dy = d[l].data, *x = rows(y[l - 1]);
      T* w = grads_[net.layer + l].weight;
      outer({dy, row, out}, {{x, net.hidden(), net.width}}, {{w, net.width}});
      if (!net.split) continue;
      outer({dy + out, row, out}, {{x + net.width, net.hidden(), net.width}},
            {{part(w, out * net.width), net.width}});
    }
  }

  const Plan& plan_;
  const ScanLayout& layout_;
  const LayerPlaces places_;
  const Gemm<T>& gemm_;
  const ScanOutputs<T>& out_;
  const KeptArrays<T>& kept_;
  const std::vector<LayerOf<T>>& grads_;
  int threads_;
  Size first_ = 0, R_ = 0;
};

}  // namespace
}  // namespace fastrssm::cpu
