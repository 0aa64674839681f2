// What acts: the same weights meet a few new rows again and again. Everything that does not change
// is found once, and a step is one call. float32, without gradient.
#pragma once

#include <optional>
#include <vector>

#include "cpu/rssm_plan.h"
#include "cpu/rssm_scan.h"

namespace fastrssm::cpu {

// W [out, in], rows `ld` apart, and b.
struct AffineLayer {
  const float* weight;
  Size ld;
  const float* bias;
  Size out;
};

// Affine layers with ELU between them. Biases are the caller's; weights are copied.
class PackedNet {
 public:
  PackedNet(const Gemm<float>& gemm, Size in, std::vector<AffineLayer> layers);
  PackedNet(const PackedNet&) = delete;
  PackedNet& operator=(const PackedNet&) = delete;

  // y [B, out] from x [B, in], on at most as many threads as there are rows
  void run(const float* x, Size B, float* y, int threads) const;

 private:
  const Gemm<float>& gemm_;
  const std::vector<AffineLayer> layers_;
  std::vector<Product> products_;
  Size widest_;
  Scratch memory_;
  std::optional<PackedWeights<float>> weights_;
};

// One step of rssm_observe from the embedding itself. Weights, biases and packed weights are the
// caller's.
class RssmStep {
 public:
  // [B, ...] row-major; is_first may be null
  struct Inputs {
    const float *embed, *action, *noise;
    const bool* is_first;
    const float *deter, *stoch;
  };

  RssmStep(const Gemm<float>& gemm, const ScanLayout& layout, const ScanConstants& constants,
           std::vector<LayerOf<const float>> weights, const char* packed, Size embed_size,
           const AffineLayer& projection);

  // deter [B, D] and stoch [B, S] after the step
  void run(const Inputs& in, Size B, float* deter, float* stoch, int threads) const;

 private:
  const Gemm<float>& gemm_;
  const ScanLayout layout_;
  const ScanConstants constants_;
  const std::vector<LayerOf<const float>> weights_;
  const char* packed_;
  const PackedNet projection_;
};

}  // namespace fastrssm::cpu
