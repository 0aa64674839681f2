"""Plan2Explore as AIME's exploration buffers were made with: go where predictors disagree.

The replay, in the folder `episodes` of the run, is a dataset like any other: the body's
"plan2explore buffer". No reward of the task is used.

Source: Sekar et al. 2020 (Plan2Explore, 2005.05960), with the constants of Zhang et al. 2023 (AIME,
OpenReview WjlCQxpuxU), version 1: the reward is the mean over the embedding of the logarithm of the
variance over five predictors; no target network, no discount head, and no noise on actions unless
`action_noise` asks for it.

Differences from the original code:
- the default setup is `mdp` (the original collects with `visual`, so that images are stored);
- several environments may collect between two rounds of updates (`num_envs`), each with as many
  updates as one has in the original, so that the replay ratio stays;
- actions are rounded to 1/127 of their range, so that a tape keeps the episodes (`data tape`);
- the gradient of the policy's loss is not computed for the world model, the predictors and the
  value network, which throw it away;
- no evaluation; the returns of the collected episodes are recorded;
- a run can be stopped and resumed, and gives the same weights and episodes as one that was not.

`--scale cpu` is what two cores do in about an hour: see `fastrssm.run.online`; its predictors have
a width of 128 instead of 1,024.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrssm.models.behaviour import Imagined
from fastrssm.models.ensemble import Ensemble
from fastrssm.models.rssm import State
from fastrssm.models.world_model import WorldModel
from fastrssm.run.online import (
    CPU_SCALE,
    Batch,
    Learner,
    OnlineArgs,
    build_learner,
    check_online,
    learn_behaviour,
    learn_online,
)
from fastrssm.run.start import choose_device, open_run
from fastrssm.run.step import take_step

SCALES: dict[str, dict[str, Any]] = {"paper": {}, "cpu": {**CPU_SCALE, "ensemble_width": 128}}


@dataclass(frozen=True, kw_only=True)
class Args(OnlineArgs):
    """Explore a body without a task, where an ensemble of predictors disagrees (Plan2Explore)."""

    ensemble: int = 5
    """Predictors of the next embedding."""
    ensemble_width: int = 1024
    """Width of their two hidden layers."""


def update(
    learner: Learner, args: Args, batch: Batch, noise: torch.Generator, acting: bool
) -> dict[str, Tensor]:
    """Take one gradient step of world model and predictors, and one of policy and value each.

    Args:
        learner: with the predictors as "ensemble"; changed in place.
        args: of imagination and losses.
        batch: [T, B, size] per sensor, and "pre_action" [T, B, A].
        noise: generator of all noise.
        acting: False: the world model and the predictors only.

    Returns:
        Scalars on the modules' device: losses, metrics, and norms of gradients before clipping.
    """
    world_model: WorldModel = learner.modules["world_model"]
    ensemble: Ensemble = learner.modules["ensemble"]
    # the states of the model's loss train the predictors and start imagination
    filtered = world_model.filter(batch, generator=noise)
    losses, metrics = world_model.elbo(batch, filtered=filtered)
    seen = State(filtered.states.deter.detach(), filtered.states.stoch.detach())
    error = ensemble.loss(seen.feature, batch["pre_action"], filtered.embed.detach())
    metrics["emb_prediction_loss"] = error.detach()
    probes = world_model.probes.parameters()
    metrics["model_grad_norm"] = take_step(
        learner.optimizers["model"], losses["total"] + error, args.grad_clip, probes
    )
    if not acting:
        return metrics

    def reward(imagined: Imagined) -> Tensor:
        return ensemble.disagreement(imagined.feature[:-1], imagined.action)

    return metrics | learn_behaviour(learner, args, seen, reward, noise)


def train(args: Args) -> None:
    """Explore from the start or from the last checkpoint of `args.out` to the last episode.

    Raises:
        ValueError: an argument is out of its range, or the folder holds another run.
        RuntimeError: the device is not available.
    """
    config = check_online(args)
    device = choose_device(args.device, args.threads, args.matmul_precision)
    if args.ensemble < 2 or args.ensemble_width < 1:
        raise ValueError(
            f"--ensemble is {args.ensemble} and --ensemble-width {args.ensemble_width}, "
            "expected at least 2 and 1"
        )
    open_run(Path(args.out), "plan2explore", asdict(args))

    torch.manual_seed(args.seed)
    inputs = config.feature_size + config.action_size
    ensemble = Ensemble(
        inputs, config.embed_size, members=args.ensemble, width=args.ensemble_width
    )  # fmt: skip
    learner = build_learner(args, config, device, ensemble=ensemble)
    learn_online("plan2explore", args, learner, partial(update, learner, args), device)
