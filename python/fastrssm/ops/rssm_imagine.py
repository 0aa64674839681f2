"""Prior states along given actions."""

from torch import Tensor

from fastrssm import reference
from fastrssm._dispatch import Backend
from fastrssm.ops.rssm_scan import Inputs, prepare, scan, stats_of
from fastrssm.reference.gru_cell import Cell
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
    backend: Backend | None = None,
) -> Trajectory:
    """Roll the prior forward: states given actions, without observations.

    Dtypes, precision and derivatives are as in rssm_observe.

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
        backend: None picks the fastest one for this device.

    Returns:
        States, and the statistics of the prior.

    Raises:
        ValueError: a shape does not fit, an option is unknown or outside its range, or noise
            requires grad (the reference differentiates it).
        TypeError: dtypes differ or are not supported.
        RuntimeError: the requested backend is not available; the message says why.

    Source:
        PlaNet (1811.04551) eq. 3.
    """
    call = prepare(
        "rssm_imagine",
        Inputs(None, action, noise, None, None, deter0, stoch0, None),
        weights,
        None,
        cell=cell,
        heads=heads,
        latent=latent,
        groups=groups,
        constants=(min_std, unimix, 0.0),
        detach=False,
        backend=backend,
    )
    if call.backend == "reference":
        return call.plainly(
            reference.rssm_imagine,
            action, noise, deter0, stoch0, weights,
            cell=cell, heads=heads, latent=latent, min_std=min_std, groups=groups, unimix=unimix,
        )  # fmt: skip
    deter, stoch, *stats, _, _ = scan(call)
    return Trajectory(deter, stoch, stats_of(latent, groups, *stats))
