"""Phase 1 of AIME: fit a world model to sequences with actions by maximising their evidence.

Source: Zhang et al. 2023 (AIME, OpenReview WjlCQxpuxU), section 3.1; defaults are those of its
appendix.

Differences from the original code:
- the default setup is `mdp` (the original renders images by default);
- one update is the unit of everything; the original counts epochs of 100 updates (1,000 epochs);
- the gradient of the probes is clipped by itself (in the original it can fill the common norm, so
  that the model's own spikes pass the clip);
- a run can be stopped and resumed, and gives the same weights as one that was not stopped;
- the prediction error is measured on windows drawn by a sampler of its own, not on the last batch.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fastrssm.data import Dataset, WindowSampler
from fastrssm.models.config import TERMINAL, Preset
from fastrssm.models.rssm import State
from fastrssm.models.world_model import WorldModel
from fastrssm.run.checkpoint import resume, save_checkpoint
from fastrssm.run.log import Logger
from fastrssm.run.start import (
    MatmulPrecision,
    Sizes,
    build_config,
    check_arguments,
    choose_device,
    open_run,
)
from fastrssm.run.step import Rule, build_optimizer, check_rule, set_learning_rate, take_step

# frames that are filtered before the rest of a window is imagined, as in the original
_CONTEXT = 10


@dataclass(frozen=True, kw_only=True)
class Args:
    """Fit a world model to a folder of episodes with actions (phase 1 of AIME)."""

    data: str
    """Folder of episodes; `fastrssm data make` writes one."""
    out: str
    """Run folder. An existing one is resumed."""
    env: str
    """Task of the embodiment, for example walker-walk: it names the sensors and the actions."""
    setup: Literal["mdp", "lpomdp"] = "mdp"
    """What the model sees: all sensors (mdp), or positions only (lpomdp)."""
    preset: Preset = "rssm"
    """World model of the paper (rssm for walker, rssmo for cheetah), or of its second version."""
    rssm: Sizes = field(default_factory=Sizes)
    """Sizes that replace those of the preset."""
    idm: bool = True
    """Learn an inverse dynamics model beside, which `aime --use-idm` needs."""
    updates: int = 100_000
    """Gradient steps."""
    batch_size: int = 50
    """Windows in a batch."""
    horizon: int = 50
    """Frames in a window."""
    optimizer: Rule = "adam"
    """Adam, as published; or Muon for matrices and Adam for the rest: with --lr 0.01 that gets as
    far in a fraction of the updates."""
    lr: float = 3e-4
    """Learning rate."""
    lr_decay: float = 0.0
    """Share of the updates, at the end, over which the learning rate falls to 0; 0: constant."""
    weight_decay: float = 0.0
    """Share by which a step of learning rate 1 would shrink all parameters. With Muon, 0.3 keeps
    the model sober about states that the data lacks."""
    grad_clip: float = 100.0
    """Largest norm of the gradient of all parameters together."""
    max_episodes: int | None = None
    """Use only the first so many episodes."""
    seed: int = 42
    """Of the initial weights, the batches and the noise."""
    device: str = "cpu"
    """cpu, cuda or cuda:<n>."""
    threads: int = 0
    """CPU threads of PyTorch; 0: its own choice."""
    matmul_precision: MatmulPrecision = "highest"
    """Of float32 products: medium is faster where the processor has bfloat16 units."""
    log_every: int = 100
    """Updates between two records."""
    checkpoint_every: int = 1000
    """Updates between two checkpoints."""
    eval_every: int = 5000
    """Updates between two measurements of the prediction error; 0: never."""
    wandb: bool = False
    """Send the records to Weights & Biases as well."""


def update(
    world_model: WorldModel,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    generator: torch.Generator,
    *,
    grad_clip: float,
) -> dict[str, Tensor]:
    """Take one gradient step on the negative evidence bound of a batch.

    Args:
        world_model: the model, changed in place.
        optimizer: of all its parameters.
        batch: [T, B, size] per sensor, and "pre_action" [T, B, A].
        generator: of the posterior's noise.
        grad_clip: largest norm of the gradient; that of the probes, which the rest of the model
            does not feel, is clipped apart.

    Returns:
        Scalars on the model's device: the model's metrics, and "model_grad_norm" before clipping,
        without the probes.
    """
    losses, metrics = world_model.elbo(batch, generator=generator)
    norm = take_step(optimizer, losses["total"], grad_clip, world_model.probes.parameters())
    return metrics | {"model_grad_norm": norm}


def train(args: Args) -> None:
    """Train from the start or from the last checkpoint of `args.out` to `args.updates`.

    Raises:
        ValueError: an argument is out of its range, the data does not fit, or the folder holds
            another run.
        RuntimeError: the device is not available.
    """
    check_arguments(
        args,
        positive=("updates", "batch_size", "lr", "grad_clip", "log_every", "checkpoint_every"),
        not_negative=("weight_decay", "seed", "threads", "eval_every"),
        shares=("lr_decay",),
    )
    if args.horizon < 2:
        raise ValueError(f"--horizon is {args.horizon}, expected at least 2")
    check_rule(args.optimizer)
    model_config = build_config(args.env, args.preset, args.setup, args.rssm)
    if not args.idm:
        model_config = replace(model_config, idm="none")
    device = choose_device(args.device, args.threads, args.matmul_precision)
    columns = (*model_config.inputs, *model_config.targets, *model_config.probes, "pre_action")
    flags = (TERMINAL,) if model_config.terminal else ()
    dataset = Dataset.open(args.data, tuple(dict.fromkeys(columns + flags)), args.max_episodes)
    sampler = WindowSampler(dataset, args.horizon, args.batch_size, args.seed, device=device)
    out = Path(args.out)
    open_run(out, "pretrain", asdict(args))

    torch.manual_seed(args.seed)
    world_model = WorldModel(model_config).to(device)
    optimizer = build_optimizer(
        args.optimizer, world_model.parameters(), args.lr, args.weight_decay
    )
    noise = torch.Generator(device).manual_seed(args.seed + 1)
    start = 0
    if state := resume(out, "pretrain", {"world_model": world_model}):
        optimizer.load_state_dict(state["optimizer"])
        noise.set_state(state["noise"])
        sampler.load_state_dict(state["sampler"])
        start = state["step"]

    shown = asdict(args)
    with sampler, Logger(out, args.updates, start=start, config=shown, wandb=args.wandb) as logger:
        logger.say(
            f"pretrain: {dataset.num_episodes} episodes, {dataset.num_frames} frames, "
            f"{sum(p.numel() for p in world_model.parameters()):,} parameters, from update {start}"
        )
        for step in range(start + 1, args.updates + 1):
            set_learning_rate(
                optimizer, args.lr, decay=args.lr_decay, step=step, updates=args.updates
            )
            batch = sampler.sample()
            logger.add(update(world_model, optimizer, batch, noise, grad_clip=args.grad_clip))
            if step % args.log_every == 0 or step == args.updates:
                logger.write(step)
            if args.eval_every and step % args.eval_every == 0:
                windows = WindowSampler(
                    dataset, args.horizon, args.batch_size, step, device=device, prefetch=False
                )
                with logger.paused():
                    logger.record(step, prediction_error(world_model, windows.sample(), step))
            if step % args.checkpoint_every == 0 or step == args.updates:
                save_checkpoint(
                    out,
                    step,
                    algorithm="pretrain",
                    config={"args": asdict(args), "world_model": asdict(model_config)},
                    modules={"world_model": world_model},
                    train_state={
                        "optimizer": optimizer.state_dict(),
                        "noise": noise.get_state(),
                        "sampler": sampler.state_dict(),
                    },
                )


@torch.no_grad()
def prediction_error(
    world_model: WorldModel, batch: dict[str, Tensor], seed: int
) -> dict[str, float]:
    """Filter the first frames of a batch, imagine the others along the true actions, and compare.

    Args:
        world_model: the model.
        batch: [T, B, size] per sensor, and "pre_action" [T, B, A]; T at least 2.
        seed: of the noise.

    Returns:
        "prediction_<sensor>_mse" per target.
    """
    action = batch["pre_action"]
    context = min(_CONTEXT, len(action) // 2)
    noise = torch.Generator(action.device).manual_seed(seed)
    rssm = world_model.rssm
    past = {name: value[:context] for name, value in batch.items()}
    seen = rssm.observe(world_model.encode(past), action[:context], generator=noise)
    state = State(seen.deter[-1], seen.stoch[-1])
    ahead = rssm.imagine(action[context:], state, generator=noise)
    feature = State(ahead.deter, ahead.stoch).feature
    errors: dict[str, float] = {}
    for name in world_model.config.targets:
        predicted: Tensor = world_model.decoders[name](feature).mode
        error = (predicted - batch[name][context:]).square().mean()
        errors[f"prediction_{name}_mse"] = float(error)
    return errors
