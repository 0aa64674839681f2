"""Posterior states along observed data."""

import torch
from torch import Tensor

from fastrssm.reference.gru_cell import Cell
from fastrssm.reference.rssm_step import draw, head_stats, recur, reset
from fastrssm.reference.rssm_weights import Heads, Latent, RSSMWeights, Trajectory


def rssm_observe(
    embed_proj: Tensor,
    action: Tensor,
    noise: Tensor,
    is_first: Tensor | None,
    deter0: Tensor,
    stoch0: Tensor,
    weights: RSSMWeights,
    *,
    cell: Cell,
    heads: Heads,
    latent: Latent,
    min_std: float,
    groups: int = 1,
    unimix: float = 0.0,
) -> Trajectory:
    """Filter a sequence: posterior states given actions and observations.

    The embedding's half of the posterior's first layer is projected before the loop; the prior
    does not feed back and is evaluated after it. float32 or float64, one dtype for all.

    Args:
        embed_proj: [T, B, M'] W_e e_t + b, M' = 2M for split heads, M for joint ones.
        action: [T, B, A] action that led to the observation at t.
        noise: [T, B, S] standard normal; categorical: [T, B, G] uniform in [0, 1).
        is_first: [T, B] bool, the state is zeroed before this step; None: never.
        deter0: [B, D] state before the first step.
        stoch0: [B, S] the same.
        weights: `head` is the posterior's, the first layer its deter half without bias.
        cell: GRU variant.
        heads: "split": mean and std networks, ELU, std = softplus + min_std; "joint": one network,
            SiLU, std = 2 sigmoid(x / 2) + min_std.
        latent: "gaussian" or "categorical" (straight-through one-hot; joint heads).
        min_std: added to the standard deviation.
        groups: categorical variables of the latent.
        unimix: share of the uniform distribution in each of them.

    Returns:
        States, and the statistics of the posterior.

    Source:
        PlaNet (1811.04551) eq. 3; AIME (OpenReview WjlCQxpuxU).
    """
    deter, stoch, steps = deter0, stoch0, []
    for t in range(action.shape[0]):
        deter, stoch = reset(None if is_first is None else is_first[t], deter, stoch)
        deter = recur(deter, stoch, action[t], weights, cell)
        stats = head_stats(
            deter,
            weights.head,
            embed_proj[t],
            heads=heads,
            latent=latent,
            min_std=min_std,
            groups=groups,
        )
        stoch = draw(stats, noise[t], latent=latent, unimix=unimix)
        steps.append((deter, stoch, *stats))
    deters, stochs, *stacked = (torch.stack(x) for x in zip(*steps, strict=True))
    return Trajectory(deters, stochs, tuple(stacked))
