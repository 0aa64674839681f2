#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm_kernels.h"

namespace fastrssm::cpu {
namespace {

// the largest that any table row below has
constexpr std::int64_t kMostPanel = 32, kMostLine = 2 * kLine, kMostTile = 16;
constexpr std::int64_t kPackBlockNumbers = kPackBlock * kMostPanel;
// rows of dy and x that are summed before the sum is added to the gradient
constexpr std::int64_t kOuterBlock = 256;

template <class S, bool kRounded = false>
Gemm<typename S::Number> plain(decltype(Gemm<typename S::Number>::multiply) multiply,
                               decltype(Gemm<typename S::Number>::multiply) multiply_across) {
  using T = typename S::Number;
  return {1,
          sizeof(T),
          1,
          2 * S::kWidth,
          S::kRows,
          false,
          pack_lines<T, kRounded>,
          pack_panel<T, kRounded>,
          multiply,
          multiply_across};
}

template <bool kRounded>
const Gemm<float>& plain_gemm(Isa isa) {
  using Portable = Plain<float, 16, 6>;
  static const Gemm<float> kPortable = plain<Portable, kRounded>(
      portable::multiply_rows<Portable, false>, portable::multiply_rows<Portable, true>);
#if defined(__x86_64__)
  using Avx2 = Plain<float, 32, 6>;
  using Avx512 = Plain<float, 64, 14>;
  static const Gemm<float> kAvx2 =
      plain<Avx2, kRounded>(avx2::multiply_rows<Avx2, false>, avx2::multiply_rows<Avx2, true>);
  static const Gemm<float> kAvx512 = plain<Avx512, kRounded>(avx512::multiply_rows<Avx512, false>,
                                                             avx512::multiply_rows<Avx512, true>);
  if (isa >= Isa::kAvx512) return kAvx512;
  if (isa == Isa::kAvx2) return kAvx2;
#endif
  return kPortable;
}

#if defined(__x86_64__)
template <class Unit, int kPlanes>
const Gemm<float>& tile_gemm() {
  static const Gemm<float> kGemm = {2,
                                    4,
                                    kPlanes,
                                    32,
                                    16,
                                    true,
                                    avx512_bf16::pack_lines<kPlanes>,
                                    avx512_bf16::pack_panel<kPlanes>,
                                    amx::multiply_rows<Unit>,
                                    nullptr};
  return kGemm;
}

template <class Unit>
const Gemm<float>& tile_gemm(Precision precision) {
  if (precision == Precision::kBFloat16) return tile_gemm<Unit, 1>();
  return precision == Precision::kSplit3 ? tile_gemm<Unit, 2>() : tile_gemm<Unit, 3>();
}

const Gemm<float>& pair_gemm() {
  static const Gemm<float> kGemm = {2,
                                    4,
                                    1,
                                    2 * Pairs::kWidth,
                                    Pairs::kRows,
                                    false,
                                    avx512_bf16::pack_lines<1>,
                                    avx512_bf16::pack_panel<1>,
                                    avx512_bf16::multiply_rows<Pairs, false>,
                                    avx512_bf16::multiply_rows<Pairs, true>};
  return kGemm;
}
#endif

}  // namespace

template <>
const Gemm<double>& choose_gemm(Precision, Isa) {
  using Portable = Plain<double, 16, 6>;
  static const Gemm<double> kGemm = plain<Portable>(portable::multiply_rows<Portable, false>,
                                                    portable::multiply_rows<Portable, true>);
  return kGemm;
}

template <>
const Gemm<float>& choose_gemm(Precision precision, Isa isa) {
#if defined(__x86_64__)
  if (precision != Precision::kFloat32) {
    if (isa == Isa::kAmx) return tile_gemm<amx::Tiles>(precision);
    if (isa == Isa::kAmxEmulated) return tile_gemm<amx::EmulatedTiles>(precision);
  }
  if (precision == Precision::kBFloat16 && isa >= Isa::kAvx512Bf16) return pair_gemm();
#endif
  if (precision == Precision::kBFloat16) return plain_gemm<true>(isa);
  return plain_gemm<false>(isa);
}

template <typename T>
std::int64_t row_bytes(const Gemm<T>& gemm, std::int64_t M, std::int64_t K) {
  const std::int64_t rows = gemm.whole_tiles ? (M + gemm.tile - 1) / gemm.tile * gemm.tile : M;
  return rows * gemm.planes * units_of(gemm, K) * gemm.unit_bytes;
}

template <typename T>
void pack_weights(const Gemm<T>& gemm, const T* w, std::int64_t stride_n, std::int64_t stride_k,
                  std::int64_t N, std::int64_t K, void* packed) {
  const std::int64_t unit_row = gemm.panel * gemm.unit_bytes;
  const std::int64_t plane_bytes = units_of(gemm, K) * unit_row;
  const std::int64_t used = (K + gemm.pair - 1) / gemm.pair * unit_row;
  const auto pack_block = [&](std::int64_t n, std::int64_t k) {
    const std::int64_t width = std::min(gemm.panel, N - n), count = std::min(kPackBlock, K - k);
    char* to = static_cast<char*>(packed) + n / gemm.panel * gemm.planes * plane_bytes +
               k / gemm.pair * unit_row;
    const T* from = w + n * stride_n + k * stride_k;
    if (stride_n == 1) {
      gemm.pack_panel(from, stride_k, count, width, to, gemm.panel, plane_bytes);
      return;
    }
    T block[kPackBlockNumbers];
    for (std::int64_t j = 0; j < width; ++j) {
      for (std::int64_t i = 0; i < count; ++i) block[i * gemm.panel + j] = from[j * stride_n + i];
    }
    gemm.pack_panel(block, gemm.panel, count, width, to, gemm.panel, plane_bytes);
  };
  // in the order in which W lies in memory
  if (stride_n == 1) {
    for (std::int64_t k = 0; k < K; k += kPackBlock) {
      for (std::int64_t n = 0; n < N; n += gemm.panel) pack_block(n, k);
    }
  } else {
    for (std::int64_t n = 0; n < N; n += gemm.panel) {
      for (std::int64_t k = 0; k < K; k += kPackBlock) pack_block(n, k);
    }
  }
  for (std::int64_t n = 0; n < N; n += gemm.panel) {
    char* panel = static_cast<char*>(packed) + n / gemm.panel * gemm.planes * plane_bytes;
    for (std::int64_t plane = 0; plane < gemm.planes; ++plane) {
      std::memset(panel + plane * plane_bytes + used, 0,
                  static_cast<std::size_t>(plane_bytes - used));
    }
  }
}

template <typename T>
void pack_rows(const Gemm<T>& gemm, Columns<T> first, Columns<T> second, std::int64_t M,
               void* packed) {
  const std::int64_t line = kLine * gemm.pair, unit_line = kLine * gemm.unit_bytes;
  const std::int64_t K = first.K + second.K, lines = units_of(gemm, K) / kLine;
  // the first source fills whole lines, then one line takes from both
  const std::int64_t whole = second.K == 0 ? first.K : first.K / line * line;
  const std::int64_t rest = first.K - whole;
  const std::int64_t joined = rest == 0 ? 0 : std::min(second.K, line - rest);
  const RowTiles tiles(gemm, M);
  for (std::int64_t t = 0; t < tiles.count; ++t) {
    char* tile = static_cast<char*>(packed) + tiles.first(t) * gemm.planes * lines * unit_line;
    const std::int64_t step = tiles.stored(t) * unit_line, plane_bytes = lines * step;
    for (std::int64_t i = 0; i < tiles.rows(t); ++i) {
      const std::int64_t m = tiles.first(t) + i;
      char* to = tile + i * unit_line;
      gemm.pack_lines(first.data + m * first.ld, whole, to, step, plane_bytes);
      if (second.K == 0) continue;
      const T* from = second.data + m * second.ld;
      to += whole / line * step;
      if (rest > 0) {
        T both[kMostLine];
        std::copy_n(first.data + m * first.ld + whole, rest, both);
        std::copy_n(from, joined, both + rest);
        gemm.pack_lines(both, rest + joined, to, step, plane_bytes);
        to += step;
      }
      gemm.pack_lines(from + joined, second.K - joined, to, step, plane_bytes);
    }
  }
}

namespace {

// Rows that are the columns of `from` [K, M].
template <typename T>
void pack_rows_across(const Gemm<T>& gemm, const T* from, std::int64_t ld, std::int64_t M,
                      std::int64_t K, char* packed) {
  const std::int64_t units = units_of(gemm, K), unit_line = kLine * gemm.unit_bytes;
  const RowTiles tiles(gemm, M);
  const auto tile = [&](std::int64_t t) {
    return packed + tiles.first(t) * gemm.planes * units * gemm.unit_bytes;
  };
  if (gemm.whole_tiles) {
    // lines want neighbours in k: a block of rows and a line at a time, read as it lies
    const std::int64_t line = kLine * gemm.pair, step = gemm.tile * unit_line;
    for (std::int64_t k = 0; k < K; k += line) {
      for (std::int64_t t = 0; t < tiles.count; ++t) {
        const std::int64_t count = std::min(line, K - k), rows = tiles.rows(t);
        const T* corner = from + k * ld + tiles.first(t);
        T block[kMostTile][kMostLine];
        for (std::int64_t j = 0; j < count; ++j) {
          for (std::int64_t i = 0; i < rows; ++i) block[i][j] = corner[j * ld + i];
        }
        for (std::int64_t i = 0; i < rows; ++i) {
          char* to = tile(t) + k / line * step + i * unit_line;
          gemm.pack_lines(block[i], count, to, step, units / kLine * step);
        }
      }
    }
    return;
  }
  for (std::int64_t k = 0; k < K; k += kPackBlock) {
    for (std::int64_t t = 0; t < tiles.count; ++t) {
      const std::int64_t rows = tiles.rows(t);
      gemm.pack_panel(from + k * ld + tiles.first(t), ld, std::min(kPackBlock, K - k), rows,
                      tile(t) + k / gemm.pair * rows * gemm.unit_bytes, rows, 0);
    }
  }
}

// rows of the gradient that one thread computes
std::int64_t share(std::int64_t N, int threads) { return (N + threads - 1) / threads; }

// those of them that are packed at a time: half of what stays in the second-level cache
template <typename T>
std::int64_t packed_at_once(const Gemm<T>& gemm, std::int64_t N, int threads) {
  const std::int64_t tile = row_bytes(gemm, gemm.tile, kOuterBlock);
  return std::min(share(N, threads), kL2Bytes / 2 / tile * gemm.tile);
}

}  // namespace

template <typename T>
std::int64_t outer_product_bytes(const Gemm<T>& gemm, const OuterProducts<T>& products,
                                 int threads) {
  std::int64_t rows = 0, columns = 0;
  for (const Columns<T>& dy : products.dy) {
    const std::int64_t step = packed_at_once(gemm, dy.K, threads);
    rows = std::max(rows, row_bytes(gemm, step, kOuterBlock));
  }
  for (const Columns<T>& x : products.x) columns += weight_bytes(gemm, x.K, kOuterBlock);
  return threads * (columns + (rows + 63) / 64 * 64);
}

template <typename T>
void add_outer_products(const Gemm<T>& gemm, const OuterProducts<T>& products, std::int64_t R,
                        void* workspace, int threads) {
  const std::int64_t bytes = outer_product_bytes(gemm, products, threads) / threads;
  const auto product = gemm.whole_tiles ? gemm.multiply : gemm.multiply_across;
  const std::size_t count = products.x.size();
  // what one thread does with some rows of all gradients
  const auto work = [&](int part) {
    for (std::int64_t r = 0; r < R; r += kOuterBlock) {
      const std::int64_t height = std::min(kOuterBlock, R - r);
      char* rows = static_cast<char*>(workspace) + part * bytes;
      std::vector<char*> columns;
      for (const Columns<T>& x : products.x) {
        pack_weights(gemm, x.data + r * x.ld, 1, x.ld, x.K, height, rows);
        columns.push_back(rows);
        rows += weight_bytes(gemm, x.K, kOuterBlock);
      }
      const typename OuterProducts<T>::Target* to = products.dw.data();
      for (const Columns<T>& dy : products.dy) {
        const std::int64_t begin = std::min(dy.K, part * share(dy.K, threads));
        const std::int64_t end = std::min(dy.K, begin + share(dy.K, threads));
        const std::int64_t step = packed_at_once(gemm, dy.K, threads);
        for (std::int64_t n = begin; n < end; n += step) {
          const std::int64_t width = std::min(step, end - n);
          pack_rows_across(gemm, dy.data + r * dy.ld + n, dy.ld, width, height, rows);
          for (std::size_t i = 0; i < count; ++i) {
            if (!to[i].data) continue;
            product(gemm, rows, columns[i], width, products.x[i].K, height,
                    to[i].data + n * to[i].ld, to[i].ld, true);
          }
        }
        to += count;
      }
    }
  };
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int part = 0; part < threads; ++part) work(part);
}

#define FASTRSSM_INSTANTIATE(T)                                                               \
  template std::int64_t row_bytes<T>(const Gemm<T>&, std::int64_t, std::int64_t);             \
  template void pack_weights<T>(const Gemm<T>&, const T*, std::int64_t, std::int64_t,         \
                                std::int64_t, std::int64_t, void*);                           \
  template void pack_rows<T>(const Gemm<T>&, Columns<T>, Columns<T>, std::int64_t, void*);    \
  template std::int64_t outer_product_bytes<T>(const Gemm<T>&, const OuterProducts<T>&, int); \
  template void add_outer_products<T>(const Gemm<T>&, const OuterProducts<T>&, std::int64_t,  \
                                      void*, int);
FASTRSSM_INSTANTIATE(float)
FASTRSSM_INSTANTIATE(double)
#undef FASTRSSM_INSTANTIATE

}  // namespace fastrssm::cpu
