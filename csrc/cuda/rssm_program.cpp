#include "cuda/rssm_builder.h"

namespace fastrssm::cluster {
namespace {

class Forward : public Builder {
 public:
  using Builder::Builder;

  const char* build() {
    const Axis deter = {1, s.D, s.D};
    p.h_operand = operand(deter);
    p.h_other = operand(deter) - p.h_operand;
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
      norm(pre);
      pre.layer = layers.pre;
      pre.keep = kept.pre;
      pre.keep_rstd = kept.pre_rstd;
    }
    p.main = p.stages;
    Stage& cell = add(Kind::kCell);
    segment(cell.product, reads, columns, columns.blocks()).matrix[0] =
        matrix(layers.cell, s.reads());
    segment(cell.product, p.h_operand, deter, deter.blocks(), p.h_other).matrix[0] =
        matrix(layers.state, s.D);
    add_group(cell.product, group(deter, 3));
    exchange(cell, deter, p.h_operand, p.h_other);
    cell.layer = layers.cell;
    cell.keep = kept.gates;
    const int first = p.stages;
    net(layers.head, s.head_layers, s.head_width, s.split, true, kept.head, kept.head_rstd);
    p.stage[first].settles = true;
    Stage& draw = add(Kind::kDraw);
    last(draw, layers.head + s.head_layers - 1, s.head_width, s.S, s.split);
    const Axis latent = {1, s.S, s.S};
    exchange(draw, latent, p.x_operand);
    draw.keep = kept.raw;
    draw.feed[0] = drawn(kNoise, latent, draw);
    return settle(forward_held0(p.rows), kForwardHeld1);
  }

 private:
  // hidden layers; `hidden_` and `operand_` are left for the last one
  void net(int layer, int count, int width, bool split, bool head, const std::int64_t* y,
           const std::int64_t* rstd) {
    const Axis hidden = split ? Axis{2, width, width} : Axis{1, width, width};
    for (int l = 0; l + 1 < count; ++l) {
      Stage& stage = add(split ? Kind::kElu : Kind::kNorm);
      Product& product = stage.product;
      Group g = group(hidden);
      if (l == 0 && head) {
        const Axis deter = {1, s.D, s.D};
        segment(product, p.h_operand, deter, deter.blocks(), p.h_other).matrix[0] =
            matrix(layer, s.D);
        if (s.observe) stage.feed[0] = feed(kEmbedProj, hidden, g.per_rank, s.head_hidden());
      } else if (l == 0) {
        const Axis deter = {1, s.D, s.D}, latent = {1, s.S, s.S};
        segment(product, p.x_operand, latent, latent.blocks()).matrix[0] =
            matrix(layer, s.D + s.S, false, s.D);
        segment(product, p.h_operand, deter, deter.blocks(), p.h_other).matrix[0] =
            matrix(layer, s.D + s.S);
        stage.feed[0] = feed(kPolicyProj, hidden, g.per_rank, 2 * width);
      } else {
        const int half = blocks_of(width);
        Segment& in = segment(product, operand_, hidden, half);
        in.matrix[0] = matrix(layer + l, width);
        in.matrix[0].diagonal = split;
        if (split) g.half = half, g.at = half;
      }
      add_group(product, g);
      operand_ = operand(hidden);
      exchange(stage, hidden, operand_);
      if (!split) norm(stage), stage.keep_rstd = rstd[l];
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

// The gradients of pre-activations are gathered like the states of the forward scan, and products
// with the transposed weights follow.
class Backward : public Builder {
 public:
  using Builder::Builder;

  const char* build() {
    const Axis deter = {1, s.D, s.D}, latent = {1, s.S, s.S}, stats = {2, s.S, s.S};
    const int head = s.head_layers, width = s.head_width;
    p.x_share = share(p.x.blocks());
    p.h_share = share(deter.blocks());
    int from = operand(stats);
    {
      Stage& stage = add(Kind::kUndraw);
      stage.axis = latent;
      stage.target = from;
      stage.barrier = p.barriers++;
      stage.bytes = bytes(blocks_of(s.S), p.x_share, 2 * p.rows * 32);
      stage.grad = grad(2 * s.S);
      const Source given[] = {kStochGrad, kMeanGrad, kStdGrad, kNoise};
      for (int i = 0; i < 4; ++i) stage.feed[i] = feed(given[i], latent, p.x_share, s.S);
      stage.feed[4] = feed(kKept, latent, p.x_share, s.S, 0, kept.raw);
    }
    from = hidden(from, stats, layers.head, head, width, s.split, kept.head, kept.head_rstd);
    const Axis inner = s.split ? Axis{2, width, width} : Axis{1, width, width};
    const Axis gates = {4, s.D, s.D};
    int read = 0;
    {
      Stage& stage = add(Kind::kGatesBack);
      segment(stage.product, from, inner, inner.blocks()).matrix[0] =
          matrix(layers.head, s.D, true);
      add_group(stage.product, group(deter));
      read = from;
      from = operand(gates);
      stage.axis = deter;
      stage.target = from;
      stage.barrier = p.barriers++;
      stage.bytes = bytes(deter.blocks(), p.h_share, 4 * p.rows * 32);
      stage.grad = grad(4 * s.D);
      for (int i = 0; i < 4; ++i) {
        stage.feed[i] = feed(kKept, deter, p.h_share, 4 * s.D, i * s.D, kept.gates);
      }
      stage.feed[4] = feed(kDeter, deter, p.h_share, s.D);
      p.feed[stage.feed[4]].before = true;
      stage.feed[5] = feed(kDeterGrad, deter, p.h_share, s.D);
    }
    p.main = p.stages;
    {
      Stage& stage = add(Kind::kCellBack);
      const int each = blocks_of(s.D);
      Segment& in = segment(stage.product, from, gates, 3 * each);
      in.matrix[0] = matrix(layers.cell, s.reads(), true);
      in.matrix[1] = matrix(layers.state, s.D, true);
      in.matrix[0].gates = in.matrix[1].gates = true;
      const Axis pre = {1, s.pre, s.pre};
      add_group(stage.product, group(s.pre ? pre : p.x));
      add_group(stage.product, group(deter));
      stage.product.group[1].first = each;
      if (s.pre) {
        // the head's gradient was read before that of the gates was sent, which all have received
        if (pre.blocks() > inner.blocks()) read = operand(pre);
        from = read;
        exchange(stage, pre, from);
        norm(stage);
        stage.layer = layers.pre;
        stage.grad = grad(s.pre);
        stage.grad_affine = grad(s.pre);
        stage.feed[0] = feed(kKept, pre, share(pre.blocks()), s.pre, 0, kept.pre);
        stage.feed[1] = whole(kKept, 1, kept.pre_rstd);
        Stage& last = add(Kind::kPreBack);
        segment(last.product, from, pre, pre.blocks()).matrix[0] =
            matrix(layers.pre, s.S + s.A, true);
        add_group(last.product, group(p.x));
      }
    }
    const int world = p.stages;
    if (p.policy) policy();
    for (int i = world; i < p.stages; ++i) p.stage[i].policy = true;
    p.gradients = gradients_;
    return settle(kBackwardHeld0, kBackwardHeld1);
  }

 private:
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
      if (split) g.half = blocks_of(width), g.at = half;
      add_group(stage.product, g);
      from = operand(axis);
      exchange(stage, axis, from);
      const int row = split ? 2 * width : width;
      stage.feed[0] = feed(kKept, axis, g.per_rank, row, 0, y[l - 1]);
      stage.grad = grad(row);
      if (!split) {
        norm(stage);
        stage.layer = layer + l - 1;
        stage.grad_affine = grad(row);
        stage.feed[1] = whole(kKept, 1, rstd[l - 1]);
      }
      columns = axis;
    }
    return from;
  }

  void policy() {
    const Axis deter = {1, s.D, s.D}, latent = {1, s.S, s.S}, stats = {2, s.A, s.A};
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
    add_group(last.product, group(deter));
  }

  std::int64_t gradients_ = 0;
};

}  // namespace

const char* make_forward(const Sizes& sizes, int ranks, int rows, Program* program) {
  Forward builder(sizes, ranks, rows, program);
  const char* refusal = builder.refusal();
  return refusal ? refusal : builder.build();
}

const char* make_backward(const Sizes& sizes, int ranks, int rows, Program* program) {
  Backward builder(sizes, ranks, rows, program);
  const char* refusal = builder.refusal();
  return refusal ? refusal : builder.build();
}

std::int64_t kept_width(const Sizes& sizes) { return Kept(sizes).used; }

}  // namespace fastrssm::cluster
