"""The four RSSM scans, which are one: their packed weights, tiles and launches."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

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


def choose_tiles(precision: str, B: int) -> Tiles:
    """Return the tiles for a batch; more rows once every multiprocessor has a program.

    Predicted, not measured: kernels/NOTES.md.
    """
    if precision == "float32":
        return Tiles(16, 32, 32, 4, 1)
    if precision == "split3":
        return Tiles(16, 64, 32, 4, 3) if B <= 2112 else Tiles(32, 64, 32, 8, 2)
    if B <= 2112:
        return Tiles(16, 64, 128, 8, 3)
    return Tiles(32, 64, 64, 8, 3) if B <= 4224 else Tiles(64, 64, 32, 8, 3)


def make_scan(structure: Sequence[int], precision: str, B: int, *, forward: bool) -> Scan:
    """Describe one direction of a scan.

    Args:
        structure: as in ops.rssm_plan.Plan.
        precision: of the products, a key of DTYPES.
        B: rows of the batch.
        forward: else backward.
    """
    tiles = choose_tiles(precision, B)
    dtype, how = DTYPES[precision]
    narrow = dtype != torch.float32
    layout, packing = make_layout(tuple(structure), narrow, tiles, forward)
    return Scan(layout, packing, tiles, dtype, how)


def pack(scan: Scan, layers: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Return the matrices and the vectors of all layers as the kernels read them.

    Args:
        scan: one direction.
        layers: weight, bias, scale and shift of each.
    """
    like = next(x for x in layers[0] if x is not None)
    # what no weight fills is zero and adds nothing
    matrices = like.new_zeros(scan.packing.matrices, dtype=scan.dtype)
    vectors = like.new_zeros(max(scan.packing.vectors, 1), dtype=torch.float32)
    for source in scan.packing.sources:
        weight = layers[source.layer][0]
        assert weight is not None
        weight = weight.flatten(0, -2)
        part = weight[source.row :, source.column :][: source.rows, : source.columns]
        part = part.mT if source.transposed else part
        matrices.as_strided(part.shape, (source.ld, 1), source.at).copy_(part)
    for layer, part, n, at in scan.packing.places:
        x = layers[layer][part]
        assert x is not None
        vectors[at : at + n].copy_(x.flatten())
    return matrices, vectors


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
    packed: tuple[Tensor, Tensor],
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
    scratch = torch.empty(B, scan.layout.scratch, device=deter.device)
    rssm_forward_kernel[(triton.cdiv(B, scan.tiles.rows),)](
        *packed, embed_proj, action if scan.layout.policy is None else drawn, noise, action_noise,
        is_first, deter0, stoch0, policy_proj, deter, stoch, stats0, stats1, operands, reals,
        scratch, T, B, *constants, KEEP=keep, **_options(scan),
    )  # fmt: skip


def backward(
    scan: Scan,
    packed: tuple[Tensor, Tensor],
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
    _, _, noise, action_noise, is_first, deter0, _, _ = inputs
    deter, _, stats0, _, action = results
    T, B, D = deter.shape
    between = torch.empty(B, 2 * D + scan.layout.S + scan.layout.A, device=deter.device)
    scratch = torch.empty(B, scan.layout.scratch, device=deter.device)
    rssm_backward_kernel[(triton.cdiv(B, scan.tiles.rows),)](
        *packed, *grads, noise, action_noise, is_first, deter0, deter, stats0, action,
        operands, reals, gradients, *state_grads, action_grad, between, scratch,
        T, B, unimix, LEARN=learn, **_options(scan),
    )  # fmt: skip


def widths(scan: Scan) -> tuple[int, int]:
    """Numbers a row of the operands and of the float32 values that a forward scan keeps."""
    return aligned(scan.layout.operands), max(scan.layout.reals, 1)
