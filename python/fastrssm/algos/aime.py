"""Phase 2 of AIME: infer the actions of observation-only demonstrations by maximising evidence.

The world model is frozen. The policy takes the place of the unknown actions, and the gradient of
the evidence bound flows through the model and all time steps into the policy.

Source: Zhang et al. 2023 (AIME, OpenReview WjlCQxpuxU), section 3.2 and algorithm 1; defaults are
those of its appendix.

Differences from the original code:
- no balancing of the KL and no free nats, as its documented command line sets;
- the optimiser holds the policy's parameters only; the original registers the frozen ones too;
- the policy always starts fresh; the model is always frozen;
- one update is the unit of everything; the original counts epochs of 100 updates (500 epochs);
- a run can be stopped and resumed, and gives the same weights as one that was not stopped.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fastrssm.data import Dataset, WindowSampler
from fastrssm.data.dataset import read_folder
from fastrssm.envs import find_task
from fastrssm.models.config import TERMINAL, WorldModelConfig
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.world_model import WorldModel
from fastrssm.run.checkpoint import (
    load_checkpoint,
    restore,
    resume,
    save_checkpoint,
    write_atomic,
)
from fastrssm.run.evaluate import EVAL_SEED_OFFSET, evaluate
from fastrssm.run.log import Logger
from fastrssm.run.model_agent import WorldModelAgent
from fastrssm.run.start import (
    MatmulPrecision,
    check_arguments,
    choose_device,
    open_run,
)
from fastrssm.run.step import set_learning_rate, take_step


@dataclass(frozen=True, kw_only=True)
class Args:
    """Imitate observation-only demonstrations with a frozen world model (phase 2 of AIME)."""

    model: str
    """Run folder of `fastrssm pretrain`."""
    data: str
    """Folder of demonstrations. Their actions, if present, only serve the diagnostic action_mse."""
    out: str
    """Run folder. An existing one is resumed."""
    env: str
    """Task in which the policy is evaluated, for example walker-run."""
    kl_only: bool = False
    """Drop the reconstruction term."""
    kl_scale: float = 1.0
    """Factor on the KL term; 0: reconstruction only."""
    use_idm: bool = False
    """Draw actions from the inverse dynamics model and clone the policy onto them."""
    updates: int = 50_000
    """Gradient steps."""
    batch_size: int = 50
    """Windows in a batch."""
    horizon: int = 50
    """Frames in a window."""
    lr: float = 3e-4
    """Learning rate of Adam."""
    lr_decay: float = 0.0
    """Share of the updates, at the end, over which the learning rate falls to 0; 0: constant."""
    grad_clip: float = 100.0
    """Largest norm of the policy's gradient."""
    max_episodes: int = 100
    """Use the first so many demonstrations."""
    seed: int = 42
    """Of the initial policy, the batches and the noise; evaluation uses it plus 100."""
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
    eval_every: int = 1000
    """Updates between two evaluations; 0: never."""
    eval_episodes: int = 10
    """Episodes of each of them."""
    final_episodes: int = 100
    """Episodes of the evaluation at the end, written to eval.json; 0: none."""
    wandb: bool = False
    """Send the records to Weights & Biases as well."""


def update(
    world_model: WorldModel,
    policy: TanhGaussianPolicy,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    generator: torch.Generator,
    *,
    kl_only: bool,
    use_idm: bool,
    grad_clip: float,
) -> dict[str, Tensor]:
    """Take one gradient step of the policy on the negative evidence bound of a batch.

    Args:
        world_model: the frozen model.
        policy: the policy, changed in place.
        optimizer: of the policy's parameters.
        batch: [T, B, size] per sensor; "pre_action" [T, B, A] is only compared with.
        generator: of the noise of posterior and policy.
        kl_only: drop the reconstruction term.
        use_idm: act with the inverse dynamics model and clone the policy onto it.
        grad_clip: largest norm of the gradient.

    Returns:
        Scalars on the model's device: the model's metrics, and "policy_grad_norm" before clipping.
    """
    losses, metrics = world_model.elbo_with_policy(
        batch, policy, generator=generator, kl_only=kl_only, use_idm=use_idm
    )
    norm = take_step(optimizer, losses["total"], grad_clip)
    return metrics | {"policy_grad_norm": norm}


def train(args: Args) -> None:
    """Train from the start or from the last checkpoint of `args.out` to `args.updates`.

    Raises:
        ValueError: an argument is out of its range, model, data and task do not fit each other,
            or the folder holds another run.
        RuntimeError: the device is not available.
    """
    check_arguments(
        args,
        positive=("updates", "lr", "grad_clip", "log_every", "checkpoint_every", "eval_episodes"),
        not_negative=("kl_scale", "seed", "threads", "eval_every", "final_episodes"),
        shares=("lr_decay",),
    )
    device = choose_device(args.device, args.threads, args.matmul_precision)
    pretrained = load_checkpoint(Path(args.model), expected=("pretrain",))
    model_config = replace(
        WorldModelConfig.from_dict(pretrained.config["world_model"]), kl_scale=args.kl_scale
    )
    _check_fit(args, model_config)
    dataset = Dataset.open(args.data, _columns(args.data, model_config), args.max_episodes)
    sampler = WindowSampler(dataset, args.horizon, args.batch_size, args.seed, device=device)
    out = Path(args.out)
    open_run(out, "aime", asdict(args))

    torch.manual_seed(args.seed)
    world_model = WorldModel(model_config).to(device)
    policy = TanhGaussianPolicy(model_config.feature_size, model_config.action_size).to(device)
    restore(pretrained, {"world_model": world_model})
    world_model.freeze()
    optimizer = torch.optim.Adam(policy.parameters(), lr=args.lr, fused=True)
    noise = torch.Generator(device).manual_seed(args.seed + 1)
    modules = {"world_model": world_model, "policy": policy}
    start = 0
    if state := resume(out, "aime", modules):
        optimizer.load_state_dict(state["optimizer"])
        noise.set_state(state["noise"])
        sampler.load_state_dict(state["sampler"])
        start = state["step"]

    eval_seed = args.seed + EVAL_SEED_OFFSET
    agent = WorldModelAgent(world_model, policy, eval_seed)
    shown = asdict(args)
    with sampler, Logger(out, args.updates, start=start, config=shown, wandb=args.wandb) as logger:
        logger.say(f"aime: {dataset.num_episodes} demonstrations, from update {start}")
        for step in range(start + 1, args.updates + 1):
            set_learning_rate(
                optimizer, args.lr, decay=args.lr_decay, step=step, updates=args.updates
            )
            logger.add(
                update(
                    world_model,
                    policy,
                    optimizer,
                    sampler.sample(),
                    noise,
                    kl_only=args.kl_only,
                    use_idm=args.use_idm,
                    grad_clip=args.grad_clip,
                )
            )
            if step % args.log_every == 0 or step == args.updates:
                logger.write(step)
            if args.eval_every and step % args.eval_every == 0:
                with logger.paused():
                    result = evaluate(agent, args.env, args.eval_episodes, seed=eval_seed)
                logger.record(step, {"eval_return": result.mean, "eval_return_std": result.std})
                logger.say(f"update {step}: return {result.mean:.1f} +- {result.std:.1f}")
            if step % args.checkpoint_every == 0 or step == args.updates:
                save_checkpoint(
                    out,
                    step,
                    algorithm="aime",
                    config={"args": asdict(args), "world_model": asdict(model_config)},
                    modules=modules,
                    train_state={
                        "optimizer": optimizer.state_dict(),
                        "noise": noise.get_state(),
                        "sampler": sampler.state_dict(),
                    },
                )
        if args.final_episodes:
            result = evaluate(agent, args.env, args.final_episodes, seed=eval_seed)
            write_atomic(out / "eval.json", json.dumps(result.to_dict()).encode())
            score = "unknown" if result.score is None else f"{result.score:.1f}"
            logger.say(f"final return {result.mean:.1f} +- {result.std:.1f}, score {score}")


def _check_fit(args: Args, config: WorldModelConfig) -> None:
    """Refuse a task whose sensors or actions are not the model's, and an absent inverse model."""
    task, sizes = find_task(args.env, "--env"), dict(config.sensors)
    given = {name: size for name, size, _ in task.sensors}
    wanted = {name: sizes[name] for name in config.inputs}
    if any(given.get(name) != size for name, size in wanted.items()):
        raise ValueError(
            f"--env {args.env} gives {given}, but the model of {args.model} reads {wanted}"
        )
    if task.action_size != config.action_size:
        raise ValueError(
            f"--env {args.env} has {task.action_size} actions, "
            f"but the model of {args.model} has {config.action_size}"
        )
    if args.use_idm and config.idm == "none":
        raise ValueError(f"--use-idm needs an inverse dynamics model, which {args.model} has not")


def _columns(folder: str, config: WorldModelConfig) -> tuple[str, ...]:
    """Name the columns to read; actions only where they are in the files."""
    wanted = (*config.inputs, *config.targets, *config.probes)
    extra = [TERMINAL] if config.terminal else []
    _, first = next(read_folder(Path(folder)))
    if "pre_action" in first:
        extra.append("pre_action")
    return tuple(dict.fromkeys((*wanted, *extra)))
