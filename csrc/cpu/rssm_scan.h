// A whole sequence of an RSSM, forward and backward: the four scans of fastrssm.ops are one, with
// or without observations (observe, imagine) and with or without a policy in the loop. The
// formulas are those of fastrssm/reference/rssm_step.py.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/norm.h"

namespace fastrssm::cpu {

using Size = std::int64_t;

enum class Cell : Size { kTorchGru, kLnGruA, kLnGruD, kBlockGru };
enum class Heads : Size { kSplit, kJoint };
enum class Latent : Size { kGaussian, kCategorical };

// categorical variables that are drawn side by side
constexpr Size kAbreast = 16;

// Sizes and variants, in the order in which ops/rssm_scan.py lists them.
struct ScanLayout {
  static constexpr Size kBranches = 3;  // of deter, stoch and action

  Size T, B, D, S, A;  // steps, batch, deter, stoch, action
  Size groups;         // of a categorical latent
  Cell cell;
  Heads heads;
  Latent latent;
  Size pre_width;  // of the layer before the cell; 0: there is none
  Size head_layers, head_width;
  Size policy_layers, policy_width;  // 0 layers: actions are given
  bool observe;                      // the head's first layer gets embed_proj instead of a bias
  bool detach;                       // no gradient through what the policy sees
  Size blocks, branch;               // of block_gru: diagonal blocks, width of an input branch

  explicit ScanLayout(const std::vector<Size>& values);
  Size rows() const { return T * B; }
  bool split() const { return heads == Heads::kSplit; }
  bool in_blocks() const { return cell == Cell::kBlockGru; }
  bool gaussian() const { return latent == Latent::kGaussian; }
  Size action_in() const { return S + A; }                        // [stoch | action]
  Size cell_in() const { return pre_width ? pre_width : S + A; }  // what the cell reads
  Size head_hidden() const { return split() ? 2 * head_width : head_width; }
  bool ln_gru() const { return cell == Cell::kLnGruA || cell == Cell::kLnGruD; }
  // of prior and posterior, and of the layers before the gates
  Norm norm() const { return in_blocks() ? kRmsNorm : kLayerNorm; }
  Size branch_in(Size i) const { return i == 0 ? D : i == 1 ? S : A; }
  // scratch of a draw among classes: probabilities of a line of variables, their gradients
  Size class_lines() const { return gaussian() ? 0 : 2 * kAbreast * (S / groups); }
  Size own() const { return D / blocks; }                     // units of a block
  Size mix_in() const { return own() + kBranches * branch; }  // what a block's mixture reads
  Size stats() const { return gaussian() ? 2 * S : S; }       // numbers of a latent
};

// One affine layer, normalised if it has a scale: RMS norm without a shift. From the second layer
// of split networks on, weights are [2, out, in] and biases [2, out].
template <typename T>
struct LayerOf {
  T *weight, *bias, *scale, *shift;
};

// Where each layer stands in the list of all.
struct LayerPlaces {
  explicit LayerPlaces(const ScanLayout& layout);
  Size pre, cell_input, cell_state, head, branches, policy, count;
};

// Everything that a scan reads, [T, B, ...] row-major; null where it is absent.
template <typename T>
struct ScanInputs {
  const T *embed_proj, *action, *noise, *action_noise;
  const bool* is_first;
  const T *deter0, *stoch0, *policy_proj;
};

// What it computes. stats0 is the mean or the logits, stats1 the standard deviation.
template <typename T>
struct ScanOutputs {
  T *deter, *stoch, *stats0, *stats1, *action;
  T* saved;  // [saved_numel(layout)], or null if no gradient will be asked for
};

struct ScanConstants {
  double min_std, unimix, action_min_std;
};

// Gradients of the outputs; null: zero.
template <typename T>
struct ScanOutputGrads {
  const T *deter, *stoch, *stats0, *stats1, *action;
};

// Gradients of the inputs; null: not wanted.
template <typename T>
struct ScanInputGrads {
  T *embed_proj, *action, *deter0, *stoch0, *policy_proj;
};

Size scan_saved_numel(const ScanLayout& layout);

// Weights as the products of one direction want them: packed once per optimiser step.
template <typename T>
Size scan_packed_bytes(const Gemm<T>& gemm, const ScanLayout& layout, bool transposed);
template <typename T>
void scan_pack(const Gemm<T>& gemm, const ScanLayout& layout,
               const std::vector<LayerOf<const T>>& weights, bool transposed, char* packed,
               int threads);

template <typename T>
void scan_forward(const Gemm<T>& gemm, const ScanLayout& layout, const ScanConstants& constants,
                  const ScanInputs<T>& in, const std::vector<LayerOf<const T>>& weights,
                  const char* packed, const ScanOutputs<T>& out, int threads);

// weight_grads has null pointers where no gradient is wanted; the others are written whole.
template <typename T>
void scan_backward(const Gemm<T>& gemm, const ScanLayout& layout, const ScanConstants& constants,
                   const ScanInputs<T>& in, const std::vector<LayerOf<const T>>& weights,
                   const char* packed, const ScanOutputs<T>& out, const ScanOutputGrads<T>& grads,
                   const ScanInputGrads<T>& input_grads,
                   const std::vector<LayerOf<T>>& weight_grads, int threads);

}  // namespace fastrssm::cpu
