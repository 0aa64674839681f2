"""Posterior states along observed data, with the actions drawn from a policy in the loop."""

import torch
from torch import Tensor

from fastrssm.reference.gru_cell import Cell
from fastrssm.reference.rssm_step import draw, draw_action, head_stats, recur, reset
from fastrssm.reference.rssm_weights import (
    Heads,
    Latent,
    PolicyTrajectory,
    PolicyWeights,
    RSSMWeights,
)


def rssm_observe_policy(
    embed_proj: Tensor,
    noise: Tensor,
    action_noise: Tensor,
    is_first: Tensor | None,
    deter0: Tensor,
    stoch0: Tensor,
    weights: RSSMWeights,
    policy: PolicyWeights,
    *,
    cell: Cell,
    heads: Heads,
    latent: Latent,
    min_std: float,
    groups: int = 1,
    unimix: float = 0.0,
    action_min_std: float = 1e-6,
    policy_proj: Tensor | None = None,
) -> PolicyTrajectory:
    """Filter a sequence whose actions are inferred by a policy: the states of AIME's objective.

    At each step the policy sees the state before the frame (zero, or reset, at an episode's
    start), not detached: a_t = tanh(m + s * action_noise_t) with (m, s) = policy(deter, stoch).

    Args:
        embed_proj: [T, B, M'] as in rssm_observe.
        noise: [T, B, S] as in rssm_observe.
        action_noise: [T, B, A] standard normal.
        is_first: [T, B] bool or None, as in rssm_observe.
        deter0: [B, D] state before the first step.
        stoch0: [B, S] the same.
        weights: as in rssm_observe.
        policy: mean and std networks on [deter | stoch]; ELU, std = softplus + action_min_std.
        cell: as in rssm_observe, like the options below.
        heads: as there.
        latent: as there.
        min_std: as there.
        groups: as there.
        unimix: as there.
        action_min_std: added to the policy's standard deviation.
        policy_proj: [T, B, 2H] what a policy with further inputs (inverse dynamics) adds to its
            first layer, bias included; the layer then has none. None: no further inputs.

    Returns:
        States, the statistics of the posterior, and the actions.

    Source:
        AIME (OpenReview WjlCQxpuxU) eq. 4 and algorithm 1.
    """
    deter, stoch, steps = deter0, stoch0, []
    for t in range(noise.shape[0]):
        deter, stoch = reset(None if is_first is None else is_first[t], deter, stoch)
        offset = None if policy_proj is None else policy_proj[t]
        action = draw_action(
            deter, stoch, action_noise[t], policy, offset, action_min_std, detach=False
        )
        deter = recur(deter, stoch, action, weights, cell)
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
        steps.append((deter, stoch, action, *stats))
    deters, stochs, actions, *stacked = (torch.stack(x) for x in zip(*steps, strict=True))
    return PolicyTrajectory(deters, stochs, tuple(stacked), actions)
