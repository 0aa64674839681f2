"""Multi-layer perceptrons of one shape on one input: encoders, decoders, heads, projections.

Saved for backward: input and results, which live anyway, and of each hidden layer what it computes:
4 bytes a unit and row, 8 with a norm.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from fastrssm import reference
from fastrssm._dispatch import Backend, resolve
from fastrssm._library import (
    define,
    differentiable_with_weights,
    empty_again,
    one_by_one,
    precision_of_products,
)
from fastrssm.reference.rssm_weights import Layer

# numbers in a structure before the sizes of the results: width, layers, norm, activate_last
_SIZES = 4
# parts of a layer by norm: none, LayerNorm, RMS norm
_PARTS = (2, 4, 3)
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def mlp(
    x: Tensor,
    nets: Sequence[tuple[Layer, ...]],
    *,
    activate_last: bool = False,
    backend: Backend | None = None,
) -> tuple[Tensor, ...]:
    """Apply networks of one shape, but for the sizes of their results, to the same input.

    A hidden layer is affine, then ELU; or LayerNorm (eps 1e-5) and SiLU where it has scale and
    shift; or RMS norm (eps 1e-4) and SiLU where it has a scale alone. All tensors share dtype
    (float32, bfloat16, float64) and device. Under autocast products are of bfloat16 and results
    float32; otherwise products on cpu follow `torch.set_float32_matmul_precision`. The results can
    be differentiated once; twice with backend="reference".

    Args:
        x: [..., I] input.
        nets: the layers of each network: hidden ones, then an affine head. One layer alone is an
            affine map.
        activate_last: the last layer is a hidden one too.
        backend: None picks the fastest one for this device.

    Returns:
        [..., O] the result of each network.

    Raises:
        ValueError: shapes or devices differ, or the networks are not of one shape.
        TypeError: dtypes differ or are not supported.
        RuntimeError: the requested backend is not available; the message says why.
    """
    structure, weights, refused = _structure(x, nets, activate_last)
    mixed = torch.is_autocast_enabled(x.device.type)
    chosen = resolve("mlp", x, backend, refused)
    if chosen == "reference":
        found = reference.mlp(x, nets, activate_last=activate_last)
        return tuple(y.float() for y in found) if mixed else found
    if mixed:
        x, weights = _pytree.tree_map(Tensor.float, (x, weights))
    precision = precision_of_products(x.dtype, mixed=mixed)
    rows, outs = math.prod(x.shape[:-1]), structure[_SIZES:]
    dense = [part.contiguous() for part in weights]
    flat, _ = _mlp(x.contiguous().view(rows, x.shape[-1]), dense, structure, precision, chosen)
    # the gradient of a split is a copy, of which one network alone has no need
    parts = flat.split([rows * out for out in outs]) if len(outs) > 1 else (flat,)
    return tuple(y.view(*x.shape[:-1], out) for y, out in zip(parts, outs, strict=True))


def _structure(
    x: Tensor, nets: Sequence[tuple[Layer, ...]], activate_last: bool
) -> tuple[list[int], list[Tensor], dict[Backend, str]]:
    """Check the arguments; return sizes, all parts of all layers, and who cannot run them."""
    if not isinstance(x, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"x is a {type(x).__name__}, expected a Tensor")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x is {x.dtype}, expected one of {_DTYPES}")
    if not nets or not nets[0]:
        raise ValueError("nets is empty or has no layers, expected at least one layer each")
    first, depth = nets[0], len(nets[0])
    width = first[0].weight.shape[0] if depth > 1 else 0
    norm = 0
    if first[0].scale is not None and (depth > 1 or activate_last):
        norm = 2 if first[0].shift is None else 1
    autocast = torch.is_autocast_enabled(x.device.type)
    weights: list[Tensor] = []
    outs: list[int] = []
    refused: dict[Backend, str] = {}
    for g, layers in enumerate(nets):
        if len(layers) != depth:
            raise ValueError(f"nets[{g}] has {len(layers)} layers, expected {depth} like nets[0]")
        in_size = x.shape[-1] if x.ndim else 0
        for i, layer in enumerate(layers):
            name, last = f"nets[{g}][{i}]", i + 1 == depth
            if layer.weight.ndim != 2:
                shape = list(layer.weight.shape)
                raise ValueError(f"{name}.weight has shape {shape}, expected [out, in]")
            out = layer.weight.shape[0] if last else width
            parts = _parts(norm, activate_last, i, depth)
            for part, tensor in zip(Layer._fields, layer, strict=True):
                if tensor is None:
                    if part == "bias":
                        refused["cpu"] = f"{name} has no bias"
                    elif part in Layer._fields[:parts]:
                        raise ValueError(f"{name}.{part} is None, expected a norm as in nets[0][0]")
                    continue
                if part not in Layer._fields[:parts]:
                    kind = "RMS norm" if parts == 3 else "no norm"
                    raise ValueError(f"{name}.{part} is a Tensor, expected None: {kind} there")
                shape = (out, in_size) if part == "weight" else (out,)
                if tensor.shape != shape:
                    shapes = f"{list(tensor.shape)}, expected {list(shape)}"
                    raise ValueError(f"{name}.{part} has shape {shapes}")
                if tensor.dtype != x.dtype and not autocast:
                    raise TypeError(f"{name}.{part} is {tensor.dtype}, expected {x.dtype} like x")
                if tensor.device != x.device:
                    raise ValueError(f"{name}.{part} is on {tensor.device}, expected {x.device}")
                weights.append(tensor)
            in_size = out
        outs.append(in_size)
    if x.dtype == torch.bfloat16 and not autocast:
        refused["cpu"] = "bfloat16 tensors run on reference only; autocast gives bfloat16 products"
    if 0 in (x.shape[-1], width or 1, *outs):
        refused["cpu"] = "a layer is empty"
    return [width, depth, norm, int(activate_last), *outs], weights, refused


def _parts(norm: int, activate_last: bool | int, i: int, depth: int) -> int:
    """Return how many parts layer i has; the head, if there is one, has no norm."""
    return _PARTS[norm] if activate_last or i + 1 < depth else 2


def _layout(x: Tensor, structure: Sequence[int]) -> list[int]:
    return [*x.shape, *structure]


def _addresses(tensors: Sequence[Tensor | None], structure: Sequence[int]) -> list[int]:
    """Four addresses a layer, 0 where it lacks a part."""
    _, layers, norm, activate_last, *_ = structure
    found = iter(tensors)
    addresses: list[int] = []
    for _ in structure[_SIZES:]:
        for i in range(layers):
            parts = _parts(norm, activate_last, i, layers)
            taken = [next(found) for _ in range(parts)]
            addresses += [0 if x is None else x.data_ptr() for x in taken]
            addresses += [0] * (4 - parts)
    return addresses


def _empty_results(*args: Any) -> tuple[Tensor, Tensor]:
    from fastrssm import _native

    x, _, structure, *_, keep = args
    kept = _native.mlp_saved_numel(_layout(x, structure)) if keep else 0
    like: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    flat = empty_again((x.shape[0] * sum(structure[_SIZES:]),), **like)
    return flat, empty_again((kept,), **like)


def _forward(*args: Any) -> tuple[Tensor, Tensor]:
    from fastrssm import _native

    x, weights, structure, precision, _, keep = args
    flat, kept = _empty_results(*args)
    if x.shape[0]:
        _native.mlp_forward(
            torch.get_num_threads(), str(x.dtype), precision, _layout(x, structure),
            x.data_ptr(), _addresses(weights, structure), flat.data_ptr(),
            kept.data_ptr() if keep else 0,
        )  # fmt: skip
    return flat, kept


def _empty_gradients(*args: Any) -> list[Tensor]:
    _, x, weights, *_, wanted = args
    return [
        empty_again(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        for tensor, want in zip((x, *weights), wanted, strict=True)
        if want
    ]


def _backward(*args: Any) -> list[Tensor]:
    from fastrssm import _native

    grad, x, weights, structure, precision, backend, _, results, wanted = args
    gradients = _empty_gradients(*args)
    if grad is None or not x.shape[0]:
        return [gradient.zero_() for gradient in gradients]
    if results[1].numel() != _native.mlp_saved_numel(_layout(x, structure)):
        # under vmap nothing is kept
        results = _forward(x, weights, structure, precision, backend, True)
    found = iter(gradients)
    x_grad, *weight_grads = [next(found) if want else None for want in wanted]
    flat, kept = results
    _native.mlp_backward(
        torch.get_num_threads(), str(x.dtype), precision, _layout(x, structure),
        x.data_ptr(), _addresses(weights, structure), flat.data_ptr(), kept.data_ptr(),
        grad.data_ptr(), 0 if x_grad is None else x_grad.data_ptr(),
        _addresses(weight_grads, structure),
    )  # fmt: skip
    return gradients


def _vmap_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    # what single calls keep does not fit all backwards, which run them again
    op = torch.ops.fastrssm.mlp
    return one_by_one(op, info, in_dims, (*args[:-1], False))


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    return one_by_one(torch.ops.fastrssm.mlp_backward, info, in_dims, args)


_INPUTS = "Tensor x, Tensor[] weights, int[] structure, str precision, str backend, bool keep"
_mlp = differentiable_with_weights(
    define(f"mlp({_INPUTS}) -> (Tensor, Tensor)", _forward, _empty_results, _vmap_forward),
    define(
        f"mlp_backward(Tensor? grad, {_INPUTS}, Tensor[] results, bool[] wanted) -> Tensor[]",
        _backward,
        _empty_gradients,
        _vmap_backward,
    ),
    tensors=1,
)
