"""Prior states, with the actions drawn from a policy in the loop."""

import torch
from torch import Tensor

from fastrssm.reference.gru_cell import Cell
from fastrssm.reference.rssm_step import draw, draw_action, head_stats, recur
from fastrssm.reference.rssm_weights import (
    Heads,
    Latent,
    PolicyTrajectory,
    PolicyWeights,
    RSSMWeights,
)


def rssm_imagine_policy(
    noise: Tensor,
    action_noise: Tensor,
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
    detach_policy_input: bool = False,
) -> PolicyTrajectory:
    """Roll the prior forward under a policy.

    Args:
        noise: [T, B, S] standard normal; categorical: [T, B, G] uniform in [0, 1).
        action_noise: [T, B, A] standard normal.
        deter0: [B, D] state before the first step.
        stoch0: [B, S] the same.
        weights: `head` is the prior's.
        policy: as in rssm_observe_policy.
        cell: as in rssm_observe, like the options below.
        heads: as there.
        latent: as there.
        min_std: as there.
        groups: as there.
        unimix: as there.
        action_min_std: added to the policy's standard deviation.
        detach_policy_input: gradients run through the actions and the dynamics, but not through
            what the policy sees (Dreamer).

    Returns:
        States after each action, the statistics of the prior, and the actions.

    Source:
        Dreamer (1912.01603), section 3.
    """
    deter, stoch, steps = deter0, stoch0, []
    for t in range(noise.shape[0]):
        action = draw_action(
            deter, stoch, action_noise[t], policy, None, action_min_std, detach_policy_input
        )
        deter = recur(deter, stoch, action, weights, cell)
        stats = head_stats(
            deter, weights.head, None, heads=heads, latent=latent, min_std=min_std, groups=groups
        )
        stoch = draw(stats, noise[t], latent=latent, unimix=unimix)
        steps.append((deter, stoch, action, *stats))
    deters, stochs, actions, *stacked = (torch.stack(x) for x in zip(*steps, strict=True))
    return PolicyTrajectory(deters, stochs, tuple(stacked), actions)
