// Products of a few rows with weights that stay: C [M, N] = A [M, K] W^T, as a recurrence needs
// them at every step. Weights are packed once per optimiser step, rows once per use.
//
// Row-major; `ld` is the distance between rows. Packed memory is the caller's and 64-byte aligned.
// An element of C is one sum over k in rising order, whatever M, N, the tile or the thread.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/isa.h"

namespace fastrssm::cpu {

// What float32 operands are multiplied as; sums are float32. float64 is multiplied as such,
// for checks: not fast.
// kSplit3 and kSplit6 write an operand as a sum of two or three bfloat16 numbers and add three or
// six products of them (relative errors 2^-16 and 2^-24). They are ways to reach float32 on tiles;
// without tiles float32 is faster, and is what they mean. Without bfloat16 instructions kBFloat16
// multiplies rounded operands in float32.
enum class Precision : int { kFloat32, kBFloat16, kSplit3, kSplit6 };

inline Precision precision_named(const std::string& name) {
  if (name == "float32") return Precision::kFloat32;
  if (name == "bfloat16") return Precision::kBFloat16;
  if (name == "split3") return Precision::kSplit3;
  if (name == "split6") return Precision::kSplit6;
  throw std::invalid_argument("precision is '" + name +
                              "', expected float32, bfloat16, split3 or split6");
}

// How one precision is stored and multiplied on one instruction set. A unit is one number, or a
// pair of bfloat16 neighbours in k; a line is kLine units.
template <typename T>
struct Gemm {
  std::int64_t pair;        // numbers of a unit
  std::int64_t unit_bytes;  // of one plane
  std::int64_t planes;      // bfloat16 terms of an operand
  std::int64_t panel;       // columns of a panel of weights
  std::int64_t tile;        // most rows of a tile of rows
  bool whole_tiles;         // tiles of rows are all of that size, the last filled up

  // one row of `K` numbers -> lines, `line_bytes` apart; the last is filled up with zeros
  void (*pack_lines)(const T* row, std::int64_t K, char* to, std::int64_t line_bytes,
                     std::int64_t plane_bytes);
  // [K, width] numbers -> [units, to_width] units; zeros beyond width
  void (*pack_panel)(const T* from, std::int64_t ld, std::int64_t K, std::int64_t width, char* to,
                     std::int64_t to_width, std::int64_t plane_bytes);
  void (*multiply)(const Gemm& gemm, const char* rows, const char* weights, std::int64_t M,
                   std::int64_t N, std::int64_t K, T* c, std::int64_t ldc, bool accumulate);
  void (*multiply_across)(const Gemm& gemm, const char* rows, const char* weights, std::int64_t M,
                          std::int64_t N, std::int64_t K, T* c, std::int64_t ldc, bool accumulate);
};

template <typename T>
const Gemm<T>& choose_gemm(Precision precision, Isa isa = best_isa());

constexpr std::int64_t kLine = 16;

template <typename T>
std::int64_t units_of(const Gemm<T>& gemm, std::int64_t K) {
  const std::int64_t line = kLine * gemm.pair;
  return (K + line - 1) / line * kLine;
}

// Panel p of packed weights begins p * panel_bytes after the first: a caller that wants the columns
// from p * gemm.panel on multiplies with those.
template <typename T>
std::int64_t panel_bytes(const Gemm<T>& gemm, std::int64_t K) {
  return gemm.planes * units_of(gemm, K) * gemm.panel * gemm.unit_bytes;
}

template <typename T>
std::int64_t weight_bytes(const Gemm<T>& gemm, std::int64_t N, std::int64_t K) {
  return (N + gemm.panel - 1) / gemm.panel * panel_bytes(gemm, K);
}

template <typename T>
std::int64_t row_bytes(const Gemm<T>& gemm, std::int64_t M, std::int64_t K);

// packed <- W, where W[n, k] is w[n * stride_n + k * stride_k]; one of the strides is 1. Strides
// (ld, 1) pack W as it lies, (1, ld) its transpose, for the product of the reverse scan.
template <typename T>
void pack_weights(const Gemm<T>& gemm, const T* w, std::int64_t stride_n, std::int64_t stride_k,
                  std::int64_t N, std::int64_t K, void* packed);

template <typename T>
struct Columns {
  const T* data;  // [M, K]
  std::int64_t ld, K;
};

// packed <- [first | second] [M, first.K + second.K].
template <typename T>
void pack_rows(const Gemm<T>& gemm, Columns<T> first, Columns<T> second, std::int64_t M,
               void* packed);

// c [M, N] = or += rows [M, K] times weights [N, K] transposed.
template <typename T>
void multiply(const Gemm<T>& gemm, const void* rows, const void* weights, std::int64_t M,
              std::int64_t N, std::int64_t K, T* c, std::int64_t ldc, bool accumulate) {
  gemm.multiply(gemm, static_cast<const char*>(rows), static_cast<const char*>(weights), M, N, K, c,
                ldc, accumulate);
}

// Gradients of weights after a reverse scan, dw [N, K] += sum over r of dy[r, n] x[r, k], for every
// dy [R, N] with every x [R, K]: each is packed once.
template <typename T>
struct OuterProducts {
  struct Target {
    T* data;  // null: not wanted
    std::int64_t ld;
  };
  std::vector<Columns<T>> dy, x;
  std::vector<Target> dw;  // of each dy with each x, x fastest
};

template <typename T>
std::int64_t outer_product_bytes(const Gemm<T>& gemm, const OuterProducts<T>& products,
                                 int threads);

// Sums over blocks of kOuterBlock rows are added in rising order of r.
template <typename T>
void add_outer_products(const Gemm<T>& gemm, const OuterProducts<T>& products, std::int64_t R,
                        void* workspace, int threads);

}  // namespace fastrssm::cpu
