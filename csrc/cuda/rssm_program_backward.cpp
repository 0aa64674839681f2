#include "cuda/rssm_builder.h"

namespace fastrssm::cluster {
namespace {

// The gradients of pre-activations are gathered like the states of the forward scan, and products
// with the transposed weights follow.
class Backward : public Builder {
 public:
  using Builder::Builder;

  const char* build() {
    const Axis latent = {1, s.S, s.S}, stats = {s.groups ? 1 : 2, s.S, s.S};
    const int head = s.head_layers, width = s.head_width;
    p.x_share = variable_share(p.x.blocks());
    p.h_share = state_group().per_rank;
    int from = operand(stats);
    {
      Stage& stage = add(s.groups ? Kind::kUndrawClass : Kind::kUndraw);
      stage.axis = latent;
      stage.target = from;
      stage.barrier = p.barriers++;
      stage.bytes = bytes(blocks_of(s.S), p.x_share, stats.parts * p.rows * 32);
      stage.grad = grad(stats.units());
      const Source given[] = {kStochGrad, kMeanGrad, kStdGrad, kNoise};
      for (int i = 0; i < (s.groups ? 2 : 4); ++i) {
        stage.feed[i] = feed(given[i], latent, p.x_share, s.S);
      }
      stage.feed[4] = s.groups ? feed(kLogits, latent, p.x_share, s.S)
                               : feed(kKept, latent, p.x_share, s.S, 0, kept.raw);
    }
    from = hidden(from, stats, layers.head, head, width, s.split, kept.head, kept.head_rstd);
    const Axis inner = s.split ? Axis{2, width, width} : Axis{1, width, width};
    if (s.blocks) {
      recur_in_blocks(from, inner);
    } else {
      recur(from, inner);
    }
    const int world = p.stages;
    if (p.policy) policy();
    for (int i = world; i < p.stages; ++i) p.stage[i].policy = true;
    p.gradients = gradients_;
    return settle(kBackwardHeld0, kBackwardHeld1, true);
  }

 private:
  // the gradient of the new state from that of the head's first layer, and what the cell kept
  Stage& unstate(Kind kind, int from, const Axis& inner, int gates) {
    Stage& stage = add(kind);
    segment(stage.product, from, inner, inner.blocks()).matrix[0] = matrix(layers.head, s.D, true);
    add_group(stage.product, state_group());
    stage.axis = p.h;
    stage.grad = grad(gates * s.D);
    const int each = s.norm_gates ? 3 : 4;
    for (int i = 0; i < each; ++i) {
      stage.feed[i] = feed(kKept, p.h, p.h_share, each * s.D, i * s.D, kept.gates);
    }
    if (s.norm_gates) stage.feed[3] = whole(kKept, 1, kept.gates_rstd);
    stage.feed[4] = feed(kDeter, p.h, p.h_share, s.D);
    p.feed[stage.feed[4]].before = true;
    stage.feed[5] = feed(kDeterGrad, p.h, p.h_share, s.D);
    return stage;
  }

  // of [stoch | action]
  Group input_group() const {
    Group g = group(p.x);
    g.per_rank = p.x_share;
    return g;
  }

  void recur(int from, const Axis& inner) {
    const Axis gates = {s.norm_gates ? 3 : 4, s.D, s.D}, deter = p.h;
    Stage& state =
        unstate(s.norm_gates ? Kind::kNormGatesBack : Kind::kGatesBack, from, inner, gates.parts);
    int read = from;
    from = operand(gates);
    state.target = from;
    state.barrier = p.barriers++;
    state.bytes = bytes(deter.blocks(), p.h_share, gates.parts * p.rows * 32);
    if (s.norm_gates) {
      norm(state, eps_of_gates());
      state.layer = layers.cell;
      state.grad_affine = grad(3 * s.D);
    }
    p.main = p.stages;
    {
      Stage& stage = add(Kind::kCellBack);
      const int each = blocks_of(s.D);
      Segment& in = segment(stage.product, from, gates, 3 * each);
      if (s.norm_gates) {
        in.matrix[0] = matrix(layers.cell, s.reads() + s.D, true);
        in.matrix[1] = matrix(layers.cell, s.reads() + s.D, true, s.reads());
      } else {
        in.matrix[0] = matrix(layers.cell, s.reads(), true);
        in.matrix[1] = matrix(layers.state, s.D, true);
        in.matrix[0].gates = in.matrix[1].gates = true;
      }
      const Axis pre = {1, s.pre, s.pre};
      add_group(stage.product, s.pre ? group(pre) : input_group());
      add_group(stage.product, group(deter));
      // the state sees another part of the new value than the input
      if (!s.norm_gates) stage.product.group[1].first = each;
      if (s.pre) {
        // the head's gradient was read before that of the gates was sent, which all have received
        if (pre.blocks() > inner.blocks()) read = operand(pre);
        from = read;
        exchange(stage, pre, from);
        norm(stage, eps());
        stage.layer = layers.pre;
        stage.grad = grad(s.pre);
        stage.grad_affine = grad(s.pre);
        stage.feed[0] = feed(kKept, pre, share(pre.blocks()), s.pre, 0, kept.pre);
        stage.feed[1] = whole(kKept, 1, kept.pre_rstd);
        Stage& last = add(Kind::kPreBack);
        segment(last.product, from, pre, pre.blocks()).matrix[0] =
            matrix(layers.pre, s.S + s.A, true);
        add_group(last.product, input_group());
      }
    }
  }

  // Blocks stay in their ranks from the new state to what the mixing layer saw, but for the sums of
  // its norm; then each branch is one rank's.
  void recur_in_blocks(int from, const Axis& inner) {
    const int own = own_blocks(), reads = p.own + 3 * s.branch;
    const Axis gates = {3 * s.blocks, p.own, p.own}, wide = {3, s.branch, s.branch};
    Stage& state = unstate(Kind::kBlockGatesBack, from, inner, 3);
    state.target = take(3 * p.h_share * p.rows * kTile * 2);

    Stage& mix = add(Kind::kNormBack);
    Segment& in = segment(mix.product, state.target, gates, 3 * own);
    in.matrix[0] = of_blocks(layers.cell, p.own, 3, true);
    in.local = true;
    Group g = state_group();
    by_blocks(g, 0, 3 * own);
    add_group(mix.product, g);
    const int mixed = operand(p.h);
    exchange(mix, p.h, mixed);
    norm(mix, eps());
    mix.layer = layers.mix;
    mix.grad = grad(s.D);
    mix.grad_affine = grad(s.D);
    mix.feed[0] = feed(kKept, p.h, p.h_share, s.D, 0, kept.mix);
    mix.feed[1] = whole(kKept, 1, kept.mix_rstd);

    p.main = p.stages;
    Stage& branch = add(Kind::kBranchBack);
    Segment& all = segment(branch.product, mixed, p.h, p.h.blocks());
    all.matrix[0] = matrix(layers.mix, reads, true, p.own);
    all.again = true;
    add_group(branch.product, group(wide));
    branch.product.group[0].per_rank = blocks_of(s.branch);
    const int branches = operand(wide);
    exchange(branch, wide, branches);
    branch.layer = layers.branches;
    branch.grad = grad(3 * s.branch);
    branch.grad_affine = grad(3 * s.branch);
    branch.feed[0] = feed(kKept, wide, blocks_of(s.branch), 3 * s.branch, 0, kept.branches);
    branch.feed[1] = whole(kKept, 3, kept.branches_rstd);

    p.second = p.stages;
    Stage& inputs = add(Kind::kInputsBack);
    Segment& of_branch = segment(inputs.product, branches, wide, wide.blocks());
    of_branch.matrix[0] = of_branches(1, true);
    of_branch.matrix[1] = of_branches(0, true);
    segment(inputs.product, mixed, p.h, own).matrix[1] = of_blocks(layers.mix, reads, 1, true);
    Group h = state_group();
    by_blocks(h, 1, own);
    add_group(inputs.product, input_group());
    add_group(inputs.product, h);
    if (p.bounded) {
      inputs.feed[0] = feed(kAction, {1, s.A, s.A}, p.x_share, s.A);
      p.feed[inputs.feed[0]].first = blocks_of(s.S);
    }
  }

  std::int64_t grad(int width) {
    const std::int64_t place = gradients_;
    gradients_ += width;
    return place;
  }

  // from the gradient of the statistics to that of the first layer's pre-activations; returns the
  // operand with the latter
  int hidden(int from, Axis columns, int layer, int count, int width, bool split,
             const std::int64_t* y, const std::int64_t* rstd) {
    const Axis axis = split ? Axis{2, width, width} : Axis{1, width, width};
    for (int l = count - 1; l > 0; --l) {
      Stage& stage = add(split ? Kind::kEluBack : Kind::kNormBack);
      const int half = blocks_of(columns.size);
      Segment& in = segment(stage.product, from, columns, split ? half : columns.blocks());
      in.matrix[0] = matrix(layer + l, width, true);
      in.matrix[0].diagonal = split;
      Group g = group(axis);
      if (split) g.each[0] = blocks_of(width), g.step[0] = half;
      add_group(stage.product, g);
      from = operand(axis);
      exchange(stage, axis, from);
      const int row = split ? 2 * width : width;
      stage.feed[0] = feed(kKept, axis, g.per_rank, row, 0, y[l - 1]);
      stage.grad = grad(row);
      if (!split) {
        norm(stage, eps());
        stage.layer = layer + l - 1;
        stage.grad_affine = grad(row);
        stage.feed[1] = whole(kKept, 1, rstd[l - 1]);
      }
      columns = axis;
    }
    return from;
  }

  void policy() {
    const Axis latent = {1, s.S, s.S}, stats = {2, s.A, s.A};
    const Axis actions = {1, s.A, s.A};
    const int width = s.policy_width;
    int from = operand(stats);
    Stage& stage = add(Kind::kUnact);
    stage.axis = p.x;
    stage.target = from;
    stage.barrier = p.barriers++;
    stage.grad = grad(2 * s.A);
    const int skip = blocks_of(s.S);
    for (int r = 0; r < C; ++r) {
      const int begin = std::max(r * p.x_share, skip);
      const int end = std::min((r + 1) * p.x_share, p.x.blocks());
      stage.bytes += end > begin ? (end - begin) * 2 * p.rows * 32 : 16;
    }
    const Source given[] = {kActionGrad, kDrawn, kActionNoise, kKept};
    for (int i = 0; i < 4; ++i) {
      stage.feed[i] = feed(given[i], actions, p.x_share, s.A, 0, i == 3 ? kept.action_raw : 0);
      p.feed[stage.feed[i]].first = skip;
    }
    from = hidden(from, stats, layers.policy, s.policy_layers, width, true, kept.policy, nullptr);
    if (s.detach) return;
    const Axis inner = {2, width, width};
    Stage& last = add(Kind::kPolicyBack);
    Segment& in = segment(last.product, from, inner, inner.blocks());
    in.matrix[0] = matrix(layers.policy, s.D + s.S, true, s.D);
    in.matrix[1] = matrix(layers.policy, s.D + s.S, true);
    Group to = group(latent);
    to.per_rank = p.x_share;
    add_group(last.product, to);
    add_group(last.product, state_group());
  }

  std::int64_t gradients_ = 0;
};

}  // namespace

const char* make_backward(const Sizes& sizes, int ranks, int rows, Program* program) {
  Backward builder(sizes, ranks, rows, program);
  const char* refusal = builder.refusal();
  return refusal ? refusal : builder.build();
}

}  // namespace fastrssm::cluster
