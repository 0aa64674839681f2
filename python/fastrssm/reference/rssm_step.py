"""What the four RSSM scans share: the parts of one time step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrssm.reference.gru_cell import Cell, gru_cell
from fastrssm.reference.rssm_weights import Heads, Latent, Layer, PolicyWeights, RSSMWeights


def reset(is_first: Tensor | None, deter: Tensor, stoch: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the state by zeros where a new episode begins."""
    if is_first is None:
        return deter, stoch
    first = is_first.unsqueeze(-1)
    return torch.where(first, 0.0, deter), torch.where(first, 0.0, stoch)


def recur(deter: Tensor, stoch: Tensor, action: Tensor, weights: RSSMWeights, cell: Cell) -> Tensor:
    """Advance the deterministic state by one step."""
    x = torch.cat((stoch, action), -1)
    if weights.pre is not None:
        x = F.silu(_affine(x, weights.pre))
    weight, bias, scale, shift = weights.cell_input
    if weights.cell_state is not None:
        # the same arithmetic as the op gru_cell, without a Python call per gate
        w, b = weights.cell_state.weight, weights.cell_state.bias
        return torch.gru_cell(x, deter, weight, w, bias, b)
    gates = F.linear(torch.cat((x, deter), -1), weight, bias)
    return gru_cell(gates, deter, cell=cell, scale=scale, shift=shift)


def head_stats(
    x: Tensor,
    layers: tuple[Layer, ...],
    offset: Tensor | None,
    *,
    heads: Heads,
    latent: Latent,
    min_std: float,
    groups: int,
) -> tuple[Tensor, ...]:
    """Parameters of a distribution from the state [B, in]; `offset` adds to the first layer."""
    y = _affine(x, layers[0], offset)
    if heads == "split":
        y = y.unflatten(-1, (2, -1)).transpose(0, 1)
        for layer in layers[1:]:
            assert layer.bias is not None
            y = torch.baddbmm(layer.bias.unsqueeze(1), F.elu(y), layer.weight.mT)
        return y[0], F.softplus(y[1]) + min_std
    for layer in layers[1:]:
        y = _affine(F.silu(y), layer)
    if latent == "categorical":
        return (y.unflatten(-1, (groups, -1)),)
    mean, raw = y.chunk(2, -1)
    return mean, 2.0 * torch.sigmoid(0.5 * raw) + min_std


def draw(stats: tuple[Tensor, ...], noise: Tensor, *, latent: Latent, unimix: float) -> Tensor:
    """Sample the latent with a gradient to its parameters.

    noise: gaussian: [B, S] standard normal; categorical: [B, G] uniform in [0, 1).
    """
    if latent == "gaussian":
        mean, std = stats
        return torch.addcmul(mean, std, noise)
    (logits,) = stats
    classes = logits.shape[-1]
    probs = (1.0 - unimix) * torch.softmax(logits, -1) + unimix / classes
    # inverse of the cumulative distribution; the clamp covers a total rounded to below 1
    index = (probs.detach().cumsum(-1) <= noise.unsqueeze(-1)).sum(-1).clamp_max(classes - 1)
    one_hot = index.unsqueeze(-1) == torch.arange(classes, device=index.device)
    # in this order the added term is exactly zero, so the value is exactly one-hot
    return (one_hot.to(probs.dtype) + (probs - probs.detach())).flatten(-2)


def draw_action(
    deter: Tensor,
    stoch: Tensor,
    noise: Tensor,
    policy: PolicyWeights,
    offset: Tensor | None,
    min_std: float,
    detach: bool,
) -> Tensor:
    """Sample a = tanh(m + s * noise) from the policy on one state."""
    feature = torch.cat((deter, stoch), -1)
    mean, std = head_stats(
        feature.detach() if detach else feature,
        policy.layers,
        offset,
        heads="split",
        latent="gaussian",
        min_std=min_std,
        groups=1,
    )
    return torch.tanh(torch.addcmul(mean, std, noise))


def _affine(x: Tensor, layer: Layer, offset: Tensor | None = None) -> Tensor:
    weight, bias, scale, shift = layer
    y = F.linear(x, weight, bias) if offset is None else torch.addmm(offset, x, weight.mT)
    return y if scale is None else F.layer_norm(y, scale.shape, scale, shift)
