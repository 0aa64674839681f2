#include "cuda/rssm_builder.h"

namespace fastrssm::cluster {
namespace {

class Forward : public Builder {
 public:
  using Builder::Builder;

  const char* build() {
    p.h_operand = operand(p.h);
    p.h_other = operand(p.h) - p.h_operand;
    p.x_operand = operand(p.x);
    if (p.policy) {
      net(layers.policy, s.policy_layers, s.policy_width, true, false, kept.policy, nullptr);
      Stage& act = add(Kind::kAct);
      last(act, layers.policy + s.policy_layers - 1, s.policy_width, s.A, true);
      const Axis actions = {1, s.A, s.A};
      exchange(act, actions, p.x_operand + blocks_of(s.S) * p.rows * kTile * 2);
      act.keep = kept.action_raw;
      act.feed[0] = drawn(kActionNoise, actions, act);
    } else {
      p.action_feed = whole(kAction, s.A);
    }
    if (s.blocks) {
      recur_in_blocks();
    } else {
      recur();
    }
    const int first = p.stages;
    net(layers.head, s.head_layers, s.head_width, s.split, true, kept.head, kept.head_rstd);
    p.stage[first].settles = true;
    Stage& draw = add(Kind::kDraw);
    const Axis latent = {1, s.S, s.S};
    last(draw, layers.head + s.head_layers - 1, s.head_width, s.S, s.split);
    if (s.groups) {
      draw.kind = Kind::kDrawClass;
      draw.product.group[0] = group(latent);
      draw.product.group[0].per_rank = variable_share(latent.blocks());
      draw.feed[0] = whole(kNoise, s.groups);
    } else {
      draw.feed[0] = drawn(kNoise, latent, draw);
    }
    exchange(draw, latent, p.x_operand);
    draw.keep = kept.raw;
    return settle(forward_held0(p.rows), kForwardHeld1, false);
  }

 private:
  void recur() {
    int reads = p.x_operand;
    Axis columns = p.x;
    if (s.pre) {
      columns = {1, s.pre, s.pre};
      reads = operand(columns);
      Stage& pre = add(Kind::kNorm);
      segment(pre.product, p.x_operand, p.x, p.x.blocks()).matrix[0] =
          matrix(layers.pre, s.S + s.A);
      add_group(pre.product, group(columns));
      exchange(pre, columns, reads);
      norm(pre, eps());
      pre.layer = layers.pre;
      pre.keep = kept.pre;
      pre.keep_rstd = kept.pre_rstd;
    }
    p.main = p.cell = p.stages;
    Stage& cell = add(s.norm_gates ? Kind::kNormCell : Kind::kCell);
    const int both = s.reads() + s.D;
    segment(cell.product, reads, columns, columns.blocks()).matrix[0] =
        matrix(layers.cell, s.norm_gates ? both : s.reads());
    segment(cell.product, p.h_operand, p.h, p.h.blocks(), p.h_other).matrix[0] =
        s.norm_gates ? matrix(layers.cell, both, false, s.reads()) : matrix(layers.state, s.D);
    add_group(cell.product, state_group(3));
    exchange(cell, p.h, p.h_operand, p.h_other);
    if (s.norm_gates) norm(cell, eps_of_gates()), cell.keep_rstd = kept.gates_rstd;
    cell.layer = layers.cell;
    cell.keep = kept.gates;
  }

  // The branches of [deter | stoch | action], a rank each, which needs no other's sums for its
  // norm; then blocks, which stay in their ranks up to the new state but for the sums of one norm.
  void recur_in_blocks() {
    const Axis wide = {3, s.branch, s.branch};
    p.main = p.stages;
    Stage& branch = add(Kind::kBranch);
    segment(branch.product, p.x_operand, p.x, p.x.blocks()).matrix[0] = of_branches(1);
    Segment& state = segment(branch.product, p.h_operand, p.h, p.h.blocks(), p.h_other);
    state.matrix[0] = of_branches(0);
    state.again = true;
    add_group(branch.product, group(wide));
    branch.product.group[0].per_rank = blocks_of(s.branch);
    const int branches = operand(wide);
    exchange(branch, wide, branches);
    branch.layer = layers.branches;
    branch.keep = kept.branches;
    branch.keep_rstd = kept.branches_rstd;
    branch.eps = eps();

    Stage& mix = add(Kind::kNorm);
    Group g = state_group();
    by_blocks(g, 1, own_blocks());
    segment(mix.product, branches, wide, wide.blocks()).matrix[0] =
        matrix(layers.mix, p.own + 3 * s.branch, false, p.own);
    segment(mix.product, p.h_operand, p.h, own_blocks(), p.h_other).matrix[0] =
        of_blocks(layers.mix, p.own + 3 * s.branch, 1);
    add_group(mix.product, g);
    mix.axis = p.h;
    mix.target = take(g.per_rank * p.rows * kTile * 2);
    norm(mix, eps());
    mix.layer = layers.mix;
    mix.keep = kept.mix;
    mix.keep_rstd = kept.mix_rstd;

    p.cell = p.stages;
    Stage& cell = add(Kind::kBlockCell);
    Group gates = state_group(3);
    by_blocks(gates, 0, own_blocks());
    Segment& in = segment(cell.product, mix.target, p.h, own_blocks());
    in.matrix[0] = of_blocks(layers.cell, p.own, 3);
    in.local = true;
    add_group(cell.product, gates);
    exchange(cell, p.h, p.h_operand, p.h_other);
    cell.layer = layers.cell;
    cell.keep = kept.gates;
  }

  // hidden layers; `operand_` is left for the last one
  void net(int layer, int count, int width, bool split, bool head, const std::int64_t* y,
           const std::int64_t* rstd) {
    const Axis hidden = split ? Axis{2, width, width} : Axis{1, width, width};
    for (int l = 0; l + 1 < count; ++l) {
      Stage& stage = add(split ? Kind::kElu : Kind::kNorm);
      Product& product = stage.product;
      Group g = group(hidden);
      if (l == 0 && head) {
        segment(product, p.h_operand, p.h, p.h.blocks(), p.h_other).matrix[0] = matrix(layer, s.D);
        if (s.observe) stage.feed[0] = feed(kEmbedProj, hidden, g.per_rank, s.head_hidden());
      } else if (l == 0) {
        const Axis latent = {1, s.S, s.S};
        segment(product, p.x_operand, latent, latent.blocks()).matrix[0] =
            matrix(layer, s.D + s.S, false, s.D);
        segment(product, p.h_operand, p.h, p.h.blocks(), p.h_other).matrix[0] =
            matrix(layer, s.D + s.S);
        stage.feed[0] = feed(kPolicyProj, hidden, g.per_rank, 2 * width);
      } else {
        const int half = blocks_of(width);
        Segment& in = segment(product, operand_, hidden, half);
        in.matrix[0] = matrix(layer + l, width);
        in.matrix[0].diagonal = split;
        if (split) g.each[0] = g.step[0] = half;
      }
      // the state is multiplied again, and so is the latent behind a policy
      for (Segment& in : product.segment) in.again = l == 0;
      add_group(product, g);
      operand_ = operand(hidden);
      exchange(stage, hidden, operand_);
      if (!split) norm(stage, eps()), stage.keep_rstd = rstd[l];
      stage.layer = layer + l;
      stage.keep = y[l];
    }
  }

  void last(Stage& stage, int layer, int width, int size, bool split) {
    const Axis axis = split ? Axis{2, width, width} : Axis{1, width, width};
    Segment& in = segment(stage.product, operand_, axis, axis.blocks());
    in.matrix[0] = matrix(layer, width);
    in.matrix[0].diagonal = split;
    add_group(stage.product, paired(size));
    stage.layer = layer;
  }

  int drawn(Source source, const Axis& axis, const Stage& stage) {
    const int i = feed(source, axis, stage.product.group[0].per_rank, axis.last);
    p.feed[i].narrow = true;
    return i;
  }

  int operand_ = 0;
};

}  // namespace

const char* make_forward(const Sizes& sizes, int ranks, int rows, Program* program) {
  Forward builder(sizes, ranks, rows, program);
  const char* refusal = builder.refusal();
  return refusal ? refusal : builder.build();
}

std::int64_t kept_width(const Sizes& sizes) { return Kept(sizes).used; }

}  // namespace fastrssm::cluster
