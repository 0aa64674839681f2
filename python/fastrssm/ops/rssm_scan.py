"""What the four RSSM scans share: one op over a sequence, its backends, its gradient.

Saved for backward: inputs and results, which live anyway, and what the kernel keeps: on cpu, per
step and sequence, all pre-activations and the inputs of all products, 13 KB for AIME's `rssm`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _pytree

from fastrssm._dispatch import Backend, preferred, resolve
from fastrssm._library import (
    define,
    differentiable_with_weights,
    empty_again,
    one_by_one,
    precision_of_products,
)
from fastrssm.ops import rssm_cpu, rssm_cuda, rssm_triton
from fastrssm.ops.rssm_plan import Plan, TensorTable, flatten, make_plan
from fastrssm.reference.gru_cell import Cell
from fastrssm.reference.rssm_weights import Heads, Latent, PolicyWeights, RSSMWeights

P = ParamSpec("P")
R = TypeVar("R")


class Inputs(NamedTuple):
    """What a scan reads besides weights; None where a public op has no such argument."""

    embed_proj: Tensor | None
    action: Tensor | None
    noise: Tensor
    action_noise: Tensor | None
    is_first: Tensor | None
    deter0: Tensor
    stoch0: Tensor
    policy_proj: Tensor | None


class Call(NamedTuple):
    """A checked call of a scan: everything in one dtype on one device, and what will run it."""

    inputs: Inputs
    weights: list[Tensor]
    plan: Plan
    backend: Backend
    constants: tuple[float, float, float]
    mixed: bool

    def plainly(self, function: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
        """Call the reference; it does not run under autocast, so in float32 without it."""
        if not self.mixed:
            return function(*args, **options)
        with torch.autocast(self.plan.device.type, enabled=False):
            args, options = _pytree.tree_map(_widened, (args, options))
            return function(*args, **options)


# the axis of B in each input
_AXES = (1, 1, 1, 1, 1, 0, 0, 1)
_OPTIONAL = ("is_first", "policy_proj")
_PLANS: TensorTable[tuple[Plan, rssm_cpu.Packs | None]] = TensorTable(8)
_PLAIN = frozenset((Tensor, Parameter))
_KERNELS: dict[str, Any] = {"cpu": rssm_cpu, "triton": rssm_triton, "cuda": rssm_cuda}


def prepare(
    op: str,
    inputs: Inputs,
    weights: RSSMWeights,
    policy: PolicyWeights | None,
    *,
    cell: Cell,
    heads: Heads,
    latent: Latent,
    groups: int,
    constants: tuple[float, float, float],
    detach: bool,
    backend: Backend | None,
) -> Call:
    """Check the arguments of a public op and choose its backend.

    Args:
        op: its name.
        inputs: all that it reads besides weights.
        weights: of the world model.
        policy: None: the actions are given.
        cell: as in the op, like heads, latent, groups and backend.
        heads: as there.
        latent: as there.
        groups: as there.
        constants: min_std, unimix, action_min_std.
        detach: no gradient through what the policy sees.
        backend: as there.

    Raises:
        ValueError: as the ops.
        TypeError: as the ops.
        RuntimeError: as the ops.
    """
    if mixed := torch.is_autocast_enabled(weights.cell_input.weight.device.type):
        inputs, weights, policy = _pytree.tree_map(_widened, (inputs, weights, policy))
    observe, projected = op.startswith("rssm_observe"), inputs.policy_proj is not None
    variant = cell, heads, latent, groups, observe, projected, detach
    plan, tensors = _plan(weights, policy, variant)
    min_std, unimix, action_min_std = constants
    if not 0.0 <= min_std < float("inf"):
        raise ValueError(f"min_std is {min_std}, expected a finite number of at least 0")
    if not 0.0 <= unimix < 1.0:
        raise ValueError(f"unimix is {unimix}, expected a number in [0, 1)")
    if not 0.0 <= action_min_std < float("inf"):
        raise ValueError(f"action_min_std is {action_min_std}, expected at least 0")
    _check_inputs(inputs, plan)
    refused = plan.refused
    if plan.device.type == "cuda" and "cuda" not in refused:
        precision = _precision(plan, "cuda", mixed=mixed)
        reason = rssm_cuda.refusal(plan.structure, precision, plan.device.index or 0)
        if reason is None and (backend or preferred()) is None:
            reason = rssm_cuda.disadvantage(plan.structure, inputs.noise.shape[1])
        here: dict[Backend, str] = {"cuda": reason} if reason else {}
        refused = refused | here
    chosen = resolve(op, inputs.noise, backend, refused)
    if chosen != "reference" and torch.is_grad_enabled():
        for name, noise in (("noise", inputs.noise), ("action_noise", inputs.action_noise)):
            if noise is not None and noise.requires_grad:
                wanted = "expected noise without requires_grad, or backend='reference'"
                raise ValueError(f"{name} requires grad, {wanted}")
    return Call(inputs, tensors, plan, chosen, constants, mixed)


def scan(call: Call) -> tuple[Tensor, ...]:
    """Run a scan on a fused backend.

    Returns:
        deter [T, B, D], stoch [T, B, S], mean or logits [T, B, S], std [T, B, S] (categorical:
        empty), action [T, B, A] (without a policy: empty), and what was kept for backward.
    """
    plan = call.plan
    weights = call.weights if plan.dense else [x.contiguous() for x in call.weights]
    inputs = [None if x is None else x.contiguous() for x in call.inputs]
    precision = _precision(plan, call.backend, mixed=call.mixed)
    return _scan(*inputs, weights, plan.structure, call.constants, precision, call.backend)


def _precision(plan: Plan, backend: Backend, *, mixed: bool) -> str:
    if mixed and backend != "cpu":
        # what a GPU's autocast takes unless it is told otherwise
        half = torch.get_autocast_dtype(plan.device.type) == torch.float16
        return "float16" if half else "bfloat16"
    return precision_of_products(plan.dtype, mixed=mixed)


def stats_of(latent: Latent, groups: int, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    """Return the statistics as the ops do: mean and std [..., S], or logits [..., G, K]."""
    return (mean, std) if latent == "gaussian" else (mean.unflatten(-1, (groups, -1)),)


def _plan(
    weights: RSSMWeights, policy: PolicyWeights | None, variant: tuple[Any, ...]
) -> tuple[Plan, list[Tensor]]:
    flat = flatten(weights, policy)
    tensors = [x for x in flat if x is not None]
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not _PLAIN.issuperset(map(type, tensors))
    ):
        return make_plan(weights, policy, *variant), tensors
    # the address as well: of the same parameter after `.data = ...`
    key = variant, *map(id, flat), *[x.data_ptr() for x in tensors]
    plan, packs = _PLANS.get(key) or (None, None)
    if plan is None:
        plan = make_plan(weights, policy, *variant)
        if plan.dense and plan.device.type == "cpu":
            packs = rssm_cpu.packs_of(tensors, plan.structure)
        _PLANS.put(key, tensors, (plan, packs))
    return plan, tensors if packs is None else rssm_cpu.Weights(tensors, packs)


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _check_inputs(inputs: Inputs, plan: Plan) -> None:
    noise = inputs.noise
    if not isinstance(noise, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"noise is a {type(noise).__name__}, expected a Tensor")
    if noise.ndim != 3 or noise.shape[0] == 0:
        raise ValueError(f"noise has shape {list(noise.shape)}, expected [T, B, ...] with T > 0")
    T, B, _ = noise.shape
    for name, x, axis, size in zip(Inputs._fields, inputs, _AXES, plan.sizes, strict=True):
        if x is None and (size == 0 or name in _OPTIONAL):
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}, expected a Tensor")
        shape, dtype = (T, B, size) if axis else (B, size), plan.dtype
        if name == "is_first":
            shape, dtype = (T, B), torch.bool
        if x.shape != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}, expected {list(shape)}")
        if x.dtype != dtype:
            raise TypeError(f"{name} is {x.dtype}, expected {dtype}")
        if x.device != plan.device:
            raise ValueError(f"{name} is on {x.device}, expected {plan.device} like the weights")


def _empty_results(*args: Any) -> tuple[Tensor, ...]:
    noise, structure, keep = args[2], args[9], args[-1]
    D, S, A, *_ = structure
    categorical, policy = structure[6] == 1, structure[10] > 0
    T, B, _ = noise.shape
    like: dict[str, Any] = {"dtype": noise.dtype, "device": noise.device}
    kept = T * B * _kept_width(tuple(structure), *args[11:13]) if keep else 0
    shapes = (
        (T, B, D),
        (T, B, S),
        (T, B, S),
        (0,) if categorical else (T, B, S),
        (T, B, A) if policy else (0,),
        (kept,),
    )
    return tuple(empty_again(shape, **like) for shape in shapes)


def _kept_width(structure: tuple[int, ...], precision: str, backend: str) -> int:
    if backend == "triton":
        return rssm_triton.kept_width(structure, precision)
    return (rssm_cpu if backend == "cpu" else rssm_cuda).kept_width(structure)


def _forward(*args: Any) -> tuple[Tensor, ...]:
    inputs, (weights, structure, constants, precision, backend, keep) = args[:8], args[8:]
    results = _empty_results(*args)
    # an empty batch has nothing to compute
    if inputs[2].shape[1]:
        run = _KERNELS[backend].forward
        run(inputs, weights, structure, constants, precision, results, keep)
    return results


def _empty_gradients(*args: Any) -> list[Tensor]:
    inputs, weights, wanted = args[5:13], args[13], args[-1]
    if wanted[2] or wanted[3]:
        raise ValueError("noise or action_noise requires grad, expected that of other inputs only")
    return [
        empty_again(x.shape, dtype=x.dtype, device=x.device)
        for x, want in zip((*inputs, *weights), wanted, strict=True)
        if want
    ]


def _backward(*args: Any) -> list[Tensor]:
    gradients = _empty_gradients(*args)
    grads, inputs, results = args[:5], args[5:13], args[-2]
    weights, structure, constants, precision, backend = args[13:18]
    if inputs[2].shape[1] == 0:
        return [x.zero_() for x in gradients]
    if not results[-1].numel():
        # under vmap nothing is kept
        results = _forward(*args[5:18], True)
    found = iter(gradients)
    places = [next(found) if want else None for want in args[-1]]
    run = _KERNELS[backend].backward
    run(grads, inputs, weights, structure, constants, precision, results, places[:8], places[8:])
    return gradients


def _merged(x: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """Make a mapped dimension part of the batch."""
    if x is None:
        return None
    shape = *x.shape[:axis], size, *x.shape[axis:]
    x = x.unsqueeze(axis).expand(shape) if dim is None else x.movedim(dim, axis)
    return x.flatten(axis, axis + 1)


def _split(x: Tensor, size: int, axis: int) -> tuple[Tensor, int | None]:
    """Undo `_merged`; what is empty has no batch."""
    if x.ndim == 1:
        return x, None
    return x.unflatten(axis, (size, x.shape[axis] // size)), axis


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    # what one merged or several single calls keep does not fit all backwards, which run them again
    args = *args[:-1], False
    if any(dim is not None for dim in in_dims[8]):
        return one_by_one(torch.ops.fastrssm.rssm_scan, info, in_dims, args)
    size = info.batch_size
    inputs = map(_merged, args[:8], in_dims[:8], (size,) * 8, _AXES)
    results = torch.ops.fastrssm.rssm_scan(*inputs, *args[8:])
    found, dims = zip(*(_split(x, size, 1) for x in results), strict=True)
    return found, dims


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    op, wanted = torch.ops.fastrssm.rssm_scan_backward, args[-1]
    # each of them has its own gradient of the weights
    if any(wanted[8:]) or any(dim is not None for dim in in_dims[13]):
        return one_by_one(op, info, in_dims, args)
    size = info.batch_size
    axes = *(1,) * 5, *_AXES
    tensors = map(_merged, args[:13], in_dims[:13], (size,) * 13, axes)
    results = [
        x if x.ndim == 1 else _merged(x, dim, size, 1)
        for x, dim in zip(args[-2][:-1], in_dims[-2][:-1], strict=True)
    ]
    nothing = args[-2][-1].new_empty(0)
    gradients = op(*tensors, *args[13:-2], [*results, nothing], wanted)
    wanted_axes = [axis for axis, want in zip(_AXES, wanted[:8], strict=True) if want]
    pairs = [_split(x, size, axis) for x, axis in zip(gradients, wanted_axes, strict=True)]
    return [x for x, _ in pairs], [dim for _, dim in pairs]


_INPUTS = (
    "Tensor? embed_proj, Tensor? action, Tensor noise, Tensor? action_noise, Tensor? is_first,"
    " Tensor deter0, Tensor stoch0, Tensor? policy_proj, Tensor[] weights, int[] structure,"
    " float[] constants, str precision, str backend, bool keep"
)
_GRADS = ", ".join(f"Tensor? {x}_grad" for x in ("deter", "stoch", "stats0", "stats1", "action"))
_scan = differentiable_with_weights(
    define(
        f"rssm_scan({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
        _forward,
        _empty_results,
        _vmap_forward,
    ),
    define(
        f"rssm_scan_backward({_GRADS}, {_INPUTS}, Tensor[] results, bool[] wanted) -> Tensor[]",
        _backward,
        _empty_gradients,
        _vmap_backward,
    ),
    tensors=len(Inputs._fields),
)
