"""Reference of mlp."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fastrssm.reference.rssm_weights import Layer


def mlp(
    x: Tensor, nets: Sequence[tuple[Layer, ...]], *, activate_last: bool = False
) -> tuple[Tensor, ...]:
    """Specification; arguments and results as in `fastrssm.ops.mlp`."""
    results: list[Tensor] = []
    for layers in nets:
        y = x
        for i, (weight, bias, scale, shift) in enumerate(layers):
            y = F.linear(y, weight, bias)
            if i + 1 == len(layers) and not activate_last:
                break
            if scale is None:
                y = F.elu(y)
            elif shift is None:
                y = F.silu(F.rms_norm(y, scale.shape, scale, 1e-4))
            else:
                y = F.silu(F.layer_norm(y, scale.shape, scale, shift))
        results.append(y)
    return tuple(results)
