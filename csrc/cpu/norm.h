// Which norm follows a layer.
#pragma once

namespace fastrssm::cpu {

// A row over the root of its mean square and eps: LayerNorm subtracts the mean of the row before.
struct Norm {
  bool centred;
  double eps;
};
constexpr Norm kLayerNorm{true, 1e-5}, kRmsNorm{false, 1e-4};

}  // namespace fastrssm::cpu
