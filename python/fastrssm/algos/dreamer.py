"""Dreamer as AIME's task buffers were made with: a world model, and behaviour learnt inside it.

The replay, in the folder `episodes` of the run, is a dataset like any other: the task's "buffer".

Source: Hafner et al. 2020 (Dreamer, 1912.01603), with the constants of Zhang et al. 2023 (AIME,
OpenReview WjlCQxpuxU), version 1: no target network, no discount head, and no noise on actions
unless `action_noise` asks for it.

Differences from the original code:
- the default setup is `mdp` (the original collects with `visual`, so that images are stored);
- several environments may collect between two rounds of updates (`num_envs`), each with as many
  updates as one has in the original, so that the replay ratio stays;
- actions are rounded to 1/127 of their range, so that a tape keeps the episodes (`data tape`);
- the gradient of the policy's loss is not computed for the world model and the value network, which
  throw it away;
- no evaluation on the way: episodes are collected with the policy's mode, as an evaluation does,
  and their returns are recorded;
- a run can be stopped and resumed, and gives the same weights and episodes as one that was not.

`--scale cpu` is what two cores do in about an hour: see `fastrssm.run.online`.
"""

import json
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrssm.models.behaviour import Imagined
from fastrssm.models.config import WorldModelConfig
from fastrssm.models.rssm import State
from fastrssm.models.world_model import WorldModel
from fastrssm.run.checkpoint import write_atomic
from fastrssm.run.evaluate import EVAL_SEED_OFFSET, evaluate
from fastrssm.run.model_agent import WorldModelAgent
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
from fastrssm.run.start import check_arguments, choose_device, open_run
from fastrssm.run.step import take_step

SCALES: dict[str, dict[str, Any]] = {"paper": {}, "cpu": CPU_SCALE}


@dataclass(frozen=True, kw_only=True)
class Args(OnlineArgs):
    """Learn a task in the imagination of a world model (Dreamer, as AIME's first version)."""

    final_episodes: int = 100
    """Episodes of the evaluation at the end, written to eval.json; 0: none."""


def update(
    learner: Learner, args: Args, batch: Batch, noise: torch.Generator, acting: bool
) -> dict[str, Tensor]:
    """Take one gradient step of the world model, and one of policy and value each.

    Args:
        learner: with a decoder "reward" in its model; changed in place.
        args: of imagination and losses.
        batch: [T, B, size] per sensor, "pre_action" [T, B, A] and "reward" [T, B, 1].
        noise: generator of all noise.
        acting: False: the world model only.

    Returns:
        Scalars on the modules' device: losses, metrics, and norms of gradients before clipping.
    """
    world_model: WorldModel = learner.modules["world_model"]
    # the states of the model's loss are those in which imagination starts
    filtered = world_model.filter(batch, generator=noise)
    losses, metrics = world_model.elbo(batch, filtered=filtered)
    probes = world_model.probes.parameters()
    metrics["model_grad_norm"] = take_step(
        learner.optimizers["model"], losses["total"], args.grad_clip, probes
    )
    if not acting:
        return metrics

    def reward(imagined: Imagined) -> Tensor:
        return world_model.decoders["reward"](imagined.feature[1:]).mode.squeeze(-1)

    seen = State(filtered.states.deter, filtered.states.stoch)
    return metrics | learn_behaviour(learner, args, seen, reward, noise)


def train(args: Args) -> None:
    """Train from the start or from the last checkpoint of `args.out` to the last episode.

    Raises:
        ValueError: an argument is out of its range, or the folder holds another run.
        RuntimeError: the device is not available.
    """
    config = build_config(args)
    device = choose_device(args.device, args.threads, args.matmul_precision)
    out = Path(args.out)
    open_run(out, "dreamer", asdict(args))

    torch.manual_seed(args.seed)
    learner = build_learner(args, config, device)
    learn_online("dreamer", args, learner, partial(update, learner, args), device)
    if args.final_episodes:
        seed = args.seed + EVAL_SEED_OFFSET
        agent = WorldModelAgent(learner.modules["world_model"], learner.modules["policy"], seed)
        result = evaluate(agent, args.env, args.final_episodes, seed=seed)
        write_atomic(out / "eval.json", json.dumps(result.to_dict()).encode())
        score = "unknown" if result.score is None else f"{result.score:.1f}"
        print(f"final return {result.mean:.1f} +- {result.std:.1f}, score {score}")


def build_config(args: Args) -> WorldModelConfig:
    """Build the configuration of a world model that predicts the reward as well.

    Raises:
        ValueError: an argument is out of its range.
    """
    check_arguments(args, positive=(), not_negative=("final_episodes",))
    config = check_online(args)
    return replace(
        config,
        sensors=(*config.sensors, ("reward", 1)),
        targets=(*config.targets, "reward"),
    )
