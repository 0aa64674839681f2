#include <omp.h>

#include <cstring>

#include "cpu/rssm_draw.h"
#include "cpu/rssm_gates.h"
#include "cpu/rssm_plan.h"
#include "cpu/rssm_pointwise.h"
#include "cpu/rssm_weight_grads.h"

namespace fastrssm::cpu {
namespace {

// Rows of the batch times steps between two rounds of weight gradients: enough for products near
// the processor's peak, few enough to stay in the last-level cache. A larger batch is walked back
// in several groups of rows.
constexpr Size kChunkRows = 1024;

// One thread's walk back through a chunk with some rows of the batch.
template <typename T>
class BackwardScan {
 public:
  BackwardScan(const Plan& plan, const ScanLayout& layout, const ScanConstants& constants,
               const ScanInputs<T>& in, const std::vector<LayerOf<const T>>& weights,
               const PackedWeights<T>& packed, const ScanOutputs<T>& out,
               const ScanOutputGrads<T>& grads, const ScanInputGrads<T>& input_grads,
               const KeptArrays<T>& kept, T* carry_deter, T* carry_stoch)
      : plan_(plan),
        layout_(layout),
        places_(layout),
        constants_(constants),
        in_(in),
        weights_(weights),
        packed_(packed),
        out_(out),
        grads_(grads),
        input_grads_(input_grads),
        kept_(kept),
        carry_deter_(carry_deter),
        carry_stoch_(carry_stoch) {}

  static Size scratch_numel(const Plan& plan, const ScanLayout& layout, const Gemm<T>& gemm) {
    const Size rows = std::min(layout.B, kBlockRows);
    return rows * (plan.widest + layout.D + layout.S) + layout.class_lines() + 16 +
           row_bytes<T>(gemm, rows, plan.widest) / sizeof(T);
  }

  // rows [b, b + M), times [begin, end) from the last to the first; d: the chunk's arrays, whose
  // first row is `group`
  void run(Size group, Size b, Size M, Size begin, Size end, const ChunkGrads<T>& d, T* scratch) {
    const Size rows = std::min(layout_.B, kBlockRows);
    b_ = b;
    chunk_b_ = b - group;
    M_ = M;
    d_ = &d;
    c_ = scratch;
    feature_ = c_ + rows * plan_.widest;
    lines_ = feature_ + rows * (layout_.D + layout_.S);
    const Size used = lines_ + layout_.class_lines() - scratch;
    rows_ = reinterpret_cast<char*>(scratch + (used + 15) / 16 * 16);
    deter_ = carry_deter_ + b * layout_.D;
    stoch_ = carry_stoch_ + b * layout_.S;
    for (t_ = end - 1; t_ >= begin; --t_) {
      chunk_t_ = t_ - begin;
      add(grads_.deter, layout_.D, deter_);
      add(grads_.stoch, layout_.S, stoch_);
      undraw();
      const Size ld = retreat();
      unact(ld);
      forget();
    }
  }

 private:
  const LayerOf<const T>& layer(Size l) const { return weights_[l]; }
  Size at(Size width) const { return (t_ * layout_.B + b_) * width; }
  T* chunk(const Kept<T>& array) const { return array.at(chunk_t_, chunk_b_); }
  void pack(const T* first, Size ld, Size K, const T* second = nullptr, Size ld2 = 0, Size K2 = 0) {
    pack_rows<T>(packed_.gemm(), {first, ld, K}, {second, ld2, K2}, M_, rows_);
  }
  void product(Size which, T* c, Size ldc, bool accumulate = false) {
    packed_.multiply(which, rows_, M_, c, ldc, accumulate);
  }
  void add(const T* grad, Size width, T* to) const {
    if (!grad) return;
    add_to(to, width, grad + at(width), width, M_, width);
  }

  // Gradients of the layers' pre-activations from that of the last one, d.back(). What the input
  // gets is added to dx, or left out if dx is null.
  void network(const Net& net, const Net& back, const std::vector<Kept<T>>& d,
               const std::vector<Kept<T>>& affine, const std::vector<Kept<T>>& y,
               const std::vector<Kept<T>>* hat, const std::vector<Kept<T>>* rstd, T* dx,
               Size ld_dx) {
    const Size hidden = net.hidden();
    for (Size l = net.layers - 1; l > 0; --l) {
      const Size out = l + 1 == net.layers ? net.out : net.width, row = net.split ? 2 * out : out;
      const T* dy = chunk(d[l]);
      pack(dy, row, out);
      product(back.product_of(l, 0), c_, hidden);
      if (net.split) {
        pack(dy + out, row, out);
        product(back.product_of(l, 1), c_ + net.width, hidden);
        elu_backward(c_, hidden, y[l - 1].at(t_, b_), chunk(d[l - 1]), M_, hidden);
      } else {
        const LayerOf<const T>& w = layer(net.layer + l - 1);
        const T* x = (*hat)[l - 1].at(t_, b_);
        T* da = chunk(affine[l - 1]);
        silu_backward(c_, hidden, x, w.scale, w.shift, da, M_, hidden);
        normalise_backward(da, x, w.scale, (*rstd)[l - 1].at(t_, b_), layout_.norm(),
                           chunk(d[l - 1]), M_, hidden);
      }
    }
    if (!dx) return;
    pack(chunk(d[0]), hidden, hidden);
    product(back.product_of(0, 0), dx, ld_dx, true);
  }

  // from the latent to the state that its head saw
  void undraw() {
    const Size S = layout_.S;
    T* d = chunk(d_->head.back());
    if (layout_.gaussian()) {
      gaussian_backward(stoch_, grads_.stats0 ? grads_.stats0 + at(S) : nullptr,
                        grads_.stats1 ? grads_.stats1 + at(S) : nullptr, in_.noise + at(S),
                        kept_.raw.at(t_, b_), layout_.split(), d, M_, S);
    } else {
      categorical_backward(stoch_, grads_.stats0 ? grads_.stats0 + at(S) : nullptr,
                           out_.stats0 + at(S), static_cast<T>(constants_.unimix), d, lines_, M_, S,
                           layout_.groups);
    }
    network(plan_.head, plan_.head_back, d_->head, d_->head_affine, kept_.head, &kept_.head_hat,
            &kept_.head_rstd, deter_, layout_.D);
  }

  // From the new state to the old one and, in c_, to [stoch | action]; returns the distance
  // between rows of c_.
  Size retreat() {
    if (layout_.in_blocks()) return retreat_in_blocks();
    const Size D = layout_.D, in = layout_.cell_in(), x = layout_.action_in();
    const T *gates = kept_.gates.at(t_, b_), *h = kept_.deter_in.at(t_, b_);
    T* d = chunk(d_->gates);
    Size ld = in;
    if (layout_.cell == Cell::kTorchGru) {
      torch_gru_backward(deter_, gates, h, d, deter_, M_, D);
      pack(d, 4 * D, 2 * D, d + 3 * D, 4 * D, D);
      product(plan_.cell_state_back, deter_, D, true);
      pack(d, 4 * D, 3 * D);
      product(plan_.cell_back, c_, ld);
    } else {
      ld = in + D;
      const LayerOf<const T>& w = layer(places_.cell_input);
      T* da = chunk(d_->cell_affine);
      ln_gru_backward(deter_, gates, h, da, deter_, M_, D, 1, ln_gru_order(layout_.cell));
      normalise_backward(da, kept_.cell_hat.at(t_, b_), w.scale, kept_.cell_rstd.at(t_, b_),
                         kLayerNorm, d, M_, 3 * D);
      pack(d, 3 * D, 3 * D);
      product(plan_.cell_back, c_, ld);
      add_to(deter_, D, c_ + in, ld, M_, D);
    }
    if (!layout_.pre_width) return ld;
    const LayerOf<const T>& w = layer(places_.pre);
    const T* hat = kept_.pre_hat.at(t_, b_);
    T *da = chunk(d_->pre_affine), *d_pre = chunk(d_->pre);
    silu_backward(c_, ld, hat, w.scale, w.shift, da, M_, in);
    normalise_backward(da, hat, w.scale, kept_.pre_rstd.at(t_, b_), kLayerNorm, d_pre, M_, in);
    pack(d_pre, in, in);
    product(plan_.pre_back, c_, x);
    return x;
  }

  // d <- gradients of a layer's pre-activations from those of its results
  void deactivate(Size l, const T* dy, Size ldy, const Kept<T>& hat, const Kept<T>& rstd, T* da,
                  T* d) {
    const LayerOf<const T>& w = layer(l);
    const T* x = hat.at(t_, b_);
    silu_backward(dy, ldy, x, w.scale, w.shift, da, M_, hat.width);
    normalise_backward(da, x, w.scale, rstd.at(t_, b_), layout_.norm(), d, M_, hat.width);
  }

  // block_gru
  Size retreat_in_blocks() {
    const Size D = layout_.D, S = layout_.S, x = layout_.action_in(), own = layout_.own();
    const Size count = ScanLayout::kBranches, width = layout_.branch;
    T *d = chunk(d_->gates), *d_mix = chunk(d_->mix);
    ln_gru_backward(deter_, kept_.gates.at(t_, b_), kept_.deter_in.at(t_, b_), d, deter_, M_, D,
                    layout_.blocks, ln_gru_order(layout_.cell));
    for (Size g = 0; g < layout_.blocks; ++g) {
      pack(d + 3 * g * own, 3 * D, 3 * own);
      product(plan_.cell_back + g, c_ + g * own, D);
    }
    deactivate(places_.branches + count, c_, D, kept_.mix_hat, kept_.mix_rstd,
               chunk(d_->mix_affine), d_mix);
    for (Size g = 0; g < layout_.blocks; ++g) {
      pack(d_mix + g * own, D, own);
      product(plan_.mix_own + g, deter_ + g * own, D, true);
    }
    pack(d_mix, D, D);
    product(plan_.mix_shared, c_, count * width);
    for (Size i = 0; i < count; ++i) {
      deactivate(places_.branches + i, c_ + i * width, count * width, kept_.branch_hat[i],
                 kept_.branch_rstd[i], chunk(d_->branch_affine[i]), chunk(d_->branch[i]));
    }
    for (Size i = 0; i < count; ++i) {
      pack(chunk(d_->branch[i]), width, width);
      product(plan_.branches + i, i ? c_ + (i - 1) * S : deter_, i ? x : D, i == 0);
    }
    if (in_.action) bound_actions_backward(in_.action + at(layout_.A), c_ + S, x, M_, layout_.A);
    return x;
  }

  // from [stoch | action] in c_ to the old latent, and through the policy to the old state
  void unact(Size ld) {
    const Size S = layout_.S, D = layout_.D, A = layout_.A;
    for (Size m = 0; m < M_; ++m) std::memcpy(stoch_ + m * S, c_ + m * ld, S * sizeof(T));
    if (input_grads_.action) {
      T* to = input_grads_.action + at(A);
      for (Size m = 0; m < M_; ++m) std::memcpy(to + m * A, c_ + m * ld + S, A * sizeof(T));
    }
    if (!layout_.policy_layers) return;
    act_backward(c_ + S, ld, grads_.action ? grads_.action + at(A) : nullptr, out_.action + at(A),
                 in_.action_noise + at(A), kept_.action_raw.at(t_, b_), chunk(d_->policy.back()),
                 M_, A);
    const Size F = D + S;
    if (!layout_.detach) std::memset(feature_, 0, M_ * F * sizeof(T));
    network(plan_.policy, plan_.policy_back, d_->policy, {}, kept_.policy, nullptr, nullptr,
            layout_.detach ? nullptr : feature_, F);
    if (layout_.detach) return;
    add_to(deter_, D, feature_, F, M_, D);
    add_to(stoch_, S, feature_ + D, F, M_, S);
  }

  // no gradient passes the beginning of an episode
  void forget() {
    if (!in_.is_first) return;
    for (Size m = 0; m < M_; ++m) {
      if (!in_.is_first[t_ * layout_.B + b_ + m]) continue;
      std::memset(deter_ + m * layout_.D, 0, layout_.D * sizeof(T));
      std::memset(stoch_ + m * layout_.S, 0, layout_.S * sizeof(T));
    }
  }

  const Plan& plan_;
  const ScanLayout& layout_;
  const LayerPlaces places_;
  const ScanConstants& constants_;
  const ScanInputs<T>& in_;
  const std::vector<LayerOf<const T>>& weights_;
  const PackedWeights<T>& packed_;
  const ScanOutputs<T>& out_;
  const ScanOutputGrads<T>& grads_;
  const ScanInputGrads<T>& input_grads_;
  const KeptArrays<T>& kept_;
  T *carry_deter_, *carry_stoch_;
  const ChunkGrads<T>* d_ = nullptr;
  Size t_ = 0, chunk_t_ = 0, b_ = 0, chunk_b_ = 0, M_ = 0;
  T *c_ = nullptr, *feature_ = nullptr, *lines_ = nullptr, *deter_ = nullptr, *stoch_ = nullptr;
  char* rows_ = nullptr;
};

}  // namespace

template <typename T>
void scan_backward(const Gemm<T>& gemm, const ScanLayout& layout, const ScanConstants& constants,
                   const ScanInputs<T>& in, const std::vector<LayerOf<const T>>& weights,
                   const char* packed, const ScanOutputs<T>& out, const ScanOutputGrads<T>& grads,
                   const ScanInputGrads<T>& input_grads,
                   const std::vector<LayerOf<T>>& weight_grads, int threads) {
  static thread_local Scratch carried, chunk_memory;
  const Size B = layout.B, T_ = layout.T;
  const Plan plan(layout);
  const PackedWeights<T> products(gemm, plan.transposed, packed);
  const KeptArrays<T> kept(layout, out.saved, true);
  WeightGrads<T> sums(plan, layout, gemm, out, kept, weight_grads, threads);
  sums.clear();

  T* carry_deter = carried.take<T>(B * (layout.D + layout.S));
  T* carry_stoch = carry_deter + B * layout.D;
  std::memset(carry_deter, 0, B * (layout.D + layout.S) * sizeof(T));

  // several steps of all rows, or one step of some
  const Size groups = std::max<Size>(1, (B + kChunkRows - 1) / kChunkRows);
  const Size most = (B + groups - 1) / groups;
  const Size steps = std::clamp<Size>(kChunkRows / std::max<Size>(most, 1), 1, groups > 1 ? 1 : T_);
  ChunkLayout<T> counted(nullptr, steps * most, most);
  lay_out(counted, layout, plan);
  ChunkLayout<T> laid(chunk_memory.take<T>(counted.used()), steps * most, most);
  ChunkGrads<T> d = lay_out(laid, layout, plan);
  const auto walk = [&](Size group, Size rows, Size begin, Size end) {
    const Size first = begin * B + group;
    // what a projection outside the loop wants is the gradient of a first layer's pre-activations
    if (input_grads.embed_proj) d.head[0].data = input_grads.embed_proj + first * d.head[0].width;
    if (input_grads.policy_proj) {
      d.policy[0].data = input_grads.policy_proj + first * d.policy[0].width;
    }
#pragma omp parallel num_threads(threads)
    {
      static thread_local Scratch scratch;
      using Scan = BackwardScan<T>;
      T* memory = scratch.take<T>(Scan::scratch_numel(plan, layout, gemm));
      Scan scan(plan, layout, constants, in, weights, products, out, grads, input_grads, kept,
                carry_deter, carry_stoch);
      for_blocks(rows, omp_get_thread_num(), omp_get_num_threads(),
                 [&](Size b, Size M) { scan.run(group, group + b, M, begin, end, d, memory); });
    }
    if (sums.any()) sums.add(d, first, (end - begin) * rows);
  };
  for (Size i = 0; i < groups; ++i) {
    const Size group = B * i / groups, rows = B * (i + 1) / groups - group;
    for (Size end = T_; end > 0; end -= std::min(steps, end)) {
      walk(group, rows, std::max<Size>(0, end - steps), end);
    }
  }
  if (input_grads.deter0) {
    std::memcpy(input_grads.deter0, carry_deter, B * layout.D * sizeof(T));
  }
  if (input_grads.stoch0) {
    std::memcpy(input_grads.stoch0, carry_stoch, B * layout.S * sizeof(T));
  }
}

#define FASTRSSM_INSTANTIATE(T)                                                                 \
  template void scan_backward<T>(const Gemm<T>&, const ScanLayout&, const ScanConstants&,       \
                                 const ScanInputs<T>&, const std::vector<LayerOf<const T>>&,    \
                                 const char*, const ScanOutputs<T>&, const ScanOutputGrads<T>&, \
                                 const ScanInputGrads<T>&, const std::vector<LayerOf<T>>&, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)

}  // namespace fastrssm::cpu
