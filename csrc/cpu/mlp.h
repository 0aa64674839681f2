// Networks of one shape that read one input, forward and backward: hidden layers (affine; then ELU,
// or a norm and SiLU), then an affine head each. Formulas: fastrssm/reference/mlp.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/norm.h"

namespace fastrssm::cpu {

using Size = std::int64_t;

// Sizes in the order in which ops/mlp.py lists them; the sizes of the nets' results follow.
struct MlpLayout {
  Size rows, in, width;  // of the input, of hidden layers
  Size layers;           // of a net, with the head
  bool normed;           // hidden layers: a norm and SiLU, not ELU
  Norm norm;
  bool activate_last;  // the last layer is a hidden one
  std::vector<Size> out;

  explicit MlpLayout(const std::vector<Size>& values);
  Size nets() const { return static_cast<Size>(out.size()); }
  bool hidden(Size l) const { return activate_last || l + 1 < layers; }
  Size in_of(Size l) const { return l ? width : in; }
  Size out_of(Size l, Size net) const { return l + 1 < layers ? width : out[net]; }
};

// One affine layer, normalised if it has a scale, with a shift but for RMS norm; layer l of net g
// is number g * layers + l.
template <typename T>
struct MlpLayer {
  T *weight, *bias, *scale, *shift;
};

Size mlp_saved_numel(const MlpLayout& layout);

// results: [rows, out] of one net after the other. saved: [mlp_saved_numel(layout)], or null if no
// gradient will be asked for.
template <typename T>
void mlp_forward(const Gemm<T>& gemm, const MlpLayout& layout, const T* x,
                 const std::vector<MlpLayer<const T>>& weights, T* results, T* saved, int threads);

// Gradients that are null are not wanted; the others are written whole.
template <typename T>
void mlp_backward(const Gemm<T>& gemm, const MlpLayout& layout, const T* x,
                  const std::vector<MlpLayer<const T>>& weights, const T* results, const T* saved,
                  const T* grad, T* x_grad, const std::vector<MlpLayer<T>>& weight_grads,
                  int threads);

}  // namespace fastrssm::cpu
