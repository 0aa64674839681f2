// What a launch of a cluster scan is told: sizes and addresses, in the order of ops/rssm_cuda.py.
#pragma once

#include <cstdint>

#include "cuda/rssm_cluster.h"

namespace fastrssm::cluster {

// Addresses of a launch: inputs, results, gradients of results, what the launch writes besides,
// packed weights, then weight, bias, scale and shift of each layer.
enum Tensor : int {
  kInEmbedProj,
  kInAction,
  kInNoise,
  kInActionNoise,
  kInIsFirst,
  kInDeter0,
  kInStoch0,
  kInPolicyProj,
  kOutDeter,
  kOutStoch,
  kOutMean,
  kOutStd,
  kOutAction,
  kOutKept,
  kInDeterGrad,
  kInStochGrad,
  kInMeanGrad,
  kInStdGrad,
  kInActionGrad,
  kOutGradients,
  kOutDeter0Grad,
  kOutStoch0Grad,
  kOutActionGrad,
  kInPacked,
  kInLayers
};

// layout: T, B, then the numbers of ops.rssm_plan.Plan.structure before those of the layers.
inline Sizes sizes_of(const std::int64_t* layout) {
  const auto number = [&](int i) { return static_cast<int>(layout[i]); };
  Sizes s;
  s.T = layout[0];
  s.B = layout[1];
  s.D = number(2);
  s.S = number(3);
  s.A = number(4);
  s.split = layout[7] == 0;
  s.pre = number(9);
  s.head_layers = number(10);
  s.head_width = number(11);
  s.policy_layers = number(12);
  s.policy_width = number(13);
  // of a gaussian latent the groups are 1
  s.groups = layout[8] == 1 ? number(5) : 0;
  // the order of ops.rssm_plan.CELLS
  s.update_first = layout[6] == 1;
  s.norm_gates = layout[6] == 1 || layout[6] == 2;
  s.blocks = number(16);
  s.branch = number(17);
  s.observe = layout[14] != 0;
  s.detach = layout[15] != 0;
  return s;
}

// constants: min_std, unimix, action_min_std
inline Pointers pointers_of(const std::uintptr_t* tensors, int layers, const double* constants,
                            bool learns) {
  const auto read = [&](int i) { return reinterpret_cast<const float*>(tensors[i]); };
  const auto write = [&](int i) { return reinterpret_cast<float*>(tensors[i]); };
  Pointers g = {};
  g.source[kEmbedProj] = read(kInEmbedProj);
  g.source[kAction] = read(kInAction);
  g.source[kNoise] = read(kInNoise);
  g.source[kActionNoise] = read(kInActionNoise);
  g.source[kPolicyProj] = read(kInPolicyProj);
  g.source[kDeter] = read(kOutDeter);
  g.source[kDrawn] = read(kOutAction);
  g.source[kKept] = read(kOutKept);
  g.source[kLogits] = read(kOutMean);
  g.source[kDeterGrad] = read(kInDeterGrad);
  g.source[kStochGrad] = read(kInStochGrad);
  g.source[kMeanGrad] = read(kInMeanGrad);
  g.source[kStdGrad] = read(kInStdGrad);
  g.source[kActionGrad] = read(kInActionGrad);
  g.is_first = reinterpret_cast<const unsigned char*>(tensors[kInIsFirst]);
  g.deter0 = read(kInDeter0);
  g.stoch0 = read(kInStoch0);
  g.packed = reinterpret_cast<const unsigned char*>(tensors[kInPacked]);
  for (int l = 0; l < layers; ++l) {
    for (int part = 0; part < 3; ++part) g.part[l][part] = read(kInLayers + 4 * l + 1 + part);
  }
  g.deter = write(kOutDeter);
  g.stoch = write(kOutStoch);
  g.mean = write(kOutMean);
  g.std = write(kOutStd);
  g.action = write(kOutAction);
  g.kept = write(kOutKept);
  g.gradients = write(kOutGradients);
  g.deter0_grad = write(kOutDeter0Grad);
  g.stoch0_grad = write(kOutStoch0Grad);
  g.given_action_grad = write(kOutActionGrad);
  g.min_std = static_cast<float>(constants[0]);
  g.unimix = static_cast<float>(constants[1]);
  g.action_min_std = static_cast<float>(constants[2]);
  g.learns = learns;
  return g;
}

// Weights of the layers, for packing.
struct LayerWeights {
  const float* weight[kMaxLayers];
};

// Packs one lane's part of one tile: `item` counts lanes of tiles of ranks.
FASTRSSM_HD void pack_lane(const Program& p, const LayerWeights& layers, std::int64_t item,
                           unsigned char* packed) {
  const int lane = static_cast<int>(item % kWarp);
  const std::int64_t place = item / kWarp;
  const int rank = static_cast<int>(place / p.tiles);
  const int tile = static_cast<int>(place % p.tiles);
  int s = p.stages - 1;
  while (p.stage[s].product.segments == 0 || p.stage[s].product.packed > tile) --s;
  const Product& product = p.stage[s].product;
  const int depth = product.depth(), row = (tile - product.packed) / depth;
  const int k_tile = (tile - product.packed) % depth;
  const int segment = k_tile >= product.segment[0].tiles;
  Words words;
  for (int r = 0; r < 4; ++r) {
    float value[2];
    for (int j = 0; j < 2; ++j) {
      int i, k, layer;
      fragment_place(lane, r, &i, &k);
      const std::int64_t at =
          weight_place(product, rank, row, segment,
                       segment ? k_tile - product.segment[0].tiles : k_tile, i, k + j, p.D, &layer);
      value[j] = at < 0 ? 0.0f : layers.weight[layer][at];
    }
    words.word[r] = bfloat16_pair(value[0], value[1]);
  }
  reinterpret_cast<Words*>(packed)[item] = words;
}

}  // namespace fastrssm::cluster
