#include <omp.h>

#include <cstring>

#include "cpu/rssm_draw.h"
#include "cpu/rssm_gates.h"
#include "cpu/rssm_plan.h"
#include "cpu/rssm_pointwise.h"

namespace fastrssm::cpu {
namespace {

// One thread's walk through the sequence with some rows of the batch.
template <typename T>
class ForwardScan {
 public:
  ForwardScan(const Plan& plan, const ScanLayout& layout, const ScanConstants& constants,
              const ScanInputs<T>& in, const std::vector<LayerOf<const T>>& weights,
              const PackedWeights<T>& packed, const ScanOutputs<T>& out, const KeptArrays<T>& kept)
      : plan_(plan),
        layout_(layout),
        places_(layout),
        constants_(constants),
        in_(in),
        weights_(weights),
        packed_(packed),
        out_(out),
        kept_(kept) {}

  static Size scratch_numel(const Plan& plan, const ScanLayout& layout, const Gemm<T>& gemm) {
    const Size rows = std::min(layout.B, kBlockRows);
    return rows * plan.widest + 16 + layout.class_lines() +
           row_bytes<T>(gemm, rows, plan.widest) / sizeof(T);
  }

  // rows [b, b + M) through all times
  void run(Size b, Size M, T* scratch) {
    b_ = b;
    M_ = M;
    c_ = scratch;
    const Size most = std::min(layout_.B, kBlockRows) * plan_.widest;
    const Size used = most + layout_.class_lines();
    lines_ = c_ + most;
    rows_ = reinterpret_cast<char*>(scratch + (used + 15) / 16 * 16);
    for (t_ = 0; t_ < layout_.T; ++t_) {
      begin();
      if (layout_.policy_layers) choose_action();
      advance();
      draw();
    }
  }

 private:
  const LayerOf<const T>& layer(Size l) const { return weights_[l]; }
  void pack(const T* first, Size ld, Size K, const T* second = nullptr, Size ld2 = 0, Size K2 = 0) {
    pack_rows<T>(packed_.gemm(), {first, ld, K}, {second, ld2, K2}, M_, rows_);
  }
  void product(Size which, T* c, Size ldc, bool accumulate = false) {
    packed_.multiply(which, rows_, M_, c, ldc, accumulate);
  }

  // the state before this step, zero where an episode begins, and the action if it is given
  void begin() {
    const Size S = layout_.S, D = layout_.D, A = layout_.A, x = layout_.action_in();
    const T* deter = t_ ? out_.deter + ((t_ - 1) * layout_.B + b_) * D : in_.deter0 + b_ * D;
    const T* stoch = t_ ? out_.stoch + ((t_ - 1) * layout_.B + b_) * S : in_.stoch0 + b_ * S;
    T *to_deter = kept_.deter_in.at(t_, b_), *to = kept_.action_in.at(t_, b_);
    for (Size m = 0; m < M_; ++m) {
      if (in_.is_first && in_.is_first[t_ * layout_.B + b_ + m]) {
        std::memset(to_deter + m * D, 0, D * sizeof(T));
        std::memset(to + m * x, 0, S * sizeof(T));
      } else {
        std::memcpy(to_deter + m * D, deter + m * D, D * sizeof(T));
        std::memcpy(to + m * x, stoch + m * S, S * sizeof(T));
      }
      if (in_.action && !layout_.in_blocks()) {
        std::memcpy(to + m * x + S, in_.action + at(A) + m * A, A * sizeof(T));
      }
    }
    if (in_.action && layout_.in_blocks()) bound_actions(in_.action + at(A), to + S, x, M_, A);
  }

  // where this block's rows begin in an array [T, B, width]
  Size at(Size width) const { return (t_ * layout_.B + b_) * width; }

  // c_ <- the last layer's products [M, 2 out] or [M, out] of a network whose input is packed;
  // offset is added to the first layer's instead of its bias
  void network(const Net& net, const T* offset, Size ld_offset, const std::vector<Kept<T>>& y,
               const std::vector<Kept<T>>* hat, const std::vector<Kept<T>>* rstd) {
    const Size hidden = net.hidden(), last = net.layers - 1;
    for (Size l = 0; l < net.layers; ++l) {
      const Size out = l == last ? net.out : net.width, row = net.split ? 2 * out : out;
      if (l > 0) {
        const T* x = y[l - 1].at(t_, b_);
        if (net.split) {
          pack(x, hidden, net.width);
          product(net.product_of(l, 0), c_, row);
          pack(x + net.width, hidden, net.width);
          product(net.product_of(l, 1), c_ + out, row);
        } else {
          pack(x, hidden, hidden);
          product(net.product_of(l, 0), c_, row);
        }
      } else {
        product(net.product_of(0, 0), c_, row);
      }
      if (l == last) return;
      const LayerOf<const T>& w = layer(net.layer + l);
      const T* add = l == 0 ? offset : w.bias;
      const Size ld_add = l == 0 ? ld_offset : 0;
      if (net.split) {
        add_elu(c_, row, add, ld_add, y[l].at(t_, b_), M_, hidden);
      } else {
        T *x = (*hat)[l].at(t_, b_), *r = (*rstd)[l].at(t_, b_);
        add_normalise(c_, row, add, ld_add, layout_.norm(), x, r, M_, hidden);
        affine_silu(x, w.scale, w.shift, y[l].at(t_, b_), hidden, M_, hidden);
      }
    }
  }

  void choose_action() {
    const Size S = layout_.S, D = layout_.D, A = layout_.A, x = layout_.action_in();
    const Net& net = plan_.policy;
    const bool projected = in_.policy_proj != nullptr;
    T* action_in = kept_.action_in.at(t_, b_);
    pack(kept_.deter_in.at(t_, b_), D, D, action_in, x, S);
    network(net, projected ? in_.policy_proj + at(net.hidden()) : layer(net.layer).bias,
            projected ? net.hidden() : 0, kept_.policy, nullptr, nullptr);
    const T* bias = layer(net.layer + net.layers - 1).bias;
    act(c_, bias, bias + A, in_.action_noise + at(A), static_cast<T>(constants_.action_min_std),
        kept_.action_raw.at(t_, b_), out_.action + at(A), action_in + S, x, M_, A);
  }

  void advance() {
    if (layout_.in_blocks()) return advance_in_blocks();
    const Size D = layout_.D, x = layout_.action_in(), in = layout_.cell_in();
    const T* cell_in = kept_.action_in.at(t_, b_);
    if (layout_.pre_width) {
      const LayerOf<const T>& w = layer(places_.pre);
      T *hat = kept_.pre_hat.at(t_, b_), *y = kept_.pre.at(t_, b_);
      pack(cell_in, x, x);
      product(plan_.pre, c_, in);
      add_normalise(c_, in, w.bias, 0, layout_.norm(), hat, kept_.pre_rstd.at(t_, b_), M_, in);
      affine_silu(hat, w.scale, w.shift, y, in, M_, in);
      cell_in = y;
    }
    const LayerOf<const T>& w = layer(places_.cell_input);
    const T* h = kept_.deter_in.at(t_, b_);
    T *gates = kept_.gates.at(t_, b_), *deter = out_.deter + at(D);
    if (layout_.cell == Cell::kTorchGru) {
      pack(cell_in, in, in);
      product(plan_.cell_input, c_, 4 * D);
      pack(h, D, D);
      product(plan_.cell_state_rz, c_, 4 * D, true);
      product(plan_.cell_state_n, c_ + 3 * D, 4 * D);
      torch_gru(c_, w.bias, layer(places_.cell_state).bias, h, gates, deter, M_, D);
      return;
    }
    T* hat = kept_.cell_hat.at(t_, b_);
    pack(cell_in, in, in, h, D, D);
    product(plan_.cell_input, c_, 3 * D);
    const Norm norm{true, layout_.cell == Cell::kLnGruA ? 1e-5 : 1e-3};
    add_normalise(c_, 3 * D, w.bias, 0, norm, hat, kept_.cell_rstd.at(t_, b_), M_, 3 * D);
    ln_gru(hat, w.scale, w.shift, h, gates, deter, M_, D, 1, ln_gru_order(layout_.cell));
  }

  // y <- what the products in c_ become in a layer with norm and SiLU
  void activate(Size l, Size out, T* hat, T* rstd, T* y, Size ldy) {
    const LayerOf<const T>& w = layer(l);
    add_normalise(c_, out, w.bias, 0, layout_.norm(), hat, rstd, M_, out);
    affine_silu(hat, w.scale, w.shift, y, ldy, M_, out);
  }

  // block_gru
  void advance_in_blocks() {
    const Size D = layout_.D, S = layout_.S, x = layout_.action_in(), own = layout_.own();
    const Size count = ScanLayout::kBranches, width = layout_.branch, all = count * width;
    const T *h = kept_.deter_in.at(t_, b_), *action_in = kept_.action_in.at(t_, b_);
    const T* const inputs[] = {h, action_in, action_in + S};
    T* y = kept_.branch.at(t_, b_);
    for (Size i = 0; i < count; ++i) {
      pack(inputs[i], i ? x : D, layout_.branch_in(i));
      product(plan_.branches + i, c_, width);
      activate(places_.branches + i, width, kept_.branch_hat[i].at(t_, b_),
               kept_.branch_rstd[i].at(t_, b_), y + i * width, all);
    }
    T* mix = kept_.mix.at(t_, b_);
    pack(y, all, all);
    product(plan_.mix_shared, c_, D);
    for (Size g = 0; g < layout_.blocks; ++g) {
      pack(h + g * own, D, own);
      product(plan_.mix_own + g, c_ + g * own, D, true);
    }
    activate(places_.branches + count, D, kept_.mix_hat.at(t_, b_), kept_.mix_rstd.at(t_, b_), mix,
             D);
    for (Size g = 0; g < layout_.blocks; ++g) {
      pack(mix + g * own, D, own);
      product(plan_.cell_input + g, c_ + 3 * g * own, 3 * D);
    }
    ln_gru<T>(c_, nullptr, layer(places_.cell_input).bias, h, kept_.gates.at(t_, b_),
              out_.deter + at(D), M_, D, layout_.blocks, ln_gru_order(layout_.cell));
  }

  void draw() {
    const Size S = layout_.S, D = layout_.D;
    const Net& net = plan_.head;
    pack(out_.deter + at(D), D, D);
    const bool observe = in_.embed_proj != nullptr;
    network(net, observe ? in_.embed_proj + at(net.hidden()) : layer(net.layer).bias,
            observe ? net.hidden() : 0, kept_.head, &kept_.head_hat, &kept_.head_rstd);
    const T* bias = layer(net.layer + net.layers - 1).bias;
    if (layout_.gaussian()) {
      gaussian(c_, bias, bias + S, in_.noise + at(S), static_cast<T>(constants_.min_std),
               layout_.split(), out_.stats0 + at(S), out_.stats1 + at(S), kept_.raw.at(t_, b_),
               out_.stoch + at(S), M_, S);
    } else {
      categorical(c_, bias, in_.noise + at(layout_.groups), static_cast<T>(constants_.unimix),
                  out_.stats0 + at(S), out_.stoch + at(S), lines_, M_, S, layout_.groups);
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
  const KeptArrays<T>& kept_;
  Size t_ = 0, b_ = 0, M_ = 0;
  T *c_ = nullptr, *lines_ = nullptr;
  char* rows_ = nullptr;
};

}  // namespace

template <typename T>
void scan_forward(const Gemm<T>& gemm, const ScanLayout& layout, const ScanConstants& constants,
                  const ScanInputs<T>& in, const std::vector<LayerOf<const T>>& weights,
                  const char* packed, const ScanOutputs<T>& out, int threads) {
  static thread_local Scratch one_time;
  const Plan plan(layout);
  const PackedWeights<T> products(gemm, plan.forward, packed);
  const bool keep = out.saved != nullptr;
  T* buffer = keep ? out.saved : one_time.take<T>(layout.B * KeptArrays<T>::width(layout));
  const KeptArrays<T> kept(layout, buffer, keep);
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch scratch;
    using Scan = ForwardScan<T>;
    T* memory = scratch.take<T>(Scan::scratch_numel(plan, layout, gemm));
    Scan scan(plan, layout, constants, in, weights, products, out, kept);
    for_blocks(layout.B, omp_get_thread_num(), omp_get_num_threads(),
               [&](Size b, Size M) { scan.run(b, M, memory); });
  }
}

#define FASTRSSM_INSTANTIATE(T)                                                             \
  template void scan_forward<T>(const Gemm<T>&, const ScanLayout&, const ScanConstants&,    \
                                const ScanInputs<T>&, const std::vector<LayerOf<const T>>&, \
                                const char*, const ScanOutputs<T>&, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)

}  // namespace fastrssm::cpu
