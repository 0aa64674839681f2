// The cluster scan as data: which rank of a cluster owns which slice of which layer, where weights,
// operands and barriers lie in shared memory, and the stages that make a step. Built on the host,
// passed to the kernels by value, and read by the pack kernel and by the host emulation alike.
#pragma once

#include <cstdint>

#include "common/number.h"

namespace fastrssm::cluster {

constexpr int kWarp = 32;
constexpr int kWarps = 12;
constexpr int kThreads = kWarp * kWarps;
// a tile of weights: 16 outputs of 16 inputs in bfloat16, in the order of mma.sync's A operand
constexpr int kTile = 16;
constexpr int kTileBytes = 512;
// numbers a row of an output tile in the buffer of partial sums: 20 makes its stores free of
// conflicts
constexpr int kSumRow = 20;
constexpr int kMaxRanks = 16;
constexpr int kMaxLayers = 13;
constexpr int kMaxStages = 14;
constexpr int kMaxFeeds = 28;
constexpr int kMaxSplits = kWarps;
// a step's flags of episodes' beginnings: words around the bytes of 16 rows
constexpr int kFirstBytes = 32;
// what a block of sm_90 may have
constexpr int kSharedLimit = 232448;
// the widest slice of a layer: a row of pairs stays within a warp
constexpr int kMaxSlice = 64;
// weight tiles that each warp keeps in registers, by segment; with more rows sums need the
// registers
FASTRSSM_HD constexpr int forward_held0(int rows) { return rows == 8 ? 8 : 6; }
constexpr int kForwardHeld1 = 16;
constexpr int kBackwardHeld0 = 24, kBackwardHeld1 = 0;
// where the backward scan's largest product leaves half of them, a second one has the others
constexpr int kSecondFirst = 12, kSecondHeld0 = 8, kSecondHeld1 = 4;

FASTRSSM_HD constexpr int blocks_of(int n) { return (n + kTile - 1) / kTile; }

// Where a unit of an axis comes from.
struct Place {
  int part, index;
  int column;  // among all units; -1: padding
};

// The units of an operand: parts of `size`, the last of `last`, each padded to blocks of 16.
struct Axis {
  int parts, size, last;

  FASTRSSM_HD constexpr int blocks() const {
    return (parts - 1) * blocks_of(size) + blocks_of(last);
  }
  FASTRSSM_HD constexpr int units() const { return (parts - 1) * size + last; }
  FASTRSSM_HD constexpr Place place(int block, int i) const {
    const int each = blocks_of(size);
    int part = 0;
    // a division would take longer, and stands where all ranks wait for it
    for (; part < parts - 1 && block >= each; ++part) block -= each;
    const int index = block * kTile + i;
    return {part, index, index < (part == parts - 1 ? last : size) ? part * size + index : -1};
  }
};

// How an element of a weight is found from the units of an output row and an input column.
struct Matrix {
  int layer = -1;         // -1: all zero
  int ld = 0, shift = 0;  // numbers a row; first column
  bool transposed = false;
  bool diagonal = false;  // a mean and a std network: only equal parts meet
  bool gates = false;     // columns are the gates [xn | r | z | hn] of the cell's gradient
  int own = 0;            // block-diagonal, of blocks of so many inputs; 0: it is not
  int copies = 1;         // and of so many times as many outputs
  // layers of [deter | stoch | action], whose results stand side by side: the first of those that
  // read this operand; -1: none of them
  int branch = -1;
};

// Blocks of outputs, dealt to the ranks in equal contiguous shares.
struct Group {
  Axis rows = {1, 0, 0};
  int blocks = 0, per_rank = 0;
  int copies = 1;       // tiles a block: the three gates of a cell
  bool paired = false;  // a tile holds 8 units of each of two parts
  int first = 0;        // tile of the first segment at which its sums begin
  // by segment: every so many blocks begin so many tiles later; 0: they do not
  int each[2] = {0, 0}, step[2] = {0, 0};

  FASTRSSM_HD int units() const { return per_rank * (paired ? kTile / 2 : kTile); }
  FASTRSSM_HD int owned(int rank) const {
    const int left = blocks - rank * per_rank;
    return left < 0 ? 0 : left < per_rank ? left : per_rank;
  }
  FASTRSSM_HD int begin(int block, int segment) const {
    int tile = segment ? 0 : first;
    if (each[segment]) {
      for (; block >= each[segment]; block -= each[segment]) tile += step[segment];
    }
    return tile;
  }
};

// Inputs of a product: tiles of an operand.
struct Segment {
  int operand = 0;  // byte in shared memory
  int other = 0;    // distance to the second buffer; 0: there is none
  int tiles = 0;
  bool local = false;  // of the rank's own units alone
  bool again = false;  // and a later stage reads it once more
  Axis columns = {1, 0, 0};
  Matrix matrix[2];  // by group
};

// What a warp multiplies: one row of output tiles, and a share of the inputs of both segments.
struct Job {
  std::int16_t row, split;
  std::int16_t group, block;  // of the row: the block among the rank's own
  std::int16_t first[2], count[2];
};

// One product: the slice of a rank has `rows` rows of output tiles, whose sums are split over
// warps.
struct Product {
  int segments = 0, groups = 0;
  Segment segment[2];
  Group group[2];
  int rows = 0, splits = 1;
  int jobs = 0;
  Job job[kWarps];           // of the warps before `jobs`
  int packed = 0;            // first tile in the rank's packed weights
  int weights = 0;           // byte in shared memory
  bool held = false;         // partly in registers: the largest product
  int rest0 = 0, rest1 = 0;  // tiles of each warp that are not

  FASTRSSM_HD int depth() const { return segment[0].tiles + segment[1].tiles; }
  FASTRSSM_HD int row(int g, int block, int copy) const {
    return (g ? group[0].per_rank * group[0].copies : 0) + block * group[g].copies + copy;
  }
};

enum class Kind : int {
  kNorm,
  kBranch,
  kCell,
  kBlockCell,
  kNormCell,
  kElu,
  kDraw,
  kDrawClass,
  kAct,
  kUndraw,
  kUndrawClass,
  kEluBack,
  kNormBack,
  kGatesBack,
  kCellBack,
  kPreBack,
  kBlockGatesBack,
  kNormGatesBack,
  kBranchBack,
  kInputsBack,
  kUnact,
  kPolicyBack
};

// Arrays [T, B, ..] that a scan reads, in the order of `Pointers::source`.
enum Source : int {
  kEmbedProj,
  kAction,
  kNoise,
  kActionNoise,
  kPolicyProj,
  kDeter,  // results
  kDrawn,  // actions drawn by the policy
  kKept,
  kLogits,  // results
  kDeterGrad,
  kStochGrad,
  kMeanGrad,
  kStdGrad,
  kActionGrad,
  kSources
};

// Numbers of a step that a rank reads ahead: a slice of an array, or all of its columns.
struct Feed {
  Source source = kNoise;
  bool before = false;  // of the step before
  bool whole = false;   // the same for every rank: columns are the axis
  Axis axis = {1, 0, 0};
  int first = 0;     // block of the axis at which the array begins
  int per_rank = 0;  // blocks of 16, or of 8 if narrow
  bool narrow = false;
  int ld = 0, column = 0;  // numbers a row of the array; its first column
  std::int64_t at = 0;     // of a kept array: in numbers of a row of [T * B]
  int stage = -1;          // that uses it
  int place = 0;           // float among the inputs
  int other = 0;           // distance to its second buffer; 0: there is none

  FASTRSSM_HD int units() const {
    return whole ? axis.last : per_rank * (narrow ? kTile / 2 : kTile);
  }
};

// A product, what is done with its sums, and the exchange that follows.
struct Stage {
  Kind kind = Kind::kNorm;
  Product product;
  Axis axis = {1, 0, 0};  // of the results
  int target = 0;         // operand that the exchange fills; without one, the rank's own part of it
  int other = 0;          // distance to its second buffer
  int barrier = -1, bytes = 0;
  int stats_barrier = -1, stats_bytes = 0, stats = 0;
  float eps = 0.0f;  // of the norm
  int layer = -1;    // whose bias, scale and shift it adds
  int vectors = 0;   // float in shared memory: their slices
  int feed[6] = {-1, -1, -1, -1, -1, -1};
  bool policy = false;            // of the policy, which learns also where the world model does not
  bool settles = false;           // the next step's inputs are taken, and its state multiplied
  std::int64_t keep = -1;         // array of the kept buffer, in numbers of a row of [T * B]
  std::int64_t keep_rstd = -1;    // the same, of the norm
  std::int64_t grad = -1;         // array of gradients of pre-activations
  std::int64_t grad_affine = -1;  // array of gradients between norm and activation
};

struct Sizes {
  std::int64_t T, B;
  int D, S, A;
  bool split;
  int pre, head_layers, head_width, policy_layers, policy_width;
  bool observe, detach;
  int groups = 0;              // of a categorical latent; 0: it is gaussian
  int blocks = 0, branch = 0;  // of block_gru, and the width of its input layers; 0: another cell
  bool norm_gates = false, update_first = false;  // ln_gru_a, ln_gru_d; the former

  int classes() const { return groups ? S / groups : 0; }
  int reads() const { return pre ? pre : S + A; }
  int head_hidden() const { return split ? 2 * head_width : head_width; }
};

struct Program {
  int ranks = 0, rows = 0;  // cluster size, rows of the batch in a tile
  int T = 0, D = 0, S = 0, A = 0;
  std::int64_t B = 0;
  bool split = false, observe = false, policy = false, detach = false;
  bool rms = false;           // norms are of the root mean square
  bool update_first = false;  // the gates of ln_gru_a
  bool bounded = false;       // actions beyond 1 count as 1
  int classes = 0;            // of a categorical variable; 0: the latent is gaussian
  int own = 0;                // units of a block of block_gru
  int feeds = 0;
  Feed feed[kMaxFeeds];
  int action_feed = -1;  // of given actions
  int stages = 0, barriers = 0;
  Stage stage[kMaxStages];
  int main = 0;     // the stage whose weights are held
  int second = -1;  // another one, behind it; -1: there is none
  int cell = 0;     // that gives the new state
  Axis x = {2, 0, 0}, h = {1, 0, 0};
  int x_operand = 0, h_operand = 0, h_other = 0;
  int x_share = 0, h_share = 0;  // blocks of a rank in the backward scan
  // bytes in shared memory
  int barrier_bytes = 0, token = 0, sums = 0, scratch = 0, inputs = 0, firsts = 0;
  int carry_h = 0, carry_x = 0, vectors = 0;
  int shared = 0;
  int tiles = 0;                         // of the packed weights of a rank
  std::int64_t kept = 0, gradients = 0;  // numbers a row
};

// Builds a program. Returns nullptr, or why a cluster of `ranks` cannot hold it.
const char* make_forward(const Sizes& sizes, int ranks, int rows, Program* program);
const char* make_backward(const Sizes& sizes, int ranks, int rows, Program* program);

// Numbers a row of what the forward scan keeps, whatever the cluster.
std::int64_t kept_width(const Sizes& sizes);

// The element [i of row tile, k of input tile] of a rank's share of a product, as place in a
// weight: numbers from its start, or -1 where it is zero.
FASTRSSM_HD std::int64_t weight_place(const Product& p, int rank, int row, int segment, int tile,
                                      int i, int k, int D, int* layer) {
  const int g = p.groups > 1 && row >= p.group[0].per_rank * p.group[0].copies;
  const Group& group = p.group[g];
  const Segment& in = p.segment[segment];
  const Matrix& m = in.matrix[g];
  const int local = row - (g ? p.group[0].per_rank * p.group[0].copies : 0);
  const int block = rank * group.per_rank + local / group.copies;
  *layer = m.layer;
  if (m.layer < 0 || block >= group.blocks) return -1;
  Place out;
  if (group.paired) {
    const int index = block * (kTile / 2) + i % (kTile / 2), part = i / (kTile / 2);
    if (index >= group.rows.size) return -1;
    out = {part, index, part * group.rows.size + index};
  } else {
    out = group.rows.place(block, i);
    if (out.column < 0) return -1;
    if (group.copies > 1) {
      out.part = local % group.copies;
      out.column = m.own
                       ? (out.column / m.own * group.copies + out.part) * m.own + out.column % m.own
                       : out.part * D + out.column;
    }
  }
  const Place col = in.columns.place(group.begin(block, segment) + tile, k);
  if (col.column < 0 || (m.diagonal && col.part != out.part)) return -1;
  // of the layer: `to` is its output, `from` its input
  const Place &to = m.transposed ? col : out, &from = m.transposed ? out : col;
  if (m.own) {
    if (to.column / (m.own * m.copies) != from.column / m.own) return -1;
    return static_cast<std::int64_t>(to.column) * m.ld + from.column % m.own;
  }
  if (m.branch >= 0) {
    const Axis& inputs = m.transposed ? group.rows : in.columns;
    const int source = m.branch ? m.branch + from.part : 0;
    if (to.part != source) return -1;
    *layer = m.layer + source;
    if (source == 0) return static_cast<std::int64_t>(to.index) * D + from.column;
    return static_cast<std::int64_t>(to.index) * (from.part ? inputs.last : inputs.size) +
           from.index;
  }
  const int row_of = m.gates ? (col.part + 2) % 3 * D + col.index : to.column;
  return static_cast<std::int64_t>(row_of) * m.ld + m.shift +
         (m.diagonal ? from.index : from.column);
}

// Which two inputs of a tile register `reg` of a lane holds of which output: lane l of mma.sync has
// rows l / 4 and l / 4 + 8. Inputs are in another order than the instruction's, the same one in
// both operands, so that four neighbours of a row are one load.
FASTRSSM_HD void fragment_place(int lane, int reg, int* i, int* k) {
  *i = lane / 4 + (reg % 2) * 8;
  *k = lane % 4 * 4 + reg / 2 * 2;
}

}  // namespace fastrssm::cluster
