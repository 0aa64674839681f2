"""Supervised training of the baselines: shuffled epochs until the validation loss stops falling."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastrssm.data import Dataset, FrameStacks
from fastrssm.data.sampler import Split
from fastrssm.run.checkpoint import resume, save_checkpoint, write_atomic
from fastrssm.run.evaluate import EVAL_SEED_OFFSET, evaluate
from fastrssm.run.log import Logger
from fastrssm.run.stack_agent import STACK, StackAgent, StackPolicy, inputs
from fastrssm.run.start import check_arguments, choose_device

# network and batch [k + 1, B, size] -> loss
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class BaselineArgs:
    """Arguments that all baselines share."""

    data: str
    """Folder of expert episodes."""
    out: str
    """Run folder. An existing one is resumed."""
    env: str
    """Task, for example walker-walk."""
    setup: Literal["mdp", "lpomdp"] = "mdp"
    """What the policy sees: all sensors (mdp), or the positions of the last 5 frames (lpomdp)."""
    max_episodes: int = 100
    """Use the first so many expert episodes."""
    train_share: float = 0.7
    """Share of the data to train on; the rest tells when to stop."""
    split: Split = "episode"
    """Divide whole episodes, or windows as published, although those of both sides overlap."""
    batch_size: int = 50
    """Windows in a batch."""
    lr: float = 1e-3
    """Learning rate of Adam."""
    min_epochs: int = 50
    """Passes over the data before a network may stop."""
    min_updates: int = 5000
    """Gradient steps before a network may stop."""
    max_epochs: int = 1000
    """Passes over the data after which a network stops in any case."""
    patience: int = 3
    """Epochs without a better validation loss after which it stops."""
    seed: int = 42
    """Of the initial weights, the division of the data and the order of the windows."""
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


class Fit:
    """One network on the way to its best validation loss.

    Attributes:
        name: of the network.
        network: as after the last update.
        best: as after the best epoch.
        epoch: passes over the data so far.
        updates: gradient steps so far.
        best_epoch: the epoch with the smallest validation loss.
        best_loss: that loss.
    """

    def __init__(self, name: str, network: nn.Module, lr: float) -> None:
        """Start with a fresh network; its name is that in checkpoints and metrics."""
        self.name, self.network, self.best = name, network, copy.deepcopy(network)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=lr, fused=True)
        self.epoch = self.updates = self.best_epoch = 0
        self.best_loss = float("inf")

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Give both networks by the suffix of their names in checkpoints."""
        return {"": self.best, "_last": self.network}

    def is_done(self, args: BaselineArgs) -> bool:
        """Tell whether it may stop, or must."""
        improving = self.epoch - self.best_epoch < args.patience
        early = self.epoch < args.min_epochs or self.updates < args.min_updates
        return self.epoch >= args.max_epochs or not (improving or early)

    def run_epoch(
        self, loss: Loss, training: FrameStacks, validation: FrameStacks, args: BaselineArgs
    ) -> tuple[list[Tensor], float]:
        """Pass over the data once; returns the losses of the batches and the validation loss."""
        losses: list[Tensor] = []
        for batch in training.epoch(self.epoch, args.batch_size, args.seed):
            error = loss(self.network, batch)
            self.optimizer.zero_grad(set_to_none=True)
            error.backward()
            self.optimizer.step()
            losses.append(error.detach())
        self.epoch += 1
        self.updates += len(losses)
        error = mean_loss(loss, self.network, validation)
        if error < self.best_loss:
            self.best_epoch, self.best_loss = self.epoch, error
            self.best.load_state_dict(self.network.state_dict())
        return losses, error

    def state_dict(self) -> dict[str, Any]:
        """Give all but the weights, which are in `network` and `best`."""
        counts = ("epoch", "updates", "best_epoch", "best_loss")
        return {
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in counts},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        for name, value in state.items():
            if name == "optimizer":
                self.optimizer.load_state_dict(value)
            else:
                setattr(self, name, value)


@torch.no_grad()
def mean_loss(loss: Loss, network: nn.Module, windows: FrameStacks) -> float:
    """Return the mean loss over all windows."""
    total = torch.zeros((), dtype=torch.float64)
    for batch in windows.epoch(0, 4096):
        size = next(iter(batch.values())).shape[1]
        total += loss(network, batch).cpu() * size
    return float(total) / len(windows)


class Stage(NamedTuple):
    """A network and what it learns from; the loss may use the best of earlier stages."""

    fit: Fit
    loss: Loss
    training: FrameStacks
    validation: FrameStacks


def check_baseline(args: BaselineArgs) -> tuple[torch.device, tuple[str, ...], int]:
    """Refuse arguments out of their range.

    Returns:
        The device, the sensors that the policy sees in order, and k, how many frames of them.

    Raises:
        ValueError: an argument is out of its range.
        RuntimeError: the device is not available.
    """
    check_arguments(
        args,
        positive=("batch_size", "lr", "max_epochs", "patience", "checkpoint_every"),
        not_negative=("min_epochs", "min_updates", "seed", "threads", "final_episodes"),
        shares=("train_share",),
    )
    sensors = inputs(args.env, args.setup)
    return choose_device(args.device, args.threads), sensors, STACK[args.setup]


def read_stacks(
    folder: str,
    columns: tuple[str, ...],
    args: BaselineArgs,
    device: torch.device,
    max_episodes: int | None,
) -> tuple[FrameStacks, FrameStacks]:
    """Give the windows of k + 1 frames of a folder to train on, and those to validate on.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: its episodes do not fit, or cannot be divided.
    """
    dataset = Dataset.open(folder, columns, max_episodes)
    return FrameStacks.split(
        dataset, STACK[args.setup] + 1,
        train_share=args.train_share, by=args.split, seed=args.seed, device=device,
    )  # fmt: skip


def train_stages(algorithm: str, args: BaselineArgs, stages: Sequence[Stage]) -> None:
    """Train one network after the other, from the start or the last checkpoint, and evaluate.

    Args:
        algorithm: name in the checkpoints.
        args: checked ones; the folder is open.
        stages: the last one's network is the policy.

    Raises:
        ValueError: the folder holds another run, or a loss is not finite.
    """
    out, shown = Path(args.out), asdict(args)
    fits = [stage.fit for stage in stages]
    modules = {f"{fit.name}{last}": net for fit in fits for last, net in fit.networks.items()}
    if state := resume(out, algorithm, modules):
        for fit in fits:
            fit.load_state_dict(state[fit.name])

    def save() -> None:
        save_checkpoint(
            out,
            sum(fit.epoch for fit in fits),
            algorithm=algorithm,
            config={"args": shown},
            modules=modules,
            train_state={fit.name: fit.state_dict() for fit in fits},
        )

    total, start = args.max_epochs * len(fits), sum(fit.epoch for fit in fits)
    with Logger(out, total, start=start, unit="epoch", config=shown, wandb=args.wandb) as logger:
        for stage, later in zip(stages, [*fits[1:], None], strict=True):
            fit, name = stage.fit, stage.fit.name
            # what a later network has begun to learn from does not change any more
            if later is not None and later.epoch:
                continue
            logger.say(
                f"{algorithm}: {name}, {len(stage.training)} windows to train on, "
                f"{len(stage.validation)} to validate on, from epoch {fit.epoch}"
            )
            while not fit.is_done(args):
                losses, error = fit.run_epoch(stage.loss, stage.training, stage.validation, args)
                epoch = sum(fit.epoch for fit in fits)
                for value in losses:
                    logger.add({f"{name}_train_loss": value})
                logger.write(epoch)
                logger.record(
                    epoch,
                    {f"{name}_validation_loss": error, f"{name}_best_epoch": fit.best_epoch},
                )
                if fit.epoch % args.checkpoint_every == 0 or fit.is_done(args):
                    save()
        policy = fits[-1].best
        assert isinstance(policy, StackPolicy)
        if args.final_episodes:
            seed = args.seed + EVAL_SEED_OFFSET
            agent = StackAgent(policy, inputs(args.env, args.setup), STACK[args.setup])
            result = evaluate(agent, args.env, args.final_episodes, seed=seed)
            write_atomic(out / "eval.json", json.dumps(result.to_dict()).encode())
            score = "unknown" if result.score is None else f"{result.score:.1f}"
            logger.say(f"final return {result.mean:.1f} +- {result.std:.1f}, score {score}")


def stacked(batch: dict[str, Tensor], sensors: tuple[str, ...]) -> Tensor:
    """Return the frames of a batch side by side: [k, B, size] per sensor -> [B, k * E]."""
    frames = torch.cat([batch[name] for name in sensors], -1)
    return frames.transpose(0, 1).flatten(1)
