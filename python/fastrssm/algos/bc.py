"""Behavioural cloning: the policy that sees the expert's actions, an upper bound for AIME.

Source: the baseline of Zhang et al. 2023 (AIME, OpenReview WjlCQxpuxU), section 4.

Differences from the original code:
- episodes, not windows, are divided into those to train on and those to validate on: overlapping
  windows on both sides would leak;
- evaluation happens at the end only; the original runs one episode after every epoch.

The best weights are kept as "policy", those of the last epoch as "last".
"""

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrssm.data import Dataset
from fastrssm.data.sampler import FrameStacks
from fastrssm.run.checkpoint import resume, save_checkpoint, write_atomic
from fastrssm.run.evaluate import EVAL_SEED_OFFSET, evaluate
from fastrssm.run.log import Logger
from fastrssm.run.stack_agent import STACK, StackAgent, StackPolicy, build_policy, inputs
from fastrssm.run.start import check_arguments, choose_device, open_run


@dataclass(frozen=True, kw_only=True)
class Args:
    """Clone a policy from episodes with actions (behavioural cloning)."""

    data: str
    """Folder of expert episodes with actions."""
    out: str
    """Run folder. An existing one is resumed."""
    env: str
    """Task, for example walker-walk."""
    setup: Literal["mdp", "lpomdp"] = "mdp"
    """What the policy sees: all sensors (mdp), or the positions of the last 5 frames (lpomdp)."""
    max_episodes: int = 100
    """Use the first so many episodes."""
    train_share: float = 0.7
    """Share of the episodes to train on; the others tell when to stop."""
    batch_size: int = 50
    """Windows in a batch."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    min_epochs: int = 50
    """Passes over the data before it may stop."""
    max_epochs: int = 1000
    """Passes over the data after which it stops in any case."""
    patience: int = 3
    """Epochs without a better validation loss after which it stops."""
    seed: int = 42
    """Of the initial weights, the division of the episodes and the order of the windows."""
    device: str = "cpu"
    """cpu, cuda or cuda:<n>."""
    threads: int = 0
    """CPU threads of PyTorch; 0: its own choice."""
    checkpoint_every: int = 1
    """Epochs between two checkpoints."""
    final_episodes: int = 100
    """Episodes of the evaluation at the end, written to eval.json; 0: none."""
    wandb: bool = False
    """Send the records to Weights & Biases as well."""


def loss(policy: StackPolicy, batch: dict[str, Tensor], sensors: tuple[str, ...]) -> Tensor:
    """Return the mean squared error of the action that leads from the stack to the next frame.

    Args:
        policy: the policy.
        batch: [k + 1, B, size] per sensor, and "pre_action" [k + 1, B, A].
        sensors: what the policy sees, in order.
    """
    frames = torch.cat([batch[name][:-1] for name in sensors], -1)
    return F.mse_loss(policy(frames.transpose(0, 1).flatten(1)), batch["pre_action"][-1])


def update(
    policy: StackPolicy,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    sensors: tuple[str, ...],
) -> dict[str, Tensor]:
    """Take one gradient step on a batch; returns {"train_loss"}."""
    error = loss(policy, batch, sensors)
    optimizer.zero_grad(set_to_none=True)
    error.backward()
    optimizer.step()
    return {"train_loss": error}


def train(args: Args) -> None:
    """Train from the start or from the last checkpoint of `args.out` until validation says stop.

    Raises:
        ValueError: an argument is out of its range, the data does not fit, or the folder holds
            another run.
        RuntimeError: the device is not available.
    """
    check_arguments(
        args,
        positive=("batch_size", "lr", "max_epochs", "patience", "checkpoint_every"),
        not_negative=("min_epochs", "seed", "threads", "final_episodes"),
        shares=("train_share",),
    )
    device = choose_device(args.device, args.threads)
    sensors, k = inputs(args.env, args.setup), STACK[args.setup]
    dataset = Dataset.open(args.data, (*sensors, "pre_action"), args.max_episodes)
    training, validation = FrameStacks.split(
        dataset, k + 1, train_share=args.train_share, seed=args.seed, device=device
    )
    out = Path(args.out)
    open_run(out, "bc", asdict(args))

    torch.manual_seed(args.seed)
    policy = build_policy(args.env, args.setup).to(device)
    best = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr, fused=True)
    modules = {"policy": best, "last": policy}
    epoch, best_epoch, best_loss = 0, 0, float("inf")
    if state := resume(out, "bc", modules):
        optimizer.load_state_dict(state["optimizer"])
        epoch, best_epoch, best_loss = state["step"], state["best_epoch"], state["best_loss"]

    def save(epoch: int) -> None:
        save_checkpoint(
            out,
            epoch,
            algorithm="bc",
            config={"args": asdict(args)},
            modules=modules,
            train_state={
                "optimizer": optimizer.state_dict(),
                "best_epoch": best_epoch,
                "best_loss": best_loss,
            },
        )

    shown = asdict(args)
    with Logger(
        out, args.max_epochs, start=epoch, unit="epoch", config=shown, wandb=args.wandb
    ) as logger:
        logger.say(
            f"bc: {len(training)} windows to train on, {len(validation)} to validate on, "
            f"from epoch {epoch}"
        )
        while epoch < args.max_epochs and (
            epoch < args.min_epochs or epoch - best_epoch < args.patience
        ):
            for batch in training.epoch(epoch, args.batch_size, args.seed):
                logger.add(update(policy, optimizer, batch, sensors))
            epoch += 1
            error = validation_loss(policy, validation, sensors)
            if error < best_loss:
                best_epoch, best_loss = epoch, error
                best.load_state_dict(policy.state_dict())
            logger.write(epoch)
            logger.record(epoch, {"validation_loss": error, "best_epoch": best_epoch})
            if epoch % args.checkpoint_every == 0:
                save(epoch)
        save(epoch)
        if args.final_episodes:
            seed = args.seed + EVAL_SEED_OFFSET
            result = evaluate(
                StackAgent(best, sensors, k), args.env, args.final_episodes, seed=seed
            )
            write_atomic(out / "eval.json", json.dumps(result.to_dict()).encode())
            score = "unknown" if result.score is None else f"{result.score:.1f}"
            logger.say(f"final return {result.mean:.1f} +- {result.std:.1f}, score {score}")


@torch.no_grad()
def validation_loss(policy: StackPolicy, windows: FrameStacks, sensors: tuple[str, ...]) -> float:
    """Return the mean squared error over all windows."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in windows.epoch(0, 4096):
        size = batch["pre_action"].shape[1]
        total += loss(policy, batch, sensors).cpu() * size
    return float(total) / len(windows)
