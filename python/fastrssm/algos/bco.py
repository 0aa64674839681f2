"""BCO(0), behavioural cloning from observation: infer the actions, then clone them.

First an inverse model learns, from data of the body with actions, which action leads from k frames
to the next. Then it labels the expert's frames, and a policy is cloned from the labels.

Source: Torabi et al. 2018 (1805.01954) with no interaction, as the baseline of Zhang et al. 2023
(AIME, OpenReview WjlCQxpuxU), section 4.

Differences from the original code:
- episodes, not windows, are divided into those to train on and those to validate on: overlapping
  windows on both sides would leak (`--split window` is the original's);
- evaluation happens at the end only; the original runs one episode after every epoch of the policy.

The best weights are kept as "inverse" and "policy", those of the last epoch with "_last".
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrssm.run.early_stopping import (
    BaselineArgs,
    Fit,
    Stage,
    check_baseline,
    read_stacks,
    stacked,
    train_stages,
)
from fastrssm.run.stack_agent import StackPolicy, build_policy, sizes
from fastrssm.run.start import open_run


@dataclass(frozen=True, kw_only=True)
class Args(BaselineArgs):
    """Imitate demonstrations without actions by an inverse model of the body (BCO(0))."""

    body: str
    """Folder of episodes with actions, by any policy of the same body."""
    max_body_episodes: int | None = None
    """Use the first so many of these; left out: all."""


def inverse_loss(model: nn.Module, batch: dict[str, Tensor], sensors: tuple[str, ...]) -> Tensor:
    """Return the mean squared error of the action that led to the last frame.

    Args:
        model: [B, (k + 1) * E] -> [B, A].
        batch: [k + 1, B, size] per sensor, and "pre_action" [k + 1, B, A].
        sensors: what both networks see, in order.
    """
    return F.mse_loss(model(stacked(batch, sensors)), batch["pre_action"][-1])


def clone_loss(
    policy: nn.Module, batch: dict[str, Tensor], sensors: tuple[str, ...], inverse: nn.Module
) -> Tensor:
    """Return the mean squared error to the actions that the inverse model infers.

    Args:
        policy: [B, k * E] -> [B, A].
        batch: [k + 1, B, size] per sensor.
        sensors: what both networks see, in order.
        inverse: the trained model of `inverse_loss`; gets no gradient.
    """
    with torch.no_grad():
        label = inverse(stacked(batch, sensors))
    seen = {name: batch[name][:-1] for name in sensors}
    return F.mse_loss(policy(stacked(seen, sensors)), label)


def train(args: Args) -> None:
    """Train from the start or from the last checkpoint of `args.out` until validation says stop.

    Raises:
        ValueError: an argument is out of its range, the data does not fit, or the folder holds
            another run.
        RuntimeError: the device is not available.
    """
    device, sensors, k = check_baseline(args)
    body = read_stacks(
        args.body, (*sensors, "pre_action"), args, device, args.max_body_episodes
    )  # fmt: skip
    shown = read_stacks(args.data, sensors, args, device, args.max_episodes)
    open_run(Path(args.out), "bco", asdict(args))
    torch.manual_seed(args.seed)
    E, A = sizes(args.env, args.setup)
    inverse = Fit("inverse", StackPolicy((k + 1) * E, A).to(device), args.lr)
    policy = Fit("policy", build_policy(args.env, args.setup).to(device), args.lr)
    stages = (
        Stage(inverse, lambda net, batch: inverse_loss(net, batch, sensors), *body),
        Stage(policy, lambda net, batch: clone_loss(net, batch, sensors, inverse.best), *shown),
    )
    train_stages("bco", args, stages)
