"""The four GRU cells, from pre-activations to the new state."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Cell = Literal["torch_gru", "ln_gru_a", "ln_gru_d", "block_gru"]


def gru_cell(
    gates: Tensor,
    deter: Tensor,
    *,
    cell: Cell,
    state_gates: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    blocks: int = 1,
) -> Tensor:
    """Advance a GRU state given the products of its weights with input and state.

    Args:
        gates: [..., 3D] pre-activations. torch_gru: W x + b of the input, gate order r, z, n.
            ln_gru_a: W [x, h] + b, order z, r, o. ln_gru_d: W [x, h], order r, c, u.
            block_gru: order r, c, u inside each block of D / blocks units.
        deter: [..., D] the state h.
        cell: which cell.
        state_gates: [..., 3D] W h + b of torch_gru; None for the others.
        scale: [3D] scale of the LayerNorm over the gates, ln_gru_a and ln_gru_d; else None.
        shift: [3D] its shift.
        blocks: number of diagonal blocks of block_gru.

    Returns:
        [..., D] the new state.

    Source:
        torch_gru: Cho et al. 2014 (arXiv 1406.1078) with the reset gate after the product;
        ln_gru_a: AIME-v2 (2404.18896); ln_gru_d: DreamerV2 (2010.02193);
        block_gru: DreamerV3 (2301.04104).
    """
    match cell:
        case "torch_gru":
            assert state_gates is not None
            (xr, xz, xn), (hr, hz, hn) = gates.chunk(3, -1), state_gates.chunk(3, -1)
            z = torch.sigmoid(xz + hz)
            n = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
            return torch.lerp(n, deter, z)
        case "ln_gru_a":
            z, r, o = _norm(gates, scale, shift, 1e-5).chunk(3, -1)
            return torch.lerp(torch.tanh(torch.sigmoid(r) * o), deter, torch.sigmoid(z))
        case "ln_gru_d":
            r, c, u = _norm(gates, scale, shift, 1e-3).chunk(3, -1)
            return torch.lerp(deter, torch.tanh(torch.sigmoid(r) * c), torch.sigmoid(u - 1.0))
        case "block_gru":
            r, c, u = gates.unflatten(-1, (blocks, 3, -1)).unbind(-2)
            h = deter.unflatten(-1, (blocks, -1))
            return torch.lerp(h, torch.tanh(torch.sigmoid(r) * c), torch.sigmoid(u - 1.0)).flatten(
                -2
            )


def _norm(gates: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(gates, gates.shape[-1:], scale, shift, eps)
