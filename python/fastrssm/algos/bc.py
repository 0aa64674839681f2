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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrssm.data import Dataset
from fastrssm.data.sampler import FrameStacks
from fastrssm.envs import find_task
from fastrssm.models.nets import MLP
from fastrssm.run.checkpoint import Checkpoint, restore, resume, save_checkpoint, write_atomic
from fastrssm.run.evaluate import EVAL_SEED_OFFSET, evaluate
from fastrssm.run.log import Logger
from fastrssm.run.start import check_arguments, choose_device, open_run

Array = npt.NDArray[Any]

# frames that the policy sees: velocities are hidden in lpomdp, so it needs a few
_STACK = {"mdp": 1, "lpomdp": 5}


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


class Policy(nn.Module):
    """tanh(MLP(stacked frames)): [..., k * E] -> action [..., A] in (-1, 1)."""

    def __init__(self, in_size: int, action_size: int) -> None:
        """Build the network."""
        super().__init__()
        self.mlp = MLP(in_size, action_size, width=128, depth=2)

    def forward(self, stack: Tensor) -> Tensor:
        """[..., k * E] -> [..., A]."""
        return self.mlp(stack).tanh()


class StackAgent:
    """Act with a policy on the last k frames; an episode starts with k copies of its first."""

    def __init__(self, policy: Policy, sensors: tuple[str, ...], stack: int) -> None:
        """Take the policy, the sensors it sees in order, and k."""
        self._policy, self._sensors, self._k = policy, sensors, stack
        self._device = next(policy.parameters()).device
        self._frames = torch.empty(0)

    def reset(self, num_envs: int) -> None:
        """Forget all frames."""
        self._frames = torch.zeros(num_envs, 0, 0)

    @torch.no_grad()
    def act(self, obs: dict[str, Array], is_first: Array, prev_action: Array) -> Array:
        """Return the actions [N, A] for observations [N, size] per sensor."""
        del prev_action
        frame = torch.from_numpy(np.concatenate([obs[name] for name in self._sensors], axis=-1))
        frame = frame.float().unsqueeze(1)
        copies = frame.expand(-1, self._k, -1)
        if self._frames.shape[1:] != copies.shape[1:]:
            self._frames = copies
        else:
            shifted = torch.cat((self._frames[:, 1:], frame), 1)
            first = torch.from_numpy(np.asarray(is_first, bool))[:, None, None]
            self._frames = torch.where(first, copies, shifted)
        return self._policy(self._frames.flatten(1).to(self._device)).cpu().numpy()


def loss(policy: Policy, batch: dict[str, Tensor], sensors: tuple[str, ...]) -> Tensor:
    """Return the mean squared error of the action that leads from the stack to the next frame.

    Args:
        policy: the policy.
        batch: [k + 1, B, size] per sensor, and "pre_action" [k + 1, B, A].
        sensors: what the policy sees, in order.
    """
    frames = torch.cat([batch[name][:-1] for name in sensors], -1)
    return F.mse_loss(policy(frames.transpose(0, 1).flatten(1)), batch["pre_action"][-1])


def update(
    policy: Policy,
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
    sensors, k = inputs(args.env, args.setup), _STACK[args.setup]
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
def validation_loss(policy: Policy, windows: FrameStacks, sensors: tuple[str, ...]) -> float:
    """Return the mean squared error over all windows."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in windows.epoch(0, 4096):
        size = batch["pre_action"].shape[1]
        total += loss(policy, batch, sensors).cpu() * size
    return float(total) / len(windows)


def build_policy(env: str, setup: str) -> Policy:
    """Build a fresh policy for a task and a setup."""
    task = find_task(env)
    sizes = {name: size for name, size, _ in task.sensors}
    width = sum(sizes[name] for name in inputs(env, setup))
    return Policy(_STACK[setup] * width, task.action_size)


def inputs(env: str, setup: str) -> tuple[str, ...]:
    """Name the sensors that the policy of a task sees, in order.

    Raises:
        ValueError: unknown task or setup.
    """
    if setup not in _STACK:
        raise ValueError(f"--setup is {setup!r}, expected one of {', '.join(_STACK)}")
    sensors = find_task(env, "--env").sensors
    return tuple(name for name, _, order in sensors if setup == "mdp" or order == "first")


def load_agent(checkpoint: Checkpoint, seed: int, device: torch.device) -> StackAgent:
    """Rebuild the agent of a run of this algorithm; it draws nothing, so the seed is not used.

    Raises:
        ValueError: the checkpoint is of another model variant.
    """
    del seed
    env, setup = checkpoint.config["args"]["env"], checkpoint.config["args"]["setup"]
    policy = build_policy(env, setup)
    restore(checkpoint, {"policy": policy})
    return StackAgent(policy.to(device), inputs(env, setup), _STACK[setup])
