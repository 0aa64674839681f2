// Where everything lies that a scan packs, keeps and walks through.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "cpu/rssm_scan.h"

namespace fastrssm::cpu {

// A product with part of a layer's weight, which is a matrix [.., ld]: rows from `row` and columns
// from `column` on, or the transpose of that part.
struct Product {
  Size layer, row, column, ld, N, K;
};

// A network of `layers` layers in the lists of layers, products and saved arrays: one network, or a
// mean and a std network side by side, which share the product of their first layer.
struct Net {
  bool split;
  Size layers, in, width, out;  // out: of one network
  Size layer, product;          // where it begins
  Size hidden() const { return split ? 2 * width : width; }
  Size product_of(Size l, Size branch) const {
    return split && l > 0 ? product + 2 * l - 1 + branch : product + l;
  }
};

struct Plan {
  explicit Plan(const ScanLayout& layout);
  std::vector<Product> forward, transposed;
  Size pre, cell_input, cell_state_rz, cell_state_n;  // places in `forward`
  Size pre_back, cell_back, cell_state_back;          // and in `transposed`
  // block_gru, in both lists: the first of the branches and of those of each block with itself, and
  // the mixture's with all branches; cell_input and cell_back are the first block's
  Size branches, mix_own, mix_shared;
  Net head, policy, head_back, policy_back;  // the last two with places in `transposed`
  Size widest;                               // numbers of a row of any product
};

// An array [T, B, width] inside the kept buffer, or [B, width] where nothing is kept.
template <typename T>
struct Kept {
  T* data = nullptr;
  Size width = 0, step = 0;  // step: rows between times
  T* at(Size t, Size b) const { return data + (t * step + b) * width; }
};

// All arrays that the forward scan keeps for the backward one.
template <typename T>
struct KeptArrays {
  KeptArrays(const ScanLayout& layout, T* buffer, bool all_times);
  // numbers a row
  static Size width(const ScanLayout& layout);

  Kept<T> action_in, deter_in;                   // [stoch | action], deter, zero after is_first
  Kept<T> pre_hat, pre_rstd, pre;                // of the layer before the cell
  Kept<T> gates, cell_hat, cell_rstd;            // [r | z | n | hn or c]
  std::vector<Kept<T>> branch_hat, branch_rstd;  // of each input branch
  Kept<T> branch;                                // all of them, side by side
  Kept<T> mix_hat, mix_rstd, mix;
  std::vector<Kept<T>> head_hat, head_rstd, head;  // of each hidden layer
  std::vector<Kept<T>> policy;                     // of each hidden layer
  Kept<T> raw, action_raw;                         // std before its transform

 private:
  KeptArrays() = default;
  template <typename Visit>
  void visit(const ScanLayout& layout, Visit visit);
};

// 64-byte aligned memory that a thread keeps between calls, grown when needed.
class Scratch {
 public:
  template <typename T>
  T* take(Size numbers) {
    const std::size_t bytes = (static_cast<std::size_t>(numbers) * sizeof(T) + 63) / 64 * 64;
    if (bytes > bytes_) {
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, bytes)));
      if (!memory_) throw std::bad_alloc();
      bytes_ = bytes;
    }
    return reinterpret_cast<T*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  std::size_t bytes_ = 0;
};

// Rows of the batch that a thread takes through all times together: enough to use a weight often
// while it is near, few enough for the second-level cache.
constexpr Size kBlockRows = 64;

// Calls work(first, count) for the blocks of rows of thread `thread`.
template <typename Work>
void for_blocks(Size B, int thread, int threads, Work work) {
  const Size begin = B * thread / threads, end = B * (thread + 1) / threads;
  const Size blocks = (end - begin + kBlockRows - 1) / kBlockRows;
  for (Size i = 0; i < blocks; ++i) {
    const Size from = begin + (end - begin) * i / blocks;
    work(from, begin + (end - begin) * (i + 1) / blocks - from);
  }
}

// Packed products one after the other.
template <typename T>
class PackedWeights {
 public:
  PackedWeights(const Gemm<T>& gemm, const std::vector<Product>& products, const char* memory)
      : gemm_(gemm), products_(products) {
    for (const Product& p : products) {
      places_.push_back(memory);
      memory += aligned(weight_bytes(gemm, p.N, p.K));
    }
  }
  static Size aligned(Size bytes) { return (bytes + 63) / 64 * 64; }

  // c [M, N] = or += rows times product `which`
  void multiply(Size which, const char* rows, Size M, T* c, Size ldc,
                bool accumulate = false) const {
    const Product& p = products_[which];
    cpu::multiply(gemm_, rows, places_[which], M, p.N, p.K, c, ldc, accumulate);
  }
  const Gemm<T>& gemm() const { return gemm_; }

 private:
  const Gemm<T>& gemm_;
  const std::vector<Product>& products_;
  std::vector<const char*> places_;
};

}  // namespace fastrssm::cpu
