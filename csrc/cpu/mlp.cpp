#include "cpu/mlp.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/rssm_plan.h"
#include "cpu/rssm_pointwise.h"

namespace fastrssm::cpu {

MlpLayout::MlpLayout(const std::vector<Size>& values)
    : rows(values.at(0)),
      in(values.at(1)),
      width(values.at(2)),
      layers(values.at(3)),
      normed(values.at(4) != 0),
      norm(values.at(4) == 1 ? kLayerNorm : kRmsNorm),
      activate_last(values.at(5) != 0),
      out(values.begin() + 6, values.end()) {}

namespace {

// Rows that a thread takes through all layers together: enough to use a weight often while it is
// near, few enough for the second-level cache.
constexpr Size kBlock = 64;
// rows whose gradients of pre-activations are kept until the products with them are done
constexpr Size kChunk = 1024;
static_assert(kChunk % kBlock == 0);

Size aligned(Size numbers) { return (numbers + 15) / 16 * 16; }

// Where the arrays of each layer lie: what it computes [rows, out], and for a normalised one the
// normalised [rows, out] and the factor of each row.
template <typename T>
class Arrays {
 public:
  struct Of {
    T *y = nullptr, *hat = nullptr, *rstd = nullptr;
  };

  // null `memory` only counts; `results`: that of the last layers, null: they have none
  Arrays(const MlpLayout& layout, Size rows, T* memory, T* results) : memory_(memory) {
    for (Size g = 0; g < layout.nets(); ++g) {
      for (Size l = 0; l < layout.layers; ++l) {
        Of of;
        const Size out = layout.out_of(l, g);
        if (l + 1 < layout.layers) {
          of.y = take(rows * out);
        } else if (results) {
          of.y = results;
          results += rows * out;
        }
        if (layout.normed && layout.hidden(l)) {
          of.hat = take(rows * out);
          of.rstd = take(rows);
        }
        all_.push_back(of);
      }
    }
  }
  const Of& operator[](Size layer) const { return all_[static_cast<std::size_t>(layer)]; }
  Size numel() const { return used_; }

 private:
  T* take(Size numbers) {
    const Size place = used_;
    used_ += numbers;
    return memory_ ? memory_ + place : nullptr;
  }
  T* memory_;
  Size used_ = 0;
  std::vector<Of> all_;
};

// All weights of one direction, packed.
template <typename T>
class Packed {
 public:
  Packed(const Gemm<T>& gemm, const MlpLayout& layout,
         const std::vector<MlpLayer<const T>>& weights, bool transposed, Scratch& memory,
         int threads)
      : gemm_(gemm) {
    Size bytes = 0;
    for (Size i = 0; i < layout.nets() * layout.layers; ++i) {
      const Size l = i % layout.layers, out = layout.out_of(l, i / layout.layers);
      const Size N = transposed ? layout.in_of(l) : out, K = transposed ? out : layout.in_of(l);
      products_.push_back({N, K, bytes});
      bytes += PackedWeights<T>::aligned(weight_bytes(gemm, N, K));
    }
    memory_ = memory.take<char>(bytes);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (std::size_t i = 0; i < products_.size(); ++i) {
      const One& p = products_[i];
      const Size in = transposed ? p.N : p.K;
      pack_weights(gemm, weights[i].weight, transposed ? 1 : in, transposed ? in : 1, p.N, p.K,
                   memory_ + p.place);
    }
  }
  void multiply(Size layer, const char* rows, Size M, T* c, Size ldc,
                bool accumulate = false) const {
    const One& p = products_[static_cast<std::size_t>(layer)];
    cpu::multiply(gemm_, rows, memory_ + p.place, M, p.N, p.K, c, ldc, accumulate);
  }

 private:
  struct One {
    Size N, K, place;
  };
  const Gemm<T>& gemm_;
  std::vector<One> products_;
  char* memory_;
};

Size widest(const MlpLayout& layout) {
  return std::max(
      {layout.in, layout.width, *std::max_element(layout.out.begin(), layout.out.end())});
}

// memory of a thread for one block of rows: packed, and [kBlock, widest]
template <typename T>
Size block_numel(const Gemm<T>& gemm, const MlpLayout& layout) {
  const Size size = static_cast<Size>(sizeof(T));
  return aligned(row_bytes<T>(gemm, kBlock, widest(layout)) / size) + kBlock * widest(layout);
}

Size blocks_of(Size rows) { return (rows + kBlock - 1) / kBlock; }

template <typename T>
void zero(T* to, Size numbers) {
  if (to) std::memset(to, 0, static_cast<std::size_t>(numbers) * sizeof(T));
}

}  // namespace

Size mlp_saved_numel(const MlpLayout& layout) {
  return Arrays<float>(layout, layout.rows, nullptr, nullptr).numel();
}

template <typename T>
void mlp_forward(const Gemm<T>& gemm, const MlpLayout& layout, const T* x,
                 const std::vector<MlpLayer<const T>>& weights, T* results, T* saved, int threads) {
  static thread_local Scratch weight_memory, one_time;
  const Packed<T> packed(gemm, layout, weights, false, weight_memory, threads);
  if (!saved) saved = one_time.take<T>(mlp_saved_numel(layout));
  const Arrays<T> arrays(layout, layout.rows, saved, results);
  const auto pack = [&](const T* from, Size width, Size M, char* rows) {
    pack_rows<T>(gemm, {from, width, width}, {nullptr, 0, 0}, M, rows);
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    static thread_local Scratch scratch;
    T* memory = scratch.take<T>(block_numel(gemm, layout));
    T* c = memory + block_numel(gemm, layout) - kBlock * widest(layout);
    char* rows = reinterpret_cast<char*>(memory);
#pragma omp for schedule(static)
    for (Size block = 0; block < blocks_of(layout.rows); ++block) {
      const Size first = block * kBlock, M = std::min(kBlock, layout.rows - first);
      for (Size l = 0; l < layout.layers; ++l) {
        if (l == 0) pack(x + first * layout.in, layout.in, M, rows);
        for (Size g = 0; g < layout.nets(); ++g) {
          const Size i = g * layout.layers + l, out = layout.out_of(l, g);
          const MlpLayer<const T>& w = weights[static_cast<std::size_t>(i)];
          if (l) pack(arrays[i - 1].y + first * layout.width, layout.width, M, rows);
          T* y = arrays[i].y + first * out;
          if (!layout.hidden(l)) {
            packed.multiply(i, rows, M, y, out);
            add_to(y, out, w.bias, 0, M, out);
            continue;
          }
          packed.multiply(i, rows, M, c, out);
          if (layout.normed) {
            T* hat = arrays[i].hat + first * out;
            add_normalise(c, out, w.bias, 0, layout.norm, hat, arrays[i].rstd + first, M, out);
            affine_silu(hat, w.scale, w.shift, y, out, M, out);
          } else {
            add_elu(c, out, w.bias, 0, y, M, out);
          }
        }
      }
    }
  }
}

namespace {

// Gradients of all pre-activations in a chunk of rows; `affine` ones are those between a norm and
// its activation.
template <typename T>
struct ChunkGrad {
  T *d = nullptr, *affine = nullptr;
};

// From the gradients of the results to those of all pre-activations, and of the input.
template <typename T>
class BackwardBlock {
 public:
  BackwardBlock(const Gemm<T>& gemm, const MlpLayout& layout, const Packed<T>& packed,
                const std::vector<MlpLayer<const T>>& weights, const Arrays<const T>& arrays,
                T* x_grad, T* memory)
      : gemm_(gemm),
        layout_(layout),
        packed_(packed),
        weights_(weights),
        arrays_(arrays),
        x_grad_(x_grad),
        rows_(reinterpret_cast<char*>(memory)),
        c_(memory + block_numel(gemm, layout) - kBlock * widest(layout)) {}

  // rows [first, first + M), `at` rows after the beginning of their chunk
  void run(const std::vector<ChunkGrad<T>>& grads, Size first, Size at, Size M) {
    for (Size g = 0; g < layout_.nets(); ++g) {
      for (Size l = layout_.layers - 1; l >= 0; --l) {
        const Size i = g * layout_.layers + l, out = layout_.out_of(l, g);
        const ChunkGrad<T>& grad = grads[static_cast<std::size_t>(i)];
        T* d = grad.d + at * out;
        if (layout_.hidden(l)) {
          // of the result of an activated last layer, or what the layer behind has left
          const T* dy = l + 1 == layout_.layers ? d : c_;
          deactivate(i, dy, out, d, grad.affine ? grad.affine + at * out : nullptr, first, M);
        }
        if (l == 0 && !x_grad_) continue;
        pack_rows<T>(gemm_, {d, out, out}, {nullptr, 0, 0}, M, rows_);
        if (l == 0) {
          packed_.multiply(i, rows_, M, x_grad_ + first * layout_.in, layout_.in, g > 0);
        } else {
          packed_.multiply(i, rows_, M, c_, layout_.width);
        }
      }
    }
  }

 private:
  void deactivate(Size i, const T* dy, Size out, T* d, T* affine, Size first, Size M) {
    const auto& array = arrays_[i];
    if (!layout_.normed) {
      elu_backward(dy, out, array.y + first * out, d, M, out);
      return;
    }
    const MlpLayer<const T>& w = weights_[static_cast<std::size_t>(i)];
    const T* hat = array.hat + first * out;
    silu_backward(dy, out, hat, w.scale, w.shift, affine, M, out);
    normalise_backward(affine, hat, w.scale, array.rstd + first, layout_.norm, d, M, out);
  }

  const Gemm<T>& gemm_;
  const MlpLayout& layout_;
  const Packed<T>& packed_;
  const std::vector<MlpLayer<const T>>& weights_;
  const Arrays<const T>& arrays_;
  T* x_grad_;
  char* rows_;
  T* c_;
};

// to[n] += sum over rows of dy[., n] (times x[., n])
template <typename T>
void add_sums(T* to, const T* dy, const T* x, Size rows, Size N, int threads) {
  if (!to) return;
  constexpr Size kShare = 64;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (Size n = 0; n < N; n += kShare) {
    add_column_sums(dy + n, x ? x + n : nullptr, N, rows, std::min(kShare, N - n), to + n);
  }
}

}  // namespace

template <typename T>
void mlp_backward(const Gemm<T>& gemm, const MlpLayout& layout, const T* x,
                  const std::vector<MlpLayer<const T>>& weights, const T* results, const T* saved,
                  const T* grad, T* x_grad, const std::vector<MlpLayer<T>>& weight_grads,
                  int threads) {
  static thread_local Scratch weight_memory, chunk_memory, workspace;
  const Packed<T> packed(gemm, layout, weights, true, weight_memory, threads);
  const Arrays<const T> arrays(layout, layout.rows, saved, results);
  const Size count = layout.nets() * layout.layers;
  const auto layer_of = [&](Size i) { return i % layout.layers; };
  const auto out_of = [&](Size i) { return layout.out_of(layer_of(i), i / layout.layers); };
  bool learning = false;
  for (Size i = 0; i < count; ++i) {
    const Size out = out_of(i);
    const MlpLayer<T>& to = weight_grads[static_cast<std::size_t>(i)];
    zero(to.weight, layout.in_of(layer_of(i)) * out);
    zero(to.bias, out);
    zero(to.scale, out);
    zero(to.shift, out);
    learning = learning || to.weight || to.bias || to.scale || to.shift;
  }
  // one chunk after the other, in the same memory
  const Size chunk_rows = std::min(kChunk, layout.rows);
  const auto lay_out = [&](T* memory) {
    Size used = 0;
    std::vector<ChunkGrad<T>> grads(static_cast<std::size_t>(count));
    const auto take = [&](Size width) {
      T* place = memory ? memory + used : nullptr;
      used += aligned(chunk_rows * width);
      return place;
    };
    for (Size i = 0; i < count; ++i) {
      ChunkGrad<T>& one = grads[static_cast<std::size_t>(i)];
      one.d = take(out_of(i));
      if (layout.normed && layout.hidden(layer_of(i))) one.affine = take(out_of(i));
    }
    return std::pair(used, grads);
  };
  const auto grads = lay_out(chunk_memory.take<T>(lay_out(nullptr).first)).second;
  for (Size begin = 0; begin < layout.rows; begin += kChunk) {
    const Size end = std::min(begin + kChunk, layout.rows), R = end - begin;
    // the weights of layers that read one input
    const auto add_outer = [&](const std::vector<Size>& those, const T* input) {
      const Size in = layout.in_of(layer_of(those[0]));
      OuterProducts<T> products{{}, {{input + begin * in, in, in}}, {}};
      for (Size i : those) {
        T* to = weight_grads[static_cast<std::size_t>(i)].weight;
        if (!to) continue;
        products.dy.push_back({grads[static_cast<std::size_t>(i)].d, out_of(i), out_of(i)});
        products.dw.push_back({to, in});
      }
      if (products.dy.empty()) return;
      void* memory = workspace.take<char>(outer_product_bytes(gemm, products, threads));
      add_outer_products(gemm, products, R, memory, threads);
    };
    // the last layers' gradients are those of the results
    const T* from = grad;
    for (Size g = 0; g < layout.nets(); ++g) {
      const Size out = layout.out[static_cast<std::size_t>(g)];
      std::memcpy(grads[static_cast<std::size_t>((g + 1) * layout.layers - 1)].d,
                  from + begin * out, static_cast<std::size_t>(R * out) * sizeof(T));
      from += layout.rows * out;
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      static thread_local Scratch scratch;
      BackwardBlock<T> work(gemm, layout, packed, weights, arrays, x_grad,
                            scratch.take<T>(block_numel(gemm, layout)));
#pragma omp for schedule(static)
      for (Size block = 0; block < blocks_of(R); ++block) {
        const Size at = block * kBlock;
        work.run(grads, begin + at, at, std::min(kBlock, R - at));
      }
    }
    if (learning) {
      std::vector<Size> first;
      for (Size g = 0; g < layout.nets(); ++g) first.push_back(g * layout.layers);
      add_outer(first, x);
    }
    for (Size i = 0; learning && i < count; ++i) {
      const Size out = out_of(i);
      const MlpLayer<T>& to = weight_grads[static_cast<std::size_t>(i)];
      const ChunkGrad<T>& one = grads[static_cast<std::size_t>(i)];
      if (layer_of(i)) add_outer({i}, arrays[i - 1].y);
      add_sums(to.bias, one.d, static_cast<const T*>(nullptr), R, out, threads);
      if (!one.affine) continue;
      add_sums(to.scale, one.affine, arrays[i].hat + begin * out, R, out, threads);
      add_sums(to.shift, one.affine, static_cast<const T*>(nullptr), R, out, threads);
    }
  }
}

#define FASTRSSM_INSTANTIATE(T)                                                            \
  template void mlp_forward<T>(const Gemm<T>&, const MlpLayout&, const T*,                 \
                               const std::vector<MlpLayer<const T>>&, T*, T*, int);        \
  template void mlp_backward<T>(const Gemm<T>&, const MlpLayout&, const T*,                \
                                const std::vector<MlpLayer<const T>>&, const T*, const T*, \
                                const T*, T*, const std::vector<MlpLayer<T>>&, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)
#undef FASTRSSM_INSTANTIATE

}  // namespace fastrssm::cpu
