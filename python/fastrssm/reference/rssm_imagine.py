"""Prior states along given actions."""

import torch
from torch import Tensor

from fastrssm.reference.gru_cell import Cell
from fastrssm.reference.rssm_step import draw, head_stats, recur
from fastrssm.reference.rssm_weights import Heads, Latent, RSSMWeights, Trajectory


def rssm_imagine(
    action: Tensor,
    noise: Tensor,
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
    """Roll the prior forward: states given actions, without observations.

    Args:
        action: [T, B, A] action that leads to the state at t.
        noise: [T, B, S] standard normal; categorical: [T, B, G] uniform in [0, 1).
        deter0: [B, D] state before the first step.
        stoch0: [B, S] the same.
        weights: `head` is the prior's.
        cell: as in rssm_observe, like the options below.
        heads: as there.
        latent: as there.
        min_std: as there.
        groups: as there.
        unimix: as there.

    Returns:
        States, and the statistics of the prior.

    Source:
        PlaNet (1811.04551) eq. 3.
    """
    deter, stoch, steps = deter0, stoch0, []
    for t in range(action.shape[0]):
        deter = recur(deter, stoch, action[t], weights, cell)
        stats = head_stats(
            deter, weights.head, None, heads=heads, latent=latent, min_std=min_std, groups=groups
        )
        stoch = draw(stats, noise[t], latent=latent, unimix=unimix)
        steps.append((deter, stoch, *stats))
    deters, stochs, *stacked = (torch.stack(x) for x in zip(*steps, strict=True))
    return Trajectory(deters, stochs, tuple(stacked))
