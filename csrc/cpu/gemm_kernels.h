// How rows and weights are packed and multiplied on each instruction set; included by gemm.cpp
// only.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/number.h"
#include "cpu/gemm.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastrssm::cpu {
namespace {

// units of k that weights are asked for before they are used
constexpr int kAhead = 16;
// values of k that are packed before the next panel is: rows are read as they lie, and those of the
// next block are asked for
constexpr std::int64_t kPackBlock = 16;
// packed operands that are used again and again: they stay in the second-level cache
constexpr std::int64_t kL2Bytes = 512 * 1024;

// Rows in tiles of nearly equal size: 50 = 13 + 13 + 12 + 12, not 14 + 14 + 14 + 8. Tiles of the
// tile unit are whole instead; the last is filled up.
struct RowTiles {
  std::int64_t M, count, fixed;

  template <typename T>
  RowTiles(const Gemm<T>& gemm, std::int64_t M)
      : M(M), count((M + gemm.tile - 1) / gemm.tile), fixed(gemm.whole_tiles ? gemm.tile : 0) {}

  std::int64_t first(std::int64_t t) const {
    return fixed ? t * fixed : t * (M / count) + std::min(t, M % count);
  }
  std::int64_t rows(std::int64_t t) const {
    return fixed ? std::min(fixed, M - t * fixed) : M / count + (t < M % count);
  }
  // rows that memory is laid out for
  std::int64_t stored(std::int64_t t) const { return fixed ? fixed : rows(t); }
};

// A unit is a number, a vector kBytes long.
template <typename T, int kBytes, int kTileRows>
struct Plain {
  using Number = T;
  using Unit = T;
  typedef T Vector __attribute__((vector_size(kBytes), may_alias));
  static constexpr int kWidth = kBytes / static_cast<int>(sizeof(T)), kRows = kTileRows;
  // sums that fit in registers beside their operands
  static constexpr int kSums = kTileRows > 8 ? 20 : 8;
  static constexpr int panels_at_once(int rows) { return 4 * rows <= kSums ? 2 : 1; }
};

#define FASTRSSM_TARGET
namespace portable {
template <typename T, typename Vector>
inline __attribute__((always_inline)) void add_product(Vector& sum, T x, const Vector& w) {
  sum += x * w;
}
#include "cpu/gemm_tile.inc"
}  // namespace portable
#undef FASTRSSM_TARGET

#if defined(__x86_64__)

#define FASTRSSM_TARGET __attribute__((target("avx2,fma")))
namespace avx2 {
template <typename T, typename Vector>
FASTRSSM_TARGET inline __attribute__((always_inline)) void add_product(Vector& sum, T x,
                                                                       const Vector& w) {
  sum += x * w;
}
#include "cpu/gemm_tile.inc"
}  // namespace avx2
#undef FASTRSSM_TARGET

#define FASTRSSM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl")))
namespace avx512 {
template <typename T, typename Vector>
FASTRSSM_TARGET inline __attribute__((always_inline)) void add_product(Vector& sum, T x,
                                                                       const Vector& w) {
  sum += x * w;
}
#include "cpu/gemm_tile.inc"
}  // namespace avx512
#undef FASTRSSM_TARGET

// Two neighbours in k as bfloat16.
struct Pairs : Plain<float, 64, 14> {
  using Unit = std::uint32_t;
};

#define FASTRSSM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
namespace avx512_bf16 {
FASTRSSM_TARGET inline __attribute__((always_inline)) void add_product(Pairs::Vector& sum,
                                                                       std::uint32_t x,
                                                                       const Pairs::Vector& w) {
  const __m512i pair = _mm512_set1_epi32(static_cast<int>(x));
  sum = _mm512_dpbf16_ps(sum, (__m512bh)pair, (__m512bh)w);
}
#include "cpu/gemm_tile.inc"

// Orders of 16-bit numbers: kWiden spreads half of them out to the upper halves of 32 bits,
// kInterleave puts those of the second half next to those of the first.
template <typename Source>
constexpr std::array<std::uint16_t, 32> order(Source source) {
  std::array<std::uint16_t, 32> indices{};
  for (int i = 0; i < 32; ++i) {
    indices[static_cast<std::size_t>(i)] = static_cast<std::uint16_t>(source(i));
  }
  return indices;
}
alignas(64) constexpr auto kWidenLow = order([](int i) { return i / 2; });
alignas(64) constexpr auto kWidenHigh = order([](int i) { return 16 + i / 2; });
alignas(64) constexpr auto kInterleave = order([](int i) { return i / 2 + i % 2 * 16; });

FASTRSSM_TARGET inline __m512 widen_half(__m512i bits, const std::array<std::uint16_t, 32>& half) {
  const __m512i at = _mm512_load_si512(half.data());
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, at, bits));
}

// The bfloat16 terms of 32 numbers: each is what rounding left of the ones before.
template <int kPlanes>
FASTRSSM_TARGET inline void split(__m512 low, __m512 high, __m512i (&terms)[kPlanes]) {
#pragma GCC unroll 3
  for (int p = 0; p < kPlanes; ++p) {
    terms[p] = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    if (p + 1 == kPlanes) break;
    low = _mm512_sub_ps(low, widen_half(terms[p], kWidenLow));
    high = _mm512_sub_ps(high, widen_half(terms[p], kWidenHigh));
  }
}

inline __mmask16 mask_of(std::int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1 << count) - 1);
}

template <int kPlanes>
FASTRSSM_TARGET void pack_lines(const float* row, std::int64_t K, char* to, std::int64_t line_bytes,
                                std::int64_t plane_bytes) {
  __m512i terms[kPlanes];
  for (std::int64_t k = 0; k < K; k += 2 * kLine, to += line_bytes) {
    split<kPlanes>(_mm512_maskz_loadu_ps(mask_of(K - k), row + k),
                   _mm512_maskz_loadu_ps(mask_of(K - k - 16), row + k + 16), terms);
    for (int p = 0; p < kPlanes; ++p) _mm512_storeu_si512(to + p * plane_bytes, terms[p]);
  }
}

template <int kPlanes>
FASTRSSM_TARGET void pack_panel(const float* from, std::int64_t ld, std::int64_t K,
                                std::int64_t width, char* to, std::int64_t to_width,
                                std::int64_t plane_bytes) {
  const __m512i interleave = _mm512_load_si512(kInterleave.data());
  __m512i terms[kPlanes];
  for (std::int64_t k = 0; k < K; k += 2, to += 4 * to_width) {
    const float* row = from + k * ld;
    for (std::int64_t n = 0; n < to_width; n += 16) {
      const __mmask16 used = mask_of(width - n);
      __builtin_prefetch(row + kPackBlock * ld + n);
      __builtin_prefetch(row + (kPackBlock + 1) * ld + n);
      split<kPlanes>(_mm512_maskz_loadu_ps(used, row + n),
                     _mm512_maskz_loadu_ps(k + 1 < K ? used : 0, row + ld + n), terms);
      for (int p = 0; p < kPlanes; ++p) {
        _mm512_mask_storeu_epi32(to + p * plane_bytes + 4 * n, mask_of(to_width - n),
                                 _mm512_permutexvar_epi16(interleave, terms[p]));
      }
    }
  }
}
}  // namespace avx512_bf16
#undef FASTRSSM_TARGET

namespace amx {
#include "cpu/gemm_amx.inc"
}  // namespace amx

#endif  // defined(__x86_64__)

// x, or the nearest bfloat16 number.
template <bool kRounded, typename T>
T stored(T x) {
  if constexpr (kRounded) {
    BFloat16 near;
    narrow(x, &near);
    return widen(near);
  }
  return x;
}

template <typename T, bool kRounded>
void pack_lines(const T* row, std::int64_t K, char* to, std::int64_t line_bytes, std::int64_t) {
  for (std::int64_t k = 0; k < K; k += kLine, to += line_bytes) {
    T* line = reinterpret_cast<T*>(to);
    const std::int64_t count = std::min(kLine, K - k);
    for (std::int64_t i = 0; i < count; ++i) line[i] = stored<kRounded>(row[k + i]);
    for (std::int64_t i = count; i < kLine; ++i) line[i] = T(0);
  }
}

template <typename T, bool kRounded>
void pack_panel(const T* from, std::int64_t ld, std::int64_t K, std::int64_t width, char* to,
                std::int64_t to_width, std::int64_t) {
  T* unit = reinterpret_cast<T*>(to);
  for (std::int64_t k = 0; k < K; ++k, from += ld, unit += to_width) {
    for (std::int64_t n = 0; n < width; n += kLine) __builtin_prefetch(from + kPackBlock * ld + n);
    for (std::int64_t n = 0; n < width; ++n) unit[n] = stored<kRounded>(from[n]);
    for (std::int64_t n = width; n < to_width; ++n) unit[n] = T(0);
  }
}

}  // namespace
}  // namespace fastrssm::cpu
