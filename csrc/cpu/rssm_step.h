// One step of rssm_observe for acting: the same weights meet a few new rows again and again. What
// does not change is found once, and the embedding's half of the head is projected here as well.
#pragma once

#include <omp.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/rssm_plan.h"
#include "cpu/rssm_scan.h"

namespace fastrssm::cpu {

// [B, ...] row-major; is_first may be null.
struct StepInputs {
  const float *embed, *action, *noise;
  const bool* is_first;
  const float *deter, *stoch;
};

// The embedding's half of the first layer: W [wide, E], rows `ld` apart, and b.
struct Projection {
  const float* weight;
  Size ld, E;
  const float* bias;
};

// Weights, biases and packed weights are the caller's; the projection's weight is copied.
class RssmStep {
 public:
  RssmStep(const Gemm<float>& gemm, const ScanLayout& layout, const ScanConstants& constants,
           std::vector<LayerOf<const float>> weights, const char* packed, const Projection& embed)
      : gemm_(gemm),
        layout_(layout),
        constants_(constants),
        weights_(std::move(weights)),
        packed_(packed),
        E_(embed.E),
        wide_(layout.head_hidden()),
        bias_(embed.bias) {
    layout_.T = 1;
    projection_ = memory_.take<char>(weight_bytes(gemm, wide_, E_));
    pack_weights(gemm, embed.weight, embed.ld, Size{1}, wide_, E_, projection_);
  }

  // deter [B, D] and stoch [B, S] after the step, on at most as many threads as there are rows
  void run(const StepInputs& in, Size B, float* deter, float* stoch, int threads) const {
    static thread_local Scratch scratch;
    threads = static_cast<int>(std::min<Size>(threads, B));
    float* proj = scratch.take<float>(B * (wide_ + 2 * layout_.S));
    float *stats0 = proj + B * wide_, *stats1 = stats0 + B * layout_.S;
    project(in.embed, B, proj, threads);
    ScanLayout layout = layout_;
    layout.B = B;
    const ScanInputs<float> inputs{proj,        in.action, in.noise, nullptr,
                                   in.is_first, in.deter,  in.stoch, nullptr};
    const ScanOutputs<float> outputs{deter, stoch, stats0, stats1, nullptr, nullptr};
    scan_forward<float>(gemm_, layout, constants_, inputs, weights_, packed_, outputs, threads);
  }

 private:
  // proj [B, wide] = W embed + b
  void project(const float* embed, Size B, float* proj, int threads) const {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      static thread_local Scratch scratch;
      char* rows = scratch.take<char>(row_bytes(gemm_, std::min(B, kBlockRows), E_));
      for_blocks(B, omp_get_thread_num(), omp_get_num_threads(), [&](Size b, Size M) {
        float* to = proj + b * wide_;
        pack_rows<float>(gemm_, {embed + b * E_, E_, E_}, {nullptr, 0, 0}, M, rows);
        multiply<float>(gemm_, rows, projection_, M, wide_, E_, to, wide_, false);
        for (Size m = 0; m < M; ++m) {
          for (Size n = 0; n < wide_; ++n) to[m * wide_ + n] += bias_[n];
        }
      });
    }
  }

  const Gemm<float>& gemm_;
  ScanLayout layout_;
  const ScanConstants constants_;
  const std::vector<LayerOf<const float>> weights_;
  const char* packed_;
  const Size E_, wide_;
  const float* bias_;
  Scratch memory_;
  char* projection_;
};

}  // namespace fastrssm::cpu
