// Rows of numbers: how work is cut into blocks of them, and their sums in an order of our own. A
// sum that the compiler vectorises ends in as many additions in sequence as a vector has lanes;
// these end in a tree.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastrssm::cpu {

// elements below which waking a second thread costs more than it saves
constexpr std::int64_t kParallelFrom = 1 << 14;
// elements of a block; the scratch row of a block stays in the first-level cache
constexpr std::int64_t kBlock = 1024;
// numbers that are summed side by side
constexpr int kLanes = 16;

// A block is as many whole rows as fit, or a piece of one long row. Its elements are contiguous, so
// a loop over all of them wastes no vector lanes at row ends.
struct Blocks {
  std::int64_t N, S;
  std::int64_t rows = std::max<std::int64_t>(1, kBlock / std::max<std::int64_t>(1, S));
  std::int64_t count = (N + rows - 1) / rows;
  std::int64_t width = std::min(S, kBlock);
};

template <typename A>
[[gnu::always_inline]] inline A total(const A (&lanes)[kLanes]) {
  A half[8], quarter[4];
#pragma omp simd
  for (int i = 0; i < 8; ++i) half[i] = lanes[i] + lanes[i + 8];
#pragma omp simd
  for (int i = 0; i < 4; ++i) quarter[i] = half[i] + half[i + 4];
  return (quarter[0] + quarter[2]) + (quarter[1] + quarter[3]);
}

// sums[row] += the sum of a row of terms [rows, width]
template <typename A>
[[gnu::always_inline]] inline void add_rows(const A* terms, A* sums, std::int64_t rows,
                                            std::int64_t width) {
  for (std::int64_t row = 0; row < rows; ++row, terms += width) {
    A lanes[kLanes] = {};
    std::int64_t s = 0;
    for (; s + kLanes <= width; s += kLanes) {
#pragma omp simd
      for (int i = 0; i < kLanes; ++i) lanes[i] += terms[s + i];
    }
    for (int i = 0; s < width; ++s, ++i) lanes[i] += terms[s];
    sums[row] += total(lanes);
  }
}

}  // namespace fastrssm::cpu
