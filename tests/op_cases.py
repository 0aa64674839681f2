"""The cases of each op, shared by tests and benchmarks."""

from dataclasses import dataclass

import torch
from torch.utils._pytree import tree_map

from fastrssm.ops import Layer, PolicyWeights, RSSMWeights


@dataclass(frozen=True)
class GaussianKLCase:
    """Sizes and options of one call of gaussian_kl."""

    name: str
    shape: tuple[int, ...]
    kl_balance: float | None = None
    # a quantile of the KL: this share of the rows lies below the free nats
    free_share: float = 0.0
    std_range: tuple[float, float] = (0.1, 2.0)

    def inputs(self, dtype=torch.float32, device="cpu"):
        """Draw post_mean, post_std, prior_mean, prior_std; they require gradients."""
        generator = torch.Generator().manual_seed(0)
        low, high = self.std_range

        def mean():
            return torch.randn(self.shape, generator=generator)

        def std():
            u = torch.rand(self.shape, generator=generator)
            return low * (high / low) ** u

        drawn = (mean(), std(), mean(), std())
        return tuple(x.to(device, dtype).requires_grad_() for x in drawn)

    def options(self, inputs):
        """Balance and free nats; the latter half-way between two rows, so no rounding decides."""
        if self.free_share == 0.0:
            return {"kl_balance": self.kl_balance}
        q, p = (
            torch.distributions.Normal(*(x.detach().double() for x in pair))
            for pair in (inputs[:2], inputs[2:])
        )
        kl = torch.distributions.kl_divergence(q, p).sum(-1).flatten().sort().values
        k = int(self.free_share * (kl.numel() - 1))
        return {"kl_balance": self.kl_balance, "free_nats": (kl[k : k + 2].mean()).item()}


GAUSSIAN_KL = (
    GaussianKLCase("one element", (1, 1)),
    GaussianKLCase("one row", (1, 30), kl_balance=0.8),
    GaussianKLCase("no batch dimension", (17,)),
    GaussianKLCase("sequence", (5, 7, 30), kl_balance=0.8, free_share=0.5),
    GaussianKLCase("only the posterior learns", (6, 33), kl_balance=0.0),
    GaussianKLCase("only the prior learns", (6, 33), kl_balance=1.0),
    GaussianKLCase("no power of two", (63, 127), free_share=0.3),
    GaussianKLCase("many rows to a block", (1023, 3), kl_balance=0.5),
    GaussianKLCase("longer than a block", (3, 2500), kl_balance=0.8, free_share=0.5),
    GaussianKLCase("tiny and huge std", (9, 64), std_range=(1e-6, 1e3)),
)
GAUSSIAN_KL_BENCH = (
    GaussianKLCase("[2500, 30]", (2500, 30)),
    GaussianKLCase("[2500, 128]", (2500, 128)),
    GaussianKLCase("[20000, 128]", (20000, 128)),
)


@dataclass(frozen=True)
class CategoricalKLCase:
    """Sizes and options of one call of categorical_kl."""

    name: str
    shape: tuple[int, ...]
    unimix: float = 0.0
    kl_balance: float | None = None
    # as of GaussianKLCase
    free_share: float = 0.0
    scale: float = 2.0

    def inputs(self, dtype=torch.float32, device="cpu"):
        """Draw post_logits, prior_logits; they require gradients."""
        generator = torch.Generator().manual_seed(0)
        drawn = (self.scale * torch.randn(self.shape, generator=generator) for _ in range(2))
        return tuple(x.to(device, dtype).requires_grad_() for x in drawn)

    def options(self, inputs):
        """Mixture, balance and free nats, the latter half-way between two rows."""
        options = {"unimix": self.unimix, "kl_balance": self.kl_balance}
        if self.free_share == 0.0:
            return options
        q, p = (x.detach().double().softmax(-1) for x in inputs)
        q, p = ((1 - self.unimix) * x + self.unimix / x.shape[-1] for x in (q, p))
        kl = (q * (q / p).log()).sum((-2, -1)).flatten().sort().values
        k = int(self.free_share * (kl.numel() - 1))
        return {**options, "free_nats": (kl[k : k + 2].mean()).item()}


CATEGORICAL_KL = (
    CategoricalKLCase("one element", (1, 1, 2)),
    CategoricalKLCase("one class", (3, 2, 1), unimix=0.1),
    CategoricalKLCase("no batch dimension", (5, 7), unimix=0.01),
    CategoricalKLCase("sequence", (5, 7, 4, 6), kl_balance=0.8, free_share=0.5),
    CategoricalKLCase("only the posterior learns", (6, 3, 5), kl_balance=0.0),
    CategoricalKLCase("only the prior learns", (6, 3, 5), unimix=0.01, kl_balance=1.0),
    CategoricalKLCase("dreamer", (9, 32, 32), unimix=0.01, kl_balance=0.8, free_share=0.3),
    CategoricalKLCase("dreamer without mixture", (9, 32, 32), kl_balance=0.8),
    CategoricalKLCase("no power of two", (7, 33, 63), unimix=0.3),
    CategoricalKLCase("many classes", (2, 3, 1000)),
    CategoricalKLCase("large logits", (4, 3, 17), unimix=0.01, scale=50.0),
)
CATEGORICAL_KL_BENCH = (
    CategoricalKLCase("[1024, 32, 32]", (1024, 32, 32)),
    CategoricalKLCase("[1024, 32, 32], unimix 0.01", (1024, 32, 32), unimix=0.01),
)


@dataclass(frozen=True)
class GaussianNLLCase:
    """Sizes and options of one call of gaussian_nll."""

    name: str
    shape: tuple[int, ...]
    has_std: bool = True
    weight_by_std: bool = False
    mask_shape: tuple[int, ...] | None = None
    constant: bool = True
    std_range: tuple[float, float] = (0.1, 2.0)

    def inputs(self, dtype=torch.float32, device="cpu"):
        """Draw target, mean and std, which may be None; the last two require gradients."""
        generator = torch.Generator().manual_seed(0)
        target, mean = (torch.randn(self.shape, generator=generator) for _ in range(2))
        low, high = self.std_range
        std = low * (high / low) ** torch.rand(self.shape, generator=generator)
        mean, std = (x.to(device, dtype).requires_grad_() for x in (mean, std))
        return target.to(device, dtype), mean, std if self.has_std else None

    def options(self, device="cpu"):
        """Weight, mask and constant."""
        mask = None
        if self.mask_shape is not None:
            generator = torch.Generator().manual_seed(1)
            mask = torch.randint(0, 3, self.mask_shape, generator=generator).to(device)
        return {"weight_by_std": self.weight_by_std, "mask": mask, "constant": self.constant}


GAUSSIAN_NLL = (
    GaussianNLLCase("one element", (1, 1), mask_shape=(1, 1)),
    GaussianNLLCase("no batch dimension", (17,), constant=False),
    GaussianNLLCase("sequence", (5, 7, 24), weight_by_std=True, mask_shape=(5, 7, 1)),
    GaussianNLLCase("unit std", (6, 33), has_std=False),
    GaussianNLLCase("unit std, weighted and masked", (6, 33), False, True, (6, 33), False),
    GaussianNLLCase("no power of two", (63, 127), weight_by_std=True, mask_shape=(63, 127)),
    GaussianNLLCase("mask of features", (63, 12), mask_shape=(12,)),
    GaussianNLLCase("mask of nothing but a number", (63, 12), mask_shape=()),
    GaussianNLLCase("many rows to a block", (1023, 3)),
    GaussianNLLCase("longer than a block", (3, 2500), True, True, (3, 1)),
    GaussianNLLCase("longer than a block, masked", (3, 2500), mask_shape=(3, 2500)),
    GaussianNLLCase("tiny and huge std", (9, 64), std_range=(1e-6, 1e3)),
)
GAUSSIAN_NLL_BENCH = (
    GaussianNLLCase("[2500, 24]", (2500, 24)),
    GaussianNLLCase("[2500, 24], weighted", (2500, 24), weight_by_std=True),
    GaussianNLLCase("[2500, 512], unit std", (2500, 512), has_std=False),
)


@dataclass(frozen=True)
class LambdaReturnCase:
    """Sizes and options of one call of lambda_return."""

    name: str
    shape: tuple[int, int]
    # None: one per state
    discount: float | None = None
    lambda_: float = 0.95

    def inputs(self, dtype=torch.float32, device="cpu"):
        """Draw rewards, next_values, discounts, which may be a number; tensors need gradients."""
        generator = torch.Generator().manual_seed(0)
        rewards, values = torch.randn(2, *self.shape, generator=generator)
        discounts = torch.rand(self.shape, generator=generator)
        *drawn, discounts = (
            x.to(device, dtype).requires_grad_() for x in (rewards, values, discounts)
        )
        return *drawn, discounts if self.discount is None else self.discount


LAMBDA_RETURN = (
    LambdaReturnCase("one element", (1, 1)),
    LambdaReturnCase("one step", (1, 9), discount=0.99),
    LambdaReturnCase("one sequence", (50, 1)),
    LambdaReturnCase("no mixing", (7, 5), lambda_=0.0),
    LambdaReturnCase("whole returns", (7, 5), lambda_=1.0),
    LambdaReturnCase("constant discount", (15, 63), discount=0.99),
    LambdaReturnCase("several blocks of columns", (15, 601)),
)
LAMBDA_RETURN_BENCH = (
    LambdaReturnCase("[15, 1024]", (15, 1024)),
    LambdaReturnCase("[15, 1024], gamma", (15, 1024), discount=0.997),
    LambdaReturnCase("[50, 50]", (50, 50)),
)


@dataclass(frozen=True)
class ScanCase:
    """Sizes and variants of one call of an RSSM scan."""

    name: str
    T: int = 6
    B: int = 7
    D: int = 37
    S: int = 11
    A: int = 5
    cell: str = "torch_gru"
    heads: str = "split"
    groups: int = 0  # 0: a gaussian latent
    unimix: float = 0.0
    pre: int = 0  # width of the input layer; 0: none
    width: int = 19
    hidden: int = 2  # layers of the head, like those of the policy
    policy_hidden: int = 2
    resets: bool = True
    projected: bool = False  # the policy reads more than the state
    detach: bool = False
    blocks: int = 0  # of block_gru, else 0
    branch: int = 0  # width of its input layers

    def _layer(self, draw, *shape, bias=True, norm=False):
        out = shape[:-1]
        parts = [draw(*shape) / shape[-1] ** 0.5, 0.3 * draw(*out) if bias else None]
        if norm:
            parts.append(1 + 0.3 * draw(*out))
            parts += [] if self.blocks else [0.3 * draw(*out)]
        return Layer(*parts)

    def _branches(self, draw):
        own, width = self.D // self.blocks, self.branch
        sizes = (self.D, self.S, self.A)
        shapes = [(width, size) for size in sizes] + [(self.blocks, own, own + 3 * width)]
        return tuple(self._layer(draw, *shape, norm=True) for shape in shapes)

    def _net(self, draw, size, out, hidden, split, offset):
        layers = []
        for i in range(hidden + 1):
            to = self.width if i < hidden else out
            shape = (2 * to if i == 0 else to, size) if split else (to, size)
            shape = (2, *shape) if split and i else shape
            norm = not split and i < hidden
            layers.append(self._layer(draw, *shape, bias=not (offset and i == 0), norm=norm))
            size = to
        return tuple(layers)

    def arguments(self, op, dtype=torch.float32):
        """Draw positional arguments and options of an op; all but noise require gradients."""
        g = torch.Generator().manual_seed(len(self.name))
        T, B, D, S, A = self.T, self.B, self.D, self.S, self.A

        def draw(*shape):
            return torch.randn(shape, generator=g, dtype=torch.float64)

        observe, policy, split = "observe" in op, "policy" in op, self.heads == "split"
        reads = self.pre or S + A
        gates = 3 * D, reads + (0 if self.cell == "torch_gru" else D)
        if self.blocks:
            gates = self.blocks, 3 * D // self.blocks, D // self.blocks
        out = S if split or self.groups else 2 * S
        weights = RSSMWeights(
            self._layer(draw, self.pre, S + A, norm=True) if self.pre else None,
            self._layer(draw, *gates, norm=self.cell.startswith("ln")),
            self._layer(draw, 3 * D, D) if self.cell == "torch_gru" else None,
            self._net(draw, D, out, self.hidden, split, observe),
            self._branches(draw) if self.blocks else (),
        )
        net = self._net(draw, D + S, A, self.policy_hidden, True, observe and self.projected)
        noise = torch.rand(T, B, self.groups or S, generator=g, dtype=torch.float64)
        noise = noise if self.groups else draw(T, B, S)
        is_first = torch.rand(T, B, generator=g) < (0.3 if self.resets else 0.0)
        proj = draw(T, B, weights.head[0].weight.shape[0])
        action = [draw(T, B, A)]
        args = [proj] * observe + action * (not policy) + [noise] + action * policy
        args += [is_first] * observe + [draw(B, D), draw(B, S), weights]
        options = {"cell": self.cell, "heads": self.heads, "min_std": 0.1, "unimix": self.unimix}
        options["latent"] = "categorical" if self.groups else "gaussian"
        options |= {"groups": self.groups} if self.groups else {}
        if policy:
            args.append(PolicyWeights(net))
            options |= {"action_min_std": 0.01}
        if policy and observe and self.projected:
            options["policy_proj"] = draw(T, B, 2 * self.width)
        if policy and not observe:
            options["detach_policy_input"] = self.detach
        drawn = {id(noise)} | ({id(action[0])} if policy else set())

        def leaf(x):
            if not isinstance(x, torch.Tensor) or not x.is_floating_point():
                return x
            return x.to(dtype).clone().requires_grad_(id(x) not in drawn)

        return tree_map(leaf, (args, options))


SCANS = (
    ScanCase("rssm"),
    ScanCase("rssmo", heads="joint", pre=23, hidden=1, projected=True),
    ScanCase("rssmo_v2", cell="ln_gru_a", heads="joint", pre=23, hidden=1, detach=True),
    ScanCase("discrete", cell="ln_gru_a", heads="joint", S=15, groups=3, pre=23, hidden=1),
    ScanCase("dreamer", cell="ln_gru_d", heads="joint", S=12, groups=4, unimix=0.1, hidden=2),
    ScanCase("one step", T=1, B=1, policy_hidden=1),
    ScanCase("one step, joint", T=1, B=3, heads="joint", cell="ln_gru_a", pre=8, hidden=3),
    ScanCase("deep", B=3, hidden=3, policy_hidden=1, projected=True, resets=False),
    ScanCase("powers of two", T=3, B=16, D=64, S=32, A=8, width=32, detach=True),
    ScanCase("many rows to a block", T=2, B=131, cell="ln_gru_a", hidden=1),
    ScanCase("smallest", T=2, B=5, D=1, S=1, A=1, width=2, hidden=1, policy_hidden=1),
    ScanCase(
        "dreamer v3",
        cell="block_gru",
        heads="joint",
        D=36,
        S=12,
        groups=4,
        unimix=0.01,
        hidden=1,
        blocks=4,
        branch=17,
    ),
    ScanCase(
        "blocks, gaussian",
        T=3,
        B=70,
        cell="block_gru",
        heads="joint",
        D=64,
        blocks=2,
        branch=16,
        projected=True,
        detach=True,
    ),
    ScanCase("one block", T=2, cell="block_gru", D=40, blocks=1, branch=16, resets=False),
)


@dataclass(frozen=True)
class MLPCase:
    """Sizes and variants of one call of mlp."""

    name: str
    lead: tuple[int, ...] = (5, 7)
    in_size: int = 33
    width: int = 19
    depth: int = 3
    outs: tuple[int, ...] = (4,)
    norm: str = ""  # "layer" or "rms"
    activate_last: bool = False

    def arguments(self, dtype=torch.float32):
        """Draw x, the networks, and options; all tensors require gradients."""
        g = torch.Generator().manual_seed(len(self.name))

        def leaf(*shape, at=0.0, scale=1.0):
            drawn = at + scale * torch.randn(shape, generator=g, dtype=torch.float64)
            return drawn.to(dtype).requires_grad_()

        def net(out):
            size = self.in_size
            for i in range(self.depth):
                hidden = i + 1 < self.depth
                to = self.width if hidden else out
                layer = Layer(leaf(to, size, scale=size**-0.5), leaf(to, scale=0.3))
                if self.norm and (hidden or self.activate_last):
                    layer = layer._replace(scale=leaf(to, at=1.0, scale=0.3))
                    layer = layer._replace(shift=leaf(to)) if self.norm == "layer" else layer
                size = to
                yield layer

        x = leaf(*self.lead, self.in_size)
        return (x, [tuple(net(out)) for out in self.outs]), {"activate_last": self.activate_last}


MLPS = (
    MLPCase("three layers"),
    MLPCase("nets with a norm", norm="layer", outs=(4, 6)),
    MLPCase("nets with an RMS norm", norm="rms", outs=(4, 6)),
    MLPCase("many nets", outs=(1, 14, 9, 2, 33)),
    MLPCase("one affine map", depth=1, outs=(24,)),
    MLPCase("an encoder", depth=2, outs=(19,), activate_last=True),
    MLPCase("an encoder with a norm", depth=2, outs=(19,), norm="layer", activate_last=True),
    MLPCase("one activated layer", depth=1, outs=(19, 8), norm="layer", activate_last=True),
    MLPCase("one activated RMS layer", depth=1, outs=(19, 8), norm="rms", activate_last=True),
    MLPCase("one row", lead=()),
    MLPCase("one of everything", lead=(1,), in_size=1, width=1, outs=(1,)),
    MLPCase("several chunks", lead=(1030,), depth=2, outs=(3, 5)),
    MLPCase("powers of two", lead=(4, 32), in_size=64, width=64, outs=(32, 16), norm="layer"),
)
# AIME's: the prior's head, a decoder of walker, the inverse dynamics model of RSSMO
MLP_BENCH = (
    MLPCase("[2500, 512] prior", (50, 50), 512, 128, 3, (128, 128)),
    MLPCase("[2500, 640] decoders", (50, 50), 640, 128, 3, (14, 14, 1, 1, 9, 9)),
    MLPCase("[2500, 542] rssmo", (50, 50), 542, 512, 2, (60,), norm="layer"),
)
