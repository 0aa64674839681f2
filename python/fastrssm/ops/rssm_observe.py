"""Posterior states along observed data."""

from torch import Tensor

from fastrssm import reference
from fastrssm._dispatch import Backend
from fastrssm.ops.rssm_scan import Inputs, prepare, scan, stats_of
from fastrssm.reference.gru_cell import Cell
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
    backend: Backend | None = None,
) -> Trajectory:
    """Filter a sequence: posterior states given actions and observations.

    The embedding's half of the posterior's first layer is projected before the loop; the prior
    does not feed back and is evaluated after it. One dtype for all: float32, float64, or bfloat16
    on the reference. On cpu products of float32 are what torch.set_float32_matmul_precision says
    ("high": three of bfloat16 halves, "medium": bfloat16). Under autocast inputs are cast to
    float32 and products are bfloat16. The result can be differentiated once, noise not at all;
    with backend="reference" both.

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
        backend: None picks the fastest one for this device.

    Returns:
        States, and the statistics of the posterior.

    Raises:
        ValueError: a shape does not fit, an option is unknown or outside its range, or noise
            requires grad (the reference differentiates it).
        TypeError: dtypes differ or are not supported.
        RuntimeError: the requested backend is not available; the message says why.

    Source:
        PlaNet (1811.04551) eq. 3; AIME (OpenReview WjlCQxpuxU).
    """
    call = prepare(
        "rssm_observe",
        Inputs(embed_proj, action, noise, None, is_first, deter0, stoch0, None),
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
            reference.rssm_observe,
            embed_proj, action, noise, is_first, deter0, stoch0, weights,
            cell=cell, heads=heads, latent=latent, min_std=min_std, groups=groups, unimix=unimix,
        )  # fmt: skip
    deter, stoch, *stats, _, _ = scan(call)
    return Trajectory(deter, stoch, stats_of(latent, groups, *stats))
