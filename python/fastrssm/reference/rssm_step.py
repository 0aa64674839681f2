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
    if cell == "block_gru":
        return _recur_in_blocks(deter, stoch, action, weights)
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


def _recur_in_blocks(deter: Tensor, stoch: Tensor, action: Tensor, weights: RSSMWeights) -> Tensor:
    """DreamerV3: state, latent and action enter by a layer each, and each block reads them all."""
    *branches, mix = weights.branches
    blocks = mix.weight.shape[0]
    # an action beyond its bounds counts as one on them
    action = action / action.detach().abs().clamp_min(1.0)
    pairs = zip((deter, stoch, action), branches, strict=True)
    x = torch.cat([F.silu(_affine(x, layer)) for x, layer in pairs], -1)
    own = deter.unflatten(-1, (blocks, -1))
    x = torch.cat((own, x.unsqueeze(-2).expand(-1, blocks, -1)), -1)
    x = F.silu(_norm(_affine_in_blocks(x, mix).flatten(-2), mix))
    gates = _affine_in_blocks(x.unflatten(-1, (blocks, -1)), weights.cell_input)
    return gru_cell(gates.flatten(-2), deter, cell="block_gru", blocks=blocks)


def _affine_in_blocks(x: Tensor, layer: Layer) -> Tensor:
    """[B, blocks, in] -> [B, blocks, out], a matrix for each block; the norm is left out."""
    assert layer.bias is not None
    y = torch.baddbmm(layer.bias.unsqueeze(1), x.transpose(0, 1), layer.weight.mT)
    return y.transpose(0, 1)


def _affine(x: Tensor, layer: Layer, offset: Tensor | None = None) -> Tensor:
    weight, bias = layer.weight, layer.bias
    y = F.linear(x, weight, bias) if offset is None else torch.addmm(offset, x, weight.mT)
    return _norm(y, layer)


def _norm(y: Tensor, layer: Layer) -> Tensor:
    """Normalise [B, out]: LayerNorm with eps 1e-5, RMS norm with eps 1e-4, or not at all."""
    if layer.scale is None:
        return y
    scale = layer.scale.flatten()
    if layer.shift is None:
        return F.rms_norm(y, scale.shape, scale, 1e-4)
    return F.layer_norm(y, scale.shape, scale, layer.shift)
