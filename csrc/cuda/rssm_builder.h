// What both directions of a cluster scan are built with.
#pragma once

#include <algorithm>

#include "cuda/rssm_program.h"

namespace fastrssm::cluster {
inline int ceil_div(int a, int b) { return (a + b - 1) / b; }
inline int align(int bytes) { return (bytes + 127) / 128 * 128; }

// Where each layer stands in the list of all, as in ops/rssm_plan.py.
struct Layers {
  explicit Layers(const Sizes& s) : pre(0), cell(s.pre ? 1 : 0), state(cell + 1) {
    // torch's cell has one of the state; block_gru has four behind the head
    head = s.blocks || s.norm_gates ? state : state + 1;
    branches = head + s.head_layers;
    mix = branches + 3;
    policy = s.blocks ? mix + 1 : branches;
  }
  int pre, cell, state, head, branches, mix, policy;
};

// What the forward scan keeps for the backward one, in numbers of a row of [T * B].
struct Kept {
  explicit Kept(const Sizes& s) {
    if (s.pre) pre = take(s.pre), pre_rstd = take(1);
    if (s.blocks) {
      branches = take(3 * s.branch), branches_rstd = take(3);
      mix = take(s.D), mix_rstd = take(1);
    }
    gates = take((s.norm_gates ? 3 : 4) * s.D);
    if (s.norm_gates) gates_rstd = take(1);
    for (int l = 0; l + 1 < s.head_layers; ++l) {
      head[l] = take(s.head_hidden());
      if (!s.split) head_rstd[l] = take(1);
    }
    // the logits of a categorical latent are a result
    if (!s.groups) raw = take(s.S);
    for (int l = 0; l + 1 < s.policy_layers; ++l) policy[l] = take(2 * s.policy_width);
    if (s.policy_layers) action_raw = take(s.A);
  }
  std::int64_t take(int width) {
    const std::int64_t place = used;
    used += width;
    return place;
  }
  std::int64_t used = 0, pre = -1, pre_rstd = -1, gates, raw = -1, action_raw = -1;
  std::int64_t gates_rstd = -1, branches = -1, branches_rstd = -1, mix = -1, mix_rstd = -1;
  std::int64_t head[kMaxLayers], head_rstd[kMaxLayers], policy[kMaxLayers];
};

class Builder {
 public:
  Builder(const Sizes& sizes, int ranks, int rows, Program* program)
      : s(sizes), layers(sizes), kept(sizes), p(*program), C(ranks) {
    p = Program();
    p.ranks = ranks;
    p.rows = rows;
    p.T = static_cast<int>(s.T);
    p.B = s.B;
    p.D = s.D;
    p.S = s.S;
    p.A = s.A;
    p.split = s.split;
    p.observe = s.observe;
    p.policy = s.policy_layers > 0;
    p.detach = s.detach;
    p.rms = s.blocks > 0;
    p.update_first = s.update_first;
    p.bounded = s.blocks > 0 && !p.policy;
    p.classes = s.classes();
    p.own = s.blocks ? s.D / s.blocks : 0;
    p.x = {2, s.S, s.A};
    p.h = {1, s.D, s.D};
    // a tile must not hold units of two blocks
    if (p.own % kTile) p.h = {s.blocks, p.own, p.own};
    p.kept = kept.used;
    p.token = take(kMaxRanks * 16);
    p.barrier_bytes = take(2 * kMaxStages * 8);
  }

  const char* refusal() const {
    if (s.head_layers < 2 || s.head_layers > 4)
      return "the head has none or more than 3 hidden layers";
    if (s.policy_layers == 1 || s.policy_layers > 4) {
      return "the policy has none or more than 3 hidden layers";
    }
    if (s.blocks && s.blocks <= 8 && C > 8) return "8 ranks hold its blocks";
    if (variable_share(p.x.blocks()) < 0) return "a categorical variable is too wide";
    return nullptr;
  }

  int take(int bytes) {
    const int place = p.shared;
    p.shared += align(bytes);
    return place;
  }
  int operand(const Axis& axis) { return take(axis.blocks() * p.rows * kTile * 2); }
  int share(int blocks) const { return ceil_div(blocks, C); }
  // the same of units of the latent, whose variables stay whole; -1: no rank can hold so many
  int variable_share(int blocks) const {
    int each = share(blocks);
    if (!s.groups) return each;
    while (each * kTile % s.classes() && each * kTile < s.S) ++each;
    return each * kTile > kMaxSlice ? -1 : each;
  }
  int own_blocks() const { return blocks_of(p.own); }

  Group group(const Axis& rows, int copies = 1) const {
    Group g;
    g.rows = rows;
    g.blocks = rows.blocks();
    g.per_rank = share(g.blocks);
    g.copies = copies;
    return g;
  }
  // of the new state: a rank has whole blocks of block_gru
  Group state_group(int copies = 1) const {
    Group g = group(p.h, copies);
    if (s.blocks) g.per_rank = own_blocks() * ceil_div(s.blocks, C);
    return g;
  }
  // inputs of each block begin `step` tiles after those of the one before
  void by_blocks(Group& g, int segment, int step) const {
    g.each[segment] = own_blocks();
    g.step[segment] = step;
  }
  Matrix of_blocks(int layer, int ld, int copies, bool transposed = false) const {
    Matrix m = matrix(layer, ld, transposed);
    m.own = p.own;
    m.copies = copies;
    return m;
  }
  Matrix of_branches(int first, bool transposed = false) const {
    Matrix m = matrix(layers.branches, 0, transposed);
    m.branch = first;
    return m;
  }
  Group paired(int size) const {
    Group g;
    g.rows = {2, size, size};
    g.blocks = ceil_div(size, kTile / 2);
    g.per_rank = share(g.blocks);
    g.paired = true;
    return g;
  }
  static Matrix matrix(int layer, int ld, bool transposed = false, int shift = 0) {
    Matrix m;
    m.layer = layer;
    m.ld = ld;
    m.transposed = transposed;
    m.shift = shift;
    return m;
  }

  Segment& segment(Product& product, int operand, const Axis& columns, int tiles, int other = 0) {
    Segment& in = product.segment[product.segments++];
    in.operand = operand;
    in.other = other;
    in.columns = columns;
    in.tiles = tiles;
    return in;
  }
  void add_group(Product& product, const Group& g) { product.group[product.groups++] = g; }

  int feed(Source source, const Axis& axis, int per_rank, int ld, int column = 0,
           std::int64_t at = 0) {
    Feed& f = p.feed[p.feeds];
    f.source = source;
    f.stage = p.stages - 1;
    f.axis = axis;
    f.per_rank = per_rank;
    f.ld = ld;
    f.column = column;
    f.at = at;
    return p.feeds++;
  }
  int whole(Source source, int width, std::int64_t at = 0) {
    const int i = feed(source, {1, width, width}, 0, width, 0, at);
    p.feed[i].whole = true;
    return i;
  }

  // bytes that reach every rank when `each` are sent for a block; a rank without blocks sends a
  // token instead, so that all take part in every exchange
  int bytes(int blocks, int per_rank, int each) const {
    int total = 0;
    for (int r = 0; r < C; ++r) {
      const int owned = std::clamp(blocks - r * per_rank, 0, per_rank);
      total += owned ? owned * each : 16;
    }
    return total;
  }
  void exchange(Stage& stage, const Axis& axis, int target, int other = 0) {
    const Group& g = stage.product.group[0];
    stage.axis = axis;
    stage.target = target;
    stage.other = other;
    stage.barrier = p.barriers++;
    stage.bytes = bytes(g.blocks, g.per_rank, p.rows * (g.paired ? 16 : 32));
  }
  void norm(Stage& stage, float eps) {
    stage.eps = eps;
    const Group& g = stage.product.group[0];
    stage.stats_barrier = p.barriers++;
    stage.stats = take(C * p.rows * 8);
    stage.stats_bytes = 0;
    for (int r = 0; r < C; ++r) stage.stats_bytes += g.owned(r) ? p.rows * 8 : 16;
  }
  // of the layers of a network, and of an input layer
  float eps() const { return s.blocks ? 1e-4f : 1e-5f; }
  float eps_of_gates() const { return s.update_first ? 1e-5f : 1e-3f; }
  Stage& add(Kind kind) {
    Stage& stage = p.stage[p.stages++];
    stage.kind = kind;
    return stage;
  }

  static void share_out(Product& product) {
    product.jobs = product.rows * product.splits;
    for (int i = 0; i < product.jobs; ++i) {
      Job& job = product.job[i];
      const Group& front = product.group[0];
      const int row = i % product.rows, behind = row - front.per_rank * front.copies;
      job.row = row;
      job.split = i / product.rows;
      job.group = behind >= 0;
      job.block = behind >= 0 ? behind / product.group[1].copies : row / front.copies;
      for (int s = 0; s < 2; ++s) {
        const int tiles = product.segment[s].tiles;
        job.first[s] = tiles * job.split / product.splits;
        job.count[s] = tiles * (job.split + 1) / product.splits - job.first[s];
      }
    }
  }

  // what a held product keeps in registers, and bytes of the rest of its weights
  static int hold(Product& product, int held0, int held1) {
    product.held = true;
    product.rest0 = std::max(0, ceil_div(product.segment[0].tiles, product.splits) - held0);
    product.rest1 = std::max(0, ceil_div(product.segment[1].tiles, product.splits) - held1);
    return kWarps * (product.rest0 + product.rest1) * kTileBytes;
  }
  // so few tiles a warp that a second product finds registers
  bool shares(const Product& main) const {
    return ceil_div(main.segment[0].tiles, main.splits) <= kSecondFirst;
  }

  // Rows, splits and memory of all products; the held one keeps `held` tiles a warp in registers.
  // `refilled` inputs have one buffer, which is filled again as soon as their stage is over; for
  // those of the last two stages that would be too late.
  const char* settle(int held0, int held1, bool refilled) {
    int sums = 0, vectors = 0, inputs = 0;
    for (int i = 0; i < p.stages; ++i) {
      Stage& stage = p.stage[i];
      Product& product = stage.product;
      for (int g = 0; g < product.groups; ++g) {
        product.rows += product.group[g].per_rank * product.group[g].copies;
        if (product.group[g].units() > kMaxSlice) return "a layer is too wide";
      }
      stage.vectors = vectors;
      // of three gates their bias, scale and shift
      const bool of_gates = stage.kind == Kind::kNormCell || stage.kind == Kind::kNormGatesBack;
      vectors += product.groups ? (of_gates ? 9 : 4) * product.group[0].units() : 0;
      if (!product.segments) continue;
      const int longest = std::max(product.segment[0].tiles, product.segment[1].tiles);
      product.splits = std::clamp(kWarps / product.rows, 1, longest);
      if (product.rows > kWarps) return "a layer is too wide";
      share_out(product);
      product.packed = p.tiles;
      p.tiles += product.rows * product.depth();
      if (i == p.second && !shares(p.stage[p.main].product)) p.second = -1;
      product.weights = take(i == p.main     ? hold(product, held0, held1)
                             : i == p.second ? hold(product, kSecondHeld0, kSecondHeld1)
                                             : product.rows * product.depth() * kTileBytes);
      sums = std::max(sums, product.segments * product.rows * product.splits);
    }
    for (int i = 0; i < p.feeds; ++i) {
      Feed& feed = p.feed[i];
      const int each = p.rows * feed.units();
      feed.place = inputs;
      feed.other = refilled && feed.stage + 2 < p.stages ? 0 : each;
      inputs += each + feed.other;
    }
    p.sums = take(sums * p.rows * kSumRow * 4);
    p.scratch = take((s.norm_gates ? 3 : 1) * p.rows * kMaxSlice * 4);
    p.inputs = take(inputs * 4);
    p.firsts = take(2 * kFirstBytes);
    p.carry_h = take(p.rows * kMaxSlice * 4);
    p.carry_x = take(p.rows * kMaxSlice * 4);
    p.vectors = take(vectors * 4);
    return p.shared > kSharedLimit ? "the weights do not fit into shared memory" : nullptr;
  }

  const Sizes& s;
  const Layers layers;
  const Kept kept;
  Program& p;
  const int C;
};

}  // namespace fastrssm::cluster
