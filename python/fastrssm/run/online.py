"""What Dreamer and Plan2Explore share: networks, behaviour learnt in imagination, and their loop.

The loop alternates between updates on a replay and the policy's next episodes for it.

`--scale cpu` is what two cores do in about an hour. It differs from `--scale paper` (the defaults)
in: a smaller world model (deter 256, hidden 256) without inverse dynamics; 16 windows in a batch
instead of 50, and 256 starts of imagination instead of 2,500; 505 episodes instead of 1,000, of 4
environments; 500 updates of the model alone instead of 100, then 50 per episode instead of 100;
learning rates of 6e-4, 1e-4 and 3e-4 instead of 3e-4, 8e-5 and 8e-5 (model, policy, value); a
penalty on the policy's KL of 1e-3 instead of 1e-4; products of bfloat16.
"""

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastrssm.envs import MujocoVectorEnv, find_task, make_vec
from fastrssm.models.behaviour import (
    Reward,
    behaviour_losses,
    build_value,
    choose_starts,
    frozen,
    imagine,
)
from fastrssm.models.config import TERMINAL, Preset, WorldModelConfig
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import State
from fastrssm.models.world_model import WorldModel
from fastrssm.run.agents import RandomAgent
from fastrssm.run.checkpoint import resume, save_checkpoint
from fastrssm.run.collect import Agent, rollout
from fastrssm.run.log import Logger
from fastrssm.run.model_agent import WorldModelAgent
from fastrssm.run.replay import Replay
from fastrssm.run.start import MatmulPrecision, Sizes, build_config, check_arguments
from fastrssm.run.step import take_step
from fastrssm.run.tapes import OnGrid, episode_seed

Batch = dict[str, Tensor]
# batch, noise, and whether the behaviour learns yet -> metrics
Update = Callable[[Batch, torch.Generator, bool], dict[str, Tensor]]
CPU_SCALE: dict[str, Any] = {
    "rssm": Sizes(deter=256, hidden=256),
    "idm": False,
    "batch_size": 16,
    "start_states": 256,
    "num_envs": 4,
    "episodes": 505,
    "pretrain_updates": 500,
    "updates_per_episode": 50,
    "model_lr": 6e-4,
    "actor_lr": 1e-4,
    "value_lr": 3e-4,
    "entropy_scale": 1e-3,
    "matmul_precision": "medium",
}


@dataclass(frozen=True, kw_only=True)
class OnlineArgs:
    """Arguments of a learner that collects its own episodes."""

    env: str
    """Task, for example walker-walk."""
    out: str
    """Run folder. An existing one is resumed. `episodes` in it is a dataset."""
    setup: Literal["mdp", "lpomdp"] = "mdp"
    """What the model sees: all sensors (mdp), or positions only (lpomdp)."""
    preset: Preset = "rssmo"
    """World model of the paper (rssm or rssmo), or of its second version."""
    rssm: Sizes = field(default_factory=Sizes)
    """Sizes that replace those of the preset."""
    idm: bool = True
    """Learn an inverse dynamics model beside it, as published; the behaviour does not use it."""
    episodes: int = 1000
    """Episodes in the replay at the end, the random ones included."""
    prefill: int = 5
    """Episodes of random actions at the start."""
    steps: int | None = None
    """Decision steps of an episode; left out: as many as the task has."""
    num_envs: int = 1
    """Environments stepped together, each for one episode between two rounds of updates."""
    action_noise: float = 0.0
    """Standard deviation of the Gaussian noise on the policy's actions, which are then clipped."""
    pretrain_updates: int = 100
    """Updates of the world model alone, before the first round."""
    updates_per_episode: int = 100
    """Updates of everything per collected episode. The replay ratio, how often a frame is seen, is
    this times batch-size times horizon over the steps of an episode: 500 as published."""
    batch_size: int = 50
    """Windows in a batch."""
    horizon: int = 50
    """Frames in a window."""
    start_states: int = 0
    """States of a batch from which imagination starts, chosen at random; 0: all."""
    imagine_horizon: int = 15
    """Steps of imagination."""
    gamma: float = 0.99
    """Discount."""
    return_lambda: float = 0.95
    """Mixing weight of the returns of all lengths."""
    entropy_scale: float = 1e-4
    """Weight of the penalty on the policy's KL to a broad one."""
    model_lr: float = 3e-4
    """Learning rate of the world model."""
    actor_lr: float = 8e-5
    """Learning rate of the policy."""
    value_lr: float = 8e-5
    """Learning rate of the value network."""
    grad_clip: float = 100.0
    """Largest norm of the gradient of each of the three."""
    seed: int = 42
    """Of the initial weights, the environments, the batches and the noise."""
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
    wandb: bool = False
    """Send the records to Weights & Biases as well."""


class Learner(NamedTuple):
    """What learns: modules of a checkpoint, and the optimisers "model", "actor" and "critic"."""

    config: WorldModelConfig
    modules: dict[str, Any]  # "world_model", "policy", "value", and what the reward needs besides
    optimizers: dict[str, torch.optim.Optimizer]


def check_online(args: OnlineArgs) -> WorldModelConfig:
    """Refuse arguments out of their range, and build the model's configuration.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(
        args,
        positive=(
            "episodes", "prefill", "num_envs", "updates_per_episode", "batch_size", "model_lr",
            "actor_lr", "value_lr", "grad_clip", "log_every", "checkpoint_every",
        ),
        not_negative=(
            "action_noise", "pretrain_updates", "start_states", "entropy_scale", "seed", "threads",
        ),
        shares=("gamma", "return_lambda"),
    )  # fmt: skip
    for name in ("horizon", "imagine_horizon"):
        if getattr(args, name) < 2:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least 2"
            )
    if args.gamma == 1:
        raise ValueError("--gamma is 1.0, expected a number below 1")
    left = args.episodes - args.prefill
    if left < 0 or left % args.num_envs:
        raise ValueError(
            f"--episodes is {args.episodes}, expected --prefill {args.prefill} plus a multiple of "
            f"--num-envs {args.num_envs}"
        )
    config = build_config(args.env, args.preset, args.setup, args.rssm)
    task = find_task(args.env)
    steps = -(-task.episode_steps // task.action_repeat) if args.steps is None else args.steps
    if args.horizon > steps + 1:
        raise ValueError(
            f"--horizon is {args.horizon}, expected at most the {steps + 1} frames of an episode"
        )
    return config if args.idm else replace(config, idm="none")


def build_learner(
    args: OnlineArgs, config: WorldModelConfig, device: torch.device, **others: nn.Module
) -> Learner:
    """Build the networks, and their optimisers; `others` learn with the world model."""
    features = config.feature_size
    modules: dict[str, nn.Module] = {
        "world_model": WorldModel(config),
        **others,
        "policy": TanhGaussianPolicy(features, config.action_size),
        "value": build_value(features),
    }
    for module in modules.values():
        module.to(device)
    learnt = [p for name in ("world_model", *others) for p in modules[name].parameters()]
    return Learner(
        config,
        modules,
        {
            "model": torch.optim.Adam(learnt, lr=args.model_lr, fused=True),
            "actor": torch.optim.Adam(modules["policy"].parameters(), lr=args.actor_lr, fused=True),
            "critic": torch.optim.Adam(modules["value"].parameters(), lr=args.value_lr, fused=True),
        },
    )


def learn_behaviour(
    learner: Learner,
    args: OnlineArgs,
    seen: State,
    reward: Reward,
    noise: torch.Generator,
) -> dict[str, Tensor]:
    """Take one gradient step of policy and value each, in imagination.

    Args:
        learner: policy and value are changed in place; gradients flow through all other modules.
        args: of imagination and losses.
        seen: [T, B, D], [T, B, S] states of a batch, in some of which imagination starts.
        reward: of what is imagined.
        noise: generator of all noise.

    Returns:
        Scalars on the modules' device: losses, metrics, and norms of gradients before clipping.
    """
    _, modules, optimizers = learner
    policy, value = modules["policy"], modules["value"]
    starts = choose_starts(seen, args.start_states, noise)
    with frozen(*(modules[name] for name in modules.keys() - {"policy", "value"})):
        rssm = modules["world_model"].rssm
        imagined = imagine(rssm, policy, starts, args.imagine_horizon, noise)
        rewards = reward(imagined)
    losses, metrics = behaviour_losses(
        imagined, rewards, policy, value,
        gamma=args.gamma, lambda_=args.return_lambda, entropy_scale=args.entropy_scale,
    )  # fmt: skip
    metrics["actor_grad_norm"] = take_step(optimizers["actor"], losses["actor"], args.grad_clip)
    metrics["value_grad_norm"] = take_step(optimizers["critic"], losses["value"], args.grad_clip)
    return metrics


def total_updates(args: OnlineArgs) -> int:
    """Count the updates of a whole run."""
    return args.pretrain_updates + (args.episodes - args.prefill) * args.updates_per_episode


def episodes_after(args: OnlineArgs, update: int) -> int:
    """Count the episodes in the replay after an update, those it makes due included."""
    rounds = (update - args.pretrain_updates) // (args.updates_per_episode * args.num_envs)
    return args.prefill + max(rounds, 0) * args.num_envs


def learn_online(
    algorithm: str, args: OnlineArgs, learner: Learner, update: Update, device: torch.device
) -> None:
    """Alternate between updates and episodes, from the start or from the last checkpoint.

    An update depends on the seed, its number and the episodes before it only, so a run that was
    stopped gives the same weights and the same episodes as one that was not.

    Args:
        algorithm: name in the checkpoints.
        args: checked ones; the folder is open.
        learner: modules and optimizers, changed in place.
        update: takes one step of everything on a batch.
        device: where the modules are.

    Raises:
        ValueError: the folder holds another run, a horizon is longer than the episodes, or a loss
            is not finite.
    """
    out, total = Path(args.out), total_updates(args)
    config, modules, optimizers = learner
    world_model, policy = modules["world_model"], modules["policy"]
    noise = torch.Generator(device).manual_seed(args.seed + 1)
    start = 0
    if state := resume(out, algorithm, modules):
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state[name])
        noise.set_state(state["noise"])
        start = state["step"]

    flags = (TERMINAL,) if config.terminal else ()
    keys = (*config.inputs, *config.targets, *config.probes, "pre_action", *flags)
    replay = Replay(
        out / "episodes",
        tuple(dict.fromkeys(keys)),
        episodes=episodes_after(args, start) if start else 0,
        given=start,
        horizon=args.horizon,
        batch_size=args.batch_size,
        seed=args.seed,
        device=device,
    )
    with replay, closing(make_vec(args.env, args.num_envs, episode_steps=args.steps)) as env:
        while replay.num_episodes < args.prefill:
            agent = RandomAgent(
                config.action_size, episode_seed(args.seed, replay.num_episodes, stream=1)
            )
            _collect(
                env, agent, replay, min(replay.num_episodes + args.num_envs, args.prefill), args
            )
        with Logger(out, total, start=start, config=asdict(args), wandb=args.wandb) as logger:
            parameters = sum(p.numel() for module in modules.values() for p in module.parameters())
            logger.say(
                f"{algorithm}: {replay.num_episodes} episodes, {replay.num_frames} frames, "
                f"{parameters:,} parameters, from update {start}"
            )
            for step in range(start + 1, total + 1):
                logger.add(update(replay.sample(), noise, step > args.pretrain_updates))
                before, due = replay.num_episodes, episodes_after(args, step)
                saving = step % args.checkpoint_every == 0 or step == total
                # the logger stops a run that diverged, so it looks before anything acts or is kept
                if step % args.log_every == 0 or due > before or saving:
                    logger.write(step)
                if due > before:
                    seed = episode_seed(args.seed, due, stream=2)
                    agent = WorldModelAgent(world_model, policy, seed, args.action_noise)
                    with logger.paused():
                        _collect(env, agent, replay, due, args)
                    mean = float(np.mean(replay.returns[before:]))
                    logger.record(step, {"episode_return": mean, "episodes": due})
                    logger.say(f"update {step}: {due} episodes, return {mean:.1f}")
                if saving:
                    states = {
                        name: optimizer.state_dict() for name, optimizer in optimizers.items()
                    }
                    save_checkpoint(
                        out,
                        step,
                        algorithm=algorithm,
                        config={"args": asdict(args), "world_model": asdict(config)},
                        modules=modules,
                        train_state={**states, "noise": noise.get_state()},
                    )


def _collect(
    env: MujocoVectorEnv, agent: Agent, replay: Replay, episodes: int, args: OnlineArgs
) -> None:
    """Add episodes to the replay until it has `episodes`, at most one per environment."""
    first = replay.num_episodes
    # a seed per episode: what an environment does depends on no earlier one
    seeds = [episode_seed(args.seed, first + i) for i in range(env.num_envs)]
    for episode in rollout(env, OnGrid(agent), episodes - first, seed=seeds):
        replay.add(episode)
