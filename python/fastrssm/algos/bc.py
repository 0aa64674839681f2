"""Behavioural cloning: the policy that sees the expert's actions, an upper bound for AIME.

Source: the baseline of Zhang et al. 2023 (AIME, OpenReview WjlCQxpuxU), section 4.

Differences from the original code:
- episodes, not windows, are divided into those to train on and those to validate on: overlapping
  windows on both sides would leak (`--split window` is the original's);
- evaluation happens at the end only; the original runs one episode after every epoch.

The best weights are kept as "policy", those of the last epoch as "policy_last".
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
from fastrssm.run.stack_agent import build_policy
from fastrssm.run.start import open_run


@dataclass(frozen=True, kw_only=True)
class Args(BaselineArgs):
    """Clone a policy from episodes with actions (behavioural cloning)."""

    min_updates: int = 0
    """Gradient steps before the policy may stop."""


def loss(policy: nn.Module, batch: dict[str, Tensor], sensors: tuple[str, ...]) -> Tensor:
    """Return the mean squared error of the action that leads from the stack to the next frame.

    Args:
        policy: [B, k * E] -> [B, A].
        batch: [k + 1, B, size] per sensor, and "pre_action" [k + 1, B, A].
        sensors: what the policy sees, in order.
    """
    seen = {name: batch[name][:-1] for name in sensors}
    return F.mse_loss(policy(stacked(seen, sensors)), batch["pre_action"][-1])


def train(args: Args) -> None:
    """Train from the start or from the last checkpoint of `args.out` until validation says stop.

    Raises:
        ValueError: an argument is out of its range, the data does not fit, or the folder holds
            another run.
        RuntimeError: the device is not available.
    """
    device, sensors, _ = check_baseline(args)
    data = read_stacks(args.data, (*sensors, "pre_action"), args, device, args.max_episodes)
    open_run(Path(args.out), "bc", asdict(args))
    torch.manual_seed(args.seed)
    policy = Fit("policy", build_policy(args.env, args.setup).to(device), args.lr)
    stage = Stage(policy, lambda network, batch: loss(network, batch, sensors), *data)
    train_stages("bc", args, (stage,))
