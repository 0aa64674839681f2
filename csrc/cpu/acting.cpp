#include "cpu/acting.h"

#include <omp.h>

#include <algorithm>
#include <utility>

#include "cpu/rssm_pointwise.h"

namespace fastrssm::cpu {

PackedNet::PackedNet(const Gemm<float>& gemm, Size in, std::vector<AffineLayer> layers)
    : gemm_(gemm), layers_(std::move(layers)), widest_(in) {
  Size bytes = 0;
  for (const AffineLayer& layer : layers_) {
    products_.push_back({0, 0, 0, in, layer.out, in});
    bytes += PackedWeights<float>::aligned(weight_bytes(gemm, layer.out, in));
    widest_ = std::max(widest_, layer.out);
    in = layer.out;
  }
  char* packed = memory_.take<char>(bytes);
  weights_.emplace(gemm, products_, packed);
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const Product& p = products_[l];
    pack_weights(gemm, layers_[l].weight, layers_[l].ld, Size{1}, p.N, p.K, packed);
    packed += PackedWeights<float>::aligned(weight_bytes(gemm, p.N, p.K));
  }
}

void PackedNet::run(const float* x, Size B, float* y, int threads) const {
  threads = static_cast<int>(std::min<Size>(threads, B));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch packed_rows, hidden;
    const Size most = std::min(B, kBlockRows), in = products_.front().K;
    char* rows = packed_rows.take<char>(row_bytes(gemm_, most, widest_));
    float* c = hidden.take<float>(most * widest_);
    for_blocks(B, omp_get_thread_num(), omp_get_num_threads(), [&](Size b, Size M) {
      const float* from = x + b * in;
      for (std::size_t l = 0; l < layers_.size(); ++l) {
        const Size N = products_[l].N, K = products_[l].K;
        const bool last = l + 1 == layers_.size();
        float* to = last ? y + b * N : c;
        pack_rows<float>(gemm_, {from, K, K}, {nullptr, 0, 0}, M, rows);
        weights_->multiply(static_cast<Size>(l), rows, M, to, N);
        if (last) {
          add_to(to, N, layers_[l].bias, 0, M, N);
        } else {
          add_elu(to, N, layers_[l].bias, 0, to, M, N);
        }
        from = to;
      }
    });
  }
}

namespace {

ScanLayout one_step(ScanLayout layout, Size B) {
  layout.T = 1;
  layout.B = B;
  return layout;
}

}  // namespace

RssmStep::RssmStep(const Gemm<float>& gemm, const ScanLayout& layout,
                   const ScanConstants& constants, std::vector<LayerOf<const float>> weights,
                   const char* packed, Size embed_size, const AffineLayer& projection)
    : gemm_(gemm),
      layout_(layout),
      constants_(constants),
      weights_(std::move(weights)),
      packed_(packed),
      projection_(gemm, embed_size, {projection}) {}

void RssmStep::run(const Inputs& in, Size B, float* deter, float* stoch, int threads) const {
  static thread_local Scratch scratch;
  const Size wide = layout_.head_hidden(), S = layout_.S;
  float* proj = scratch.take<float>(B * (wide + 2 * S));
  float *stats0 = proj + B * wide, *stats1 = stats0 + B * S;
  projection_.run(in.embed, B, proj, threads);
  // a thread without rows would be woken for nothing
  threads = static_cast<int>(std::min<Size>(threads, B));
  scan_forward<float>(
      gemm_, one_step(layout_, B), constants_,
      {proj, in.action, in.noise, nullptr, in.is_first, in.deter, in.stoch, nullptr}, weights_,
      packed_, {deter, stoch, stats0, stats1, nullptr, nullptr}, threads);
}

}  // namespace fastrssm::cpu
