"""Prior states, with the actions drawn from a policy in the loop."""

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
    backend: Backend | None = None,
) -> PolicyTrajectory:
    """Roll the prior forward under a policy.

    Dtypes, precision and derivatives are as in rssm_observe.

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
        backend: None picks the fastest one for this device.

    Returns:
        States after each action, the statistics of the prior, and the actions.

    Raises:
        ValueError: a shape does not fit, an option is unknown or outside its range, or noise
            requires grad (the reference differentiates it).
        TypeError: dtypes differ or are not supported.
        RuntimeError: the requested backend is not available; the message says why.

    Source:
        Dreamer (1912.01603), section 3.
    """
    call = prepare(
        "rssm_imagine_policy",
        Inputs(None, None, noise, action_noise, None, deter0, stoch0, None),
        weights,
        policy,
        cell=cell,
        heads=heads,
        latent=latent,
        groups=groups,
        constants=(min_std, unimix, action_min_std),
        detach=detach_policy_input,
        backend=backend,
    )
    if call.backend == "reference":
        return call.plainly(
            reference.rssm_imagine_policy,
            noise, action_noise, deter0, stoch0, weights, policy,
            cell=cell, heads=heads, latent=latent, min_std=min_std, groups=groups,
            unimix=unimix, action_min_std=action_min_std, detach_policy_input=detach_policy_input,
        )  # fmt: skip
    deter, stoch, *stats, action, _ = scan(call)
    return PolicyTrajectory(deter, stoch, stats_of(latent, groups, *stats), action)
