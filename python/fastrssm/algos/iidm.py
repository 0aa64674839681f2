"""IIDM: imitation by a forward model of single steps, an ablation of AIME without latent state.

First a forward model learns, from data of the body with actions, which frame k frames and an action
lead to. Then a policy learns to act so that the model predicts the expert's next frame.

Source: the baseline of Zhang et al. 2023 (AIME, OpenReview WjlCQxpuxU), appendix.

Differences from the original code:
- episodes, not windows, are divided into those to train on and those to validate on: overlapping
  windows on both sides would leak (`--split window` is the original's);
- evaluation happens at the end only; the original runs one episode after every epoch of the policy.

The best weights are kept as "forward" and "policy", those of the last epoch with "_last".
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrssm.envs import find_task
from fastrssm.models.nets import MLP
from fastrssm.run.early_stopping import (
    BaselineArgs,
    Fit,
    Stage,
    check_baseline,
    read_stacks,
    stacked,
    train_stages,
)
from fastrssm.run.stack_agent import build_policy, sizes
from fastrssm.run.start import open_run


@dataclass(frozen=True, kw_only=True)
class Args(BaselineArgs):
    """Imitate demonstrations without actions through a forward model of single steps (IIDM)."""

    body: str
    """Folder of episodes with actions, by any policy of the same body."""
    max_body_episodes: int | None = None
    """Use the first so many of these; left out: all."""


class ForwardModel(nn.Module):
    """One network per sensor: [B, k * E + A] -> the next frame."""

    def __init__(self, in_size: int, sensors: Mapping[str, int]) -> None:
        """Build the networks for the sizes of the sensors."""
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: MLP(in_size, size, width=128, depth=2) for name, size in sensors.items()}
        )

    def forward(self, stack: Tensor, action: Tensor) -> dict[str, Tensor]:
        """[B, k * E] and [B, A] -> [B, size] per sensor."""
        x = torch.cat((stack, action), -1)
        return {name: head(x) for name, head in self.heads.items()}


def prediction_loss(
    model: nn.Module,
    batch: dict[str, Tensor],
    sensors: tuple[str, ...],
    action: Tensor | None = None,
) -> Tensor:
    """Return the mean squared errors of the last frame, summed over the sensors.

    Args:
        model: a forward model.
        batch: [k + 1, B, size] per sensor, and "pre_action" [k + 1, B, A] unless action is given.
        sensors: what the model sees and predicts, in order.
        action: [B, A] that leads to the last frame. None: the true one.
    """
    seen = {name: batch[name][:-1] for name in sensors}
    predicted = model(stacked(seen, sensors), batch["pre_action"][-1] if action is None else action)
    errors = [F.mse_loss(predicted[name], batch[name][-1]) for name in sensors]
    return torch.stack(errors).sum()


def imitation_loss(
    policy: nn.Module, batch: dict[str, Tensor], sensors: tuple[str, ...], model: nn.Module
) -> Tensor:
    """Return the same error for the actions of a policy.

    Args:
        policy: [B, k * E] -> [B, A].
        batch: [k + 1, B, size] per sensor.
        sensors: what the policy sees, in order.
        model: the trained, frozen forward model; the gradient flows through it.
    """
    seen = {name: batch[name][:-1] for name in sensors}
    return prediction_loss(model, batch, sensors, policy(stacked(seen, sensors)))


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
    open_run(Path(args.out), "iidm", asdict(args))
    torch.manual_seed(args.seed)
    E, A = sizes(args.env, args.setup)
    widths = {name: size for name, size, _ in find_task(args.env).sensors if name in sensors}
    model = Fit("forward", ForwardModel(k * E + A, widths).to(device), args.lr)
    model.best.requires_grad_(False)
    policy = Fit("policy", build_policy(args.env, args.setup).to(device), args.lr)
    stages = (
        Stage(model, lambda net, batch: prediction_loss(net, batch, sensors), *body),
        Stage(policy, lambda net, batch: imitation_loss(net, batch, sensors, model.best), *shown),
    )
    train_stages("iidm", args, stages)
