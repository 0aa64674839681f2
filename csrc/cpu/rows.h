// Rows of numbers: how work is cut into blocks of them, and their sums in an order of our own. A
// sum that the compiler vectorises ends in as many additions in sequence as a vector has lanes;
// these end in a tree.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

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

struct Plus {
  template <typename V>
  [[gnu::always_inline]] void operator()(V& a, const V& b) const {
    a += b;
  }
};

struct Larger {
  template <typename V>
  [[gnu::always_inline]] void operator()(V& a, const V& b) const {
    a = a > b ? a : b;
  }
};

// The lanes of a line joined to four, in the order of `total`.
template <typename A, typename Join, typename Four>
[[gnu::always_inline]] inline void join_line(const A* line, Join join, Four& quarter) {
  typedef A Eight __attribute__((vector_size(8 * sizeof(A))));
  Eight half, upper;
  std::memcpy(&half, line, sizeof half);
  std::memcpy(&upper, line + 8, sizeof upper);
  join(half, upper);
  quarter = Four{half[0], half[1], half[2], half[3]};
  join(quarter, Four{half[4], half[5], half[6], half[7]});
}

// Joins the lanes of each line, in the order of `total`, four lines at a time: in registers, since
// numbers that were stored one by one are slow to load as a vector.
template <typename A, typename Join>
[[gnu::always_inline]] inline void join_lanes(const A (&lines)[kLanes][kLanes], A (&joined)[kLanes],
                                              Join join) {
  typedef A Four __attribute__((vector_size(4 * sizeof(A))));
#pragma GCC unroll 4
  for (int g = 0; g < kLanes; g += 4) {
    Four a, b, c, d;
    join_line(lines[g], join, a);
    join_line(lines[g + 1], join, b);
    join_line(lines[g + 2], join, c);
    join_line(lines[g + 3], join, d);
    Four ab{a[0], b[0], a[1], b[1]}, cd{c[0], d[0], c[1], d[1]};
    join(ab, Four{a[2], b[2], a[3], b[3]});
    join(cd, Four{c[2], d[2], c[3], d[3]});
    Four abcd{ab[0], ab[1], cd[0], cd[1]};
    join(abcd, Four{ab[2], ab[3], cd[2], cd[3]});
    std::memcpy(joined + g, &abcd, sizeof abcd);
  }
}

}  // namespace fastrssm::cpu
