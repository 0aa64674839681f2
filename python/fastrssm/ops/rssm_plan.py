"""The weights of a scan: their checks, what follows from them, and tables kept per weights."""

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from fastrssm._dispatch import Backend
from fastrssm.reference.gru_cell import Cell
from fastrssm.reference.rssm_weights import Heads, Latent, Layer, PolicyWeights, RSSMWeights

CELLS: tuple[Cell, ...] = ("torch_gru", "ln_gru_a", "ln_gru_d", "block_gru")
HEADS: tuple[Heads, ...] = ("split", "joint")
LATENTS: tuple[Latent, ...] = ("gaussian", "categorical")
# parts of a layer, in the order of `Layer`; a bit each in `Plan.structure`
PARTS = Layer._fields
# numbers in `Plan.structure` before those of the layers
SIZES = 16
V = TypeVar("V")


class Plan(NamedTuple):
    """What is known of a scan before its inputs are."""

    # D, S, A, groups, cell, heads, latent, width of the input layer (0: none), layers and width of
    # the head, layers and width of the policy (0: none), observe, detach, blocks and width of a
    # branch of block_gru (0: another cell); then the parts that each layer has
    structure: tuple[int, ...]
    # last dimension of each input in the order of `rssm_scan.Inputs`; 0: it has none
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    # all weights are contiguous
    dense: bool
    # backends that cannot run it, and why
    refused: dict[Backend, str]


class TensorTable(Generic[V]):
    """Values that belong to lists of tensors; an entry ends with any of them."""

    def __init__(self, limit: int) -> None:
        """Hold at most `limit` entries; the one used longest ago goes first."""
        self._limit = limit
        self._entries: OrderedDict[object, tuple[V, object]] = OrderedDict()

    def get(self, key: object) -> V | None:
        """Return the value of `key`, which contains the ids of the tensors, or None."""
        found = self._entries.pop(key, None)
        if found is None:
            return None
        self._entries[key] = found
        return found[0]

    def put(self, key: object, tensors: Sequence[Tensor], value: V) -> None:
        """Add a value."""
        entries = self._entries

        def end(_: object) -> None:
            entries.pop(key, None)

        # an id is unique while its tensor lives: the entry must not survive it
        entries[key] = value, [weakref.ref(tensor, end) for tensor in tensors]
        while len(entries) > self._limit:
            entries.popitem(last=False)


def _count_step(optimizer: Optimizer, *_: Any) -> None:
    # the fused kernels of optimisers change parameters without a new version
    if not torch.compiler.is_compiling():
        changed = [p for group in optimizer.param_groups for p in group["params"]]
        increment_version([p for p in changed if p.grad is not None])


# versions are how packed and merged weights are known to be current
register_optimizer_step_post_hook(_count_step)


def make_plan(
    weights: RSSMWeights,
    policy: PolicyWeights | None,
    cell: Cell,
    heads: Heads,
    latent: Latent,
    groups: int,
    observe: bool,
    projected: bool,
    detach: bool,
) -> Plan:
    """Check all weights of a scan against each other and describe them.

    Args:
        weights: as in the public ops, like all that follows.
        policy: None: the actions are given.
        cell: variant.
        heads: variant.
        latent: variant.
        groups: of a categorical latent.
        observe: the first layer of the head is completed by embed_proj.
        projected: that of the policy by policy_proj.
        detach: no gradient through what the policy sees.

    Raises:
        ValueError: a variant is unknown, or a shape does not fit.
        TypeError: dtypes differ or are not supported.
    """
    for name, value, known in (
        ("cell", cell, CELLS), ("heads", heads, HEADS), ("latent", latent, LATENTS),
    ):  # fmt: skip
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    split, categorical = heads == "split", latent == "categorical"
    if split and categorical:
        raise ValueError("heads is 'split', expected 'joint' for a categorical latent")
    for name, layers in (("weights.head", weights.head), ("policy.layers", policy and policy[0])):
        if layers == ():
            raise ValueError(f"{name} is empty, expected at least one layer")
    first = weights.cell_input.weight
    for name, layer in _named(weights, policy):
        for part, x in zip(PARTS, layer, strict=True):
            if x is not None:
                _check_alike(f"{name}.{part}", x, first)
        if layer.weight.ndim < 2:
            shape = list(layer.weight.shape)
            raise ValueError(f"{name}.weight has shape {shape}, expected [..., out, in]")
    in_blocks = cell == "block_gru"
    D = (first.shape[0] * first.shape[1] if in_blocks else first.shape[0]) // 3
    out = weights.head[-1].weight.shape[-2]
    halved = len(weights.head) == 1 if split else not categorical
    S = out // 2 if halved else out
    if groups < 1 or S % groups:
        raise ValueError(f"groups is {groups}, expected a divisor of the latent's size {S}")
    torch_gru = cell == "torch_gru"
    if (weights.cell_state is None) == torch_gru:
        kind, other = ("None", "a Layer") if torch_gru else ("a Layer", "None")
        raise ValueError(f"weights.cell_state is {kind}, expected {other} for cell={cell!r}")
    count, expected = len(weights.branches), 4 if in_blocks else 0
    if count != expected:
        raise ValueError(f"weights.branches has {count} layers, expected {expected} for {cell!r}")
    pre, reads, blocks, branch = weights.pre, 0, 0, 0
    if in_blocks:
        actions, blocks, branch = _check_blocks(weights, D, S)
    else:
        actions, reads = _check_cell(weights, D, S, 0 if torch_gru else D)
    A = actions
    if weights.cell_state is not None:
        _check_layer("weights.cell_state", weights.cell_state, (3 * D, D))
    width = _check_net("weights.head", weights.head, D, S if split else out, split, observe)
    layers, policy_width = 0, 0
    if policy is not None:
        layers = len(policy.layers)
        policy_width = _check_net("policy.layers", policy.layers, D + S, A, True, projected)
    structure = (
        D, S, A, groups,
        CELLS.index(cell), HEADS.index(heads), LATENTS.index(latent),
        0 if pre is None else reads,
        len(weights.head), max(width, 0), layers, max(policy_width, 0), int(observe), int(detach),
        blocks, branch,
        *(sum(1 << i for i, x in enumerate(layer) if x is not None)
          for _, layer in _named(weights, policy)),
    )  # fmt: skip
    wide = weights.head[0].weight.shape[0] if observe else 0
    wide_policy = policy.layers[0].weight.shape[0] if policy is not None and projected else 0
    drawn = groups if categorical else S
    given, inferred = (A, 0) if policy is None else (0, A)
    completed = (observe and "weights.head[0]", projected and "policy.layers[0]")
    refused = _refusals(weights, policy, cell, split, completed, (width, policy_width))
    sizes = wide, given, drawn, inferred, 0, D, S, wide_policy
    dense = all(x is None or x.is_contiguous() for x in flatten(weights, policy))
    return Plan(structure, sizes, first.dtype, first.device, dense, refused)


def flatten(weights: RSSMWeights, policy: PolicyWeights | None) -> tuple[Tensor | None, ...]:
    """Return all parts of all layers, four each; absent layers have none."""
    pre, cell_input, cell_state, head, branches = weights
    layers = *head, *branches, *(() if policy is None else policy[0])
    return tuple(chain(pre or (), cell_input, cell_state or (), *layers))


def _named(weights: RSSMWeights, policy: PolicyWeights | None) -> list[tuple[str, Layer]]:
    fixed = [(f"weights.{n}", getattr(weights, n)) for n in ("pre", "cell_input", "cell_state")]
    named = [(name, layer) for name, layer in fixed if layer is not None]
    named += [(f"weights.head[{i}]", layer) for i, layer in enumerate(weights.head)]
    named += [(f"weights.branches[{i}]", layer) for i, layer in enumerate(weights.branches)]
    if policy is not None:
        named += [(f"policy.layers[{i}]", layer) for i, layer in enumerate(policy.layers)]
    return named


def _check_alike(name: str, x: Tensor, first: Tensor) -> None:
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{name} is a {type(x).__name__}, expected a Tensor")
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16):
        raise TypeError(f"{name} is {x.dtype}, expected torch.float32, float64 or bfloat16")
    if x.dtype != first.dtype:
        raise TypeError(f"{name} is {x.dtype}, expected {first.dtype} like cell_input")
    if x.device != first.device:
        raise ValueError(f"{name} is on {x.device}, expected {first.device} like cell_input")


def _check_layer(name: str, layer: Layer, shape: tuple[int, ...]) -> None:
    for part, x in zip(PARTS, layer, strict=True):
        expected = shape if part == "weight" else shape[:-1]
        if x is not None and x.shape != expected:
            raise ValueError(f"{name}.{part} has shape {list(x.shape)}, expected {list(expected)}")
    if layer.scale is None and layer.shift is not None:
        raise ValueError(f"{name} has a shift and no scale, expected both, the scale, or none")


def _check_cell(weights: RSSMWeights, D: int, S: int, state: int) -> tuple[int, int]:
    """Return A, and what the cell reads besides `state` numbers of deter."""
    pre, gates = weights.pre, weights.cell_input
    reads = gates.weight.shape[-1] - state
    A = (reads if pre is None else pre.weight.shape[-1]) - S
    if A < 1:
        name, layer = ("cell_input", gates) if pre is None else ("pre", pre)
        shape = list(layer.weight.shape)
        raise ValueError(f"weights.{name}.weight has shape {shape}, expected inputs for an action")
    if pre is not None:
        _check_layer("weights.pre", pre, (reads, S + A))
    _check_layer("weights.cell_input", gates, (3 * D, reads + state))
    return A, reads


def _check_blocks(weights: RSSMWeights, D: int, S: int) -> tuple[int, int, int]:
    """Return A, the number of blocks and the width of a branch."""
    shape = weights.cell_input.weight.shape
    if weights.pre is not None:
        raise ValueError("weights.pre is a Layer, expected None for cell='block_gru'")
    if len(shape) != 3 or shape[1] != 3 * shape[2]:
        raise ValueError(
            f"weights.cell_input.weight has shape {list(shape)}, "
            "expected [blocks, 3D / blocks, D / blocks]"
        )
    blocks, own = shape[0], D // shape[0]
    width, A = weights.branches[2].weight.shape[-2:]
    _check_layer("weights.cell_input", weights.cell_input, tuple(shape))
    for i, size in enumerate((D, S, A)):
        _check_layer(f"weights.branches[{i}]", weights.branches[i], (width, size))
    _check_layer("weights.branches[3]", weights.branches[3], (blocks, own, own + 3 * width))
    return A, blocks, width


def _check_net(
    name: str, layers: tuple[Layer, ...], in_size: int, out_size: int, split: bool, offset: bool
) -> int:
    """Return the width of the hidden layers; -1 if they differ."""
    widths: list[int] = []
    for i, layer in enumerate(layers):
        last = i + 1 == len(layers)
        if split and i:
            out = out_size if last else layer.weight.shape[-2]
            shape = 2, out, in_size
        else:
            out = layer.weight.shape[0] // 2 if split else layer.weight.shape[0]
            out = out_size if last else out
            shape = 2 * out if split else out, in_size
        _check_layer(f"{name}[{i}]", layer, shape)
        widths += [] if last else [out]
        in_size = out
    if offset and layers[0].bias is not None:
        raise ValueError(f"{name}[0].bias is a Tensor, expected None: the projection contains it")
    return widths[0] if len(set(widths)) == 1 else -1


def _refusals(
    weights: RSSMWeights,
    policy: PolicyWeights | None,
    cell: Cell,
    split: bool,
    completed: tuple[str | bool, ...],
    widths: tuple[int, int],
) -> dict[Backend, str]:
    """Why kernels cannot run this; layers that a projection completes have no bias."""

    def by_all(reason: str) -> dict[Backend, str]:
        return {"cpu": reason, "triton": reason, "cuda": reason}

    if weights.cell_input.weight.dtype == torch.bfloat16:
        return by_all("bfloat16 tensors run on reference only; autocast gives bfloat16 products")
    if min(widths) < 0:
        return by_all("hidden layers of a network have several widths, or there are none")
    normed = ["weights.pre"]
    if cell == "block_gru":
        normed += [f"weights.branches[{i}]" for i in range(4)]
    elif cell != "torch_gru":
        normed += ["weights.cell_input"]
    if not split:
        normed += [f"weights.head[{i}]" for i in range(len(weights.head) - 1)]
    refused: dict[Backend, str] = {}
    for name, layer in _named(weights, policy):
        if (layer.scale is not None) != (name in normed):
            return by_all(f"{name} has {'no' if name in normed else 'a'} norm")
        if layer.scale is not None and (layer.shift is None) != (cell == "block_gru"):
            return by_all(f"{name} has {'RMS norm' if layer.shift is None else 'LayerNorm'}")
        if layer.bias is None and name not in completed:
            refused.setdefault("cpu", f"{name} has no bias")
    return refused
