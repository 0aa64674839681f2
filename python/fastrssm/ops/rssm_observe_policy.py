"""Posterior states along observed data, with the actions drawn from a policy in the loop."""

from torch import Tensor

from fastrssm import reference
from fastrssm._dispatch import Backend
from fastrssm.ops.rssm_scan import Inputs, prepare, scan, stats_of
from fastrssm.reference.gru_cell import Cell
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
    backend: Backend | None = None,
) -> PolicyTrajectory:
    """Filter a sequence whose actions are inferred by a policy: the states of AIME's objective.

    At each step the policy sees the state before the frame (zero, or reset, at an episode's
    start), not detached: a_t = tanh(m + s * action_noise_t) with (m, s) = policy(deter, stoch).

    Dtypes, precision and derivatives are as in rssm_observe.

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
        backend: None picks the fastest one for this device.

    Returns:
        States, the statistics of the posterior, and the actions.

    Raises:
        ValueError: a shape does not fit, an option is unknown or outside its range, or noise
            requires grad (the reference differentiates it).
        TypeError: dtypes differ or are not supported.
        RuntimeError: the requested backend is not available; the message says why.

    Source:
        AIME (OpenReview WjlCQxpuxU) eq. 4 and algorithm 1.
    """
    call = prepare(
        "rssm_observe_policy",
        Inputs(embed_proj, None, noise, action_noise, is_first, deter0, stoch0, policy_proj),
        weights,
        policy,
        cell=cell,
        heads=heads,
        latent=latent,
        groups=groups,
        constants=(min_std, unimix, action_min_std),
        detach=False,
        backend=backend,
    )
    if call.backend == "reference":
        return call.plainly(
            reference.rssm_observe_policy,
            embed_proj, noise, action_noise, is_first, deter0, stoch0, weights, policy,
            cell=cell, heads=heads, latent=latent, min_std=min_std, groups=groups,
            unimix=unimix, action_min_std=action_min_std, policy_proj=policy_proj,
        )  # fmt: skip
    deter, stoch, *stats, action, _ = scan(call)
    return PolicyTrajectory(deter, stoch, stats_of(latent, groups, *stats), action)
