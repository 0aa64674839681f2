"""The four RSSM scans, which are one: their packed weights, tiles and launches."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from fastrssm.kernels import rssm_hoisted
from fastrssm.kernels.rssm_backward import rssm_backward_kernel
from fastrssm.kernels.rssm_forward import rssm_forward_kernel
from fastrssm.kernels.rssm_layout import Layout, Packing, Tiles, aligned, make_layout

# the dtype of the operands of all products, and how Triton multiplies float32
DTYPES = {
    "float32": (torch.float32, "ieee"),
    "split3": (torch.float32, "tf32"),
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
}
# bytes of packed weights up to which one program streams them; predicted, see kernels/NOTES.md
STREAMED = 6 << 20
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# elements of a tile of classes
_CLASSES = 4096


class Scan(NamedTuple):
    """What the launches of one direction share."""

    layout: Layout
    packing: Packing
    tiles: Tiles
    dtype: torch.dtype
    precision: str
    hoisted: bool


class Packed(NamedTuple):
    """All weights of a scan as one direction reads them."""

    matrices: Tensor | list[Tensor]  # hoisted: one for each layer
    vectors: Tensor


def choose_tiles(precision: str, B: int, *, narrow_rows: bool, in_blocks: bool) -> Tiles:
    """Return the tiles for a batch; more rows once every multiprocessor has a program.

    Predicted, not measured: kernels/NOTES.md.

    Args:
        precision: of the products, a key of DTYPES.
        B: rows of the batch.
        narrow_rows: what stands behind a product needs many registers for each row.
        in_blocks: the cell is block_gru, whose many products have many addresses.
    """
    if in_blocks:
        few = B <= 2112
        if precision == "float32":
            return Tiles(16, 32, 16, 4, 1)
        if precision == "split3":
            return Tiles(16, 64, 32, 8, 3) if few else Tiles(32, 32, 32, 8, 3)
        return Tiles(16, 64, 128, 8, 3) if few else Tiles(32, 64, 64, 8, 3)
    if precision == "float32":
        return Tiles(16, 32, 32, 4, 1)
    if precision == "split3":
        return Tiles(16, 64, 32, 4, 3) if B <= 2112 else Tiles(32, 64, 32, 8, 2)
    if B <= 2112:
        return Tiles(16, 64, 128, 8, 3)
    wide = B > 4224 and not narrow_rows and _multiplies_shared()
    return Tiles(64, 32, 64, 8, 3) if wide else Tiles(32, 32, 128, 8, 3)


def _multiplies_shared() -> bool:
    """Whether operands of products stay in shared memory, and take no registers."""
    return _INTERPRETED or driver.active.get_current_target().arch // 10 in (9, 10)


def make_scan(structure: Sequence[int], precision: str, B: int, *, forward: bool) -> Scan:
    """Describe one direction of a scan.

    Args:
        structure: as in ops.rssm_plan.Plan.
        precision: of the products, a key of DTYPES.
        B: rows of the batch.
        forward: else backward.
    """
    # the norm of the gates, backwards
    narrow_rows = not forward and structure[4] > 0
    tiles = choose_tiles(precision, B, narrow_rows=narrow_rows, in_blocks=structure[14] > 0)
    dtype, how = DTYPES[precision]
    narrow = dtype != torch.float32
    layout, packing = make_layout(tuple(structure), narrow, tiles, forward)
    hoisted = packing.matrices * dtype.itemsize > STREAMED
    return Scan(layout, packing, tiles, dtype, how, hoisted)


def pack(scan: Scan, layers: Sequence[Sequence[Tensor | None]]) -> Packed:
    """Return the matrices and the vectors of all layers as the kernels read them.

    Args:
        scan: one direction.
        layers: weight, bias, scale and shift of each.
    """
    # other tensors than the caller's, whose end ends what is kept for them
    weights = [layer[0].detach() for layer in layers if layer[0] is not None]
    vectors = weights[0].new_zeros(max(scan.packing.vectors, 1), dtype=torch.float32)
    for layer, part, n, at in scan.packing.places:
        x = layers[layer][part]
        assert x is not None
        vectors[at : at + n].copy_(x.flatten())
    if scan.hoisted:
        return Packed([x.to(scan.dtype) for x in weights], vectors)
    # what no weight fills is zero and adds nothing
    matrices = weights[0].new_zeros(scan.packing.matrices, dtype=scan.dtype)
    for source in scan.packing.sources:
        _, row, column, count, rows, columns, across, at, ld, block, transposed = source
        weight = weights[source.layer].flatten(0, -2)[row:, column:]
        if across:
            parts = weight[:rows, : count * columns].unflatten(1, (count, columns)).movedim(1, 0)
        else:
            parts = weight[: count * rows, :columns].unflatten(0, (count, rows))
        parts = parts.mT if transposed else parts
        matrices.as_strided(parts.shape, (block, ld, 1), at).copy_(parts)
    return Packed(matrices, vectors)


def class_tile(layout: Layout, rows: int) -> tuple[int, int]:
    """Groups and classes of a tile of a categorical latent."""
    classes = triton.next_power_of_2(layout.S // layout.groups)
    most = max(1, _CLASSES // (rows * classes))
    return min(most, triton.next_power_of_2(layout.groups)), classes


def _options(scan: Scan) -> dict[str, object]:
    groups, classes = class_tile(scan.layout, scan.tiles.rows)
    return {
        "L": scan.layout, "BB": scan.tiles.rows, "BG": groups, "K_TILE": classes,
        "PRECISION": scan.precision,
        "UPCAST": _INTERPRETED and scan.dtype == torch.bfloat16,
        "num_warps": scan.tiles.warps, "num_stages": scan.tiles.stages, "enable_fp_fusion": True,
    }  # fmt: skip


def forward(
    scan: Scan,
    packed: Packed,
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    operands: Tensor,
    reals: Tensor,
    constants: Sequence[float],
    *,
    keep: bool,
) -> None:
    """Fill the results of a scan.

    Args:
        scan: the forward direction.
        packed: from `pack`.
        inputs: as in ops.rssm_scan.Inputs.
        results: deter, stoch, mean or logits, std, action.
        operands: to keep, [T * B, layout.operands] numbers, or of one step if nothing is kept.
        reals: the same, [T * B, layout.reals] of float32.
        constants: min_std, unimix, action_min_std.
        keep: for a backward scan.
    """
    embed_proj, action, noise, action_noise, is_first, deter0, stoch0, policy_proj = inputs
    deter, stoch, stats0, stats1, drawn = results
    T, B, _ = deter.shape
    if scan.hoisted:
        rssm_hoisted.forward(
            scan.layout, *packed, inputs, results, operands, reals, constants, keep=keep
        )
        return
    scratch = torch.empty(B, scan.layout.scratch, device=deter.device)
    rssm_forward_kernel[(triton.cdiv(B, scan.tiles.rows),)](
        *packed, embed_proj, action if scan.layout.policy is None else drawn, noise, action_noise,
        is_first, deter0, stoch0, policy_proj, deter, stoch, stats0, stats1, operands, reals,
        scratch, T, B, *constants, KEEP=keep, **_options(scan),
    )  # fmt: skip


def backward(
    scan: Scan,
    packed: Packed,
    grads: Sequence[Tensor | None],
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    operands: Tensor,
    reals: Tensor,
    gradients: Tensor,
    state_grads: Sequence[Tensor],
    action_grad: Tensor | None,
    unimix: float,
    *,
    learn: bool,
) -> None:
    """Fill the gradients of pre-activations and inputs.

    Args:
        scan: the backward direction.
        packed: from `pack`.
        grads: of the results; None: zero.
        inputs: as in `forward`, like the next three.
        results: as there.
        operands: as there.
        reals: as there.
        gradients: of pre-activations, [T * B, layout.gradients] numbers, or of one step.
        state_grads: of deter0 and stoch0.
        action_grad: of given actions; None: not wanted.
        unimix: as in the ops.
        learn: gradients of pre-activations are wanted for all steps.
    """
    _, given, noise, action_noise, is_first, deter0, _, _ = inputs
    deter, _, stats0, _, drawn = results
    T, B, D = deter.shape
    if scan.hoisted:
        rssm_hoisted.backward(
            scan.layout, *packed, grads, inputs, results, operands, reals, gradients,
            state_grads, action_grad, unimix, learn=learn,
        )  # fmt: skip
        return
    between = torch.empty(B, 2 * D + scan.layout.S + scan.layout.A, device=deter.device)
    scratch = torch.empty(B, scan.layout.scratch, device=deter.device)
    rssm_backward_kernel[(triton.cdiv(B, scan.tiles.rows),)](
        *packed, *grads, noise, action_noise, is_first, deter0, deter, stats0,
        drawn if given is None else given, operands, reals, gradients, *state_grads, action_grad,
        between, scratch,
        T, B, unimix, LEARN=learn, **_options(scan),
    )  # fmt: skip


def widths(scan: Scan) -> tuple[int, int]:
    """Numbers a row of the operands and of the float32 values that a forward scan keeps."""
    return aligned(scan.layout.operands), max(scan.layout.reals, 1)
