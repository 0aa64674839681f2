"""Snapshots of agents with a world model along their learning, and episodes made anew from them.

    RUN/snapshots/<episode>.safetensors    what acted when the replay had so many episodes

Only what acting needs is kept, in half precision: encoders, recurrence, posterior, and the mean of
the policy.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastrssm.data.episode import Episode
from fastrssm.data.recipes import PREFILL_EPISODES
from fastrssm.envs import make_vec
from fastrssm.models.config import WorldModelConfig
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.world_model import WorldModel
from fastrssm.run.agents import RandomAgent
from fastrssm.run.collect import Agent, rollout
from fastrssm.run.model_agent import WorldModelAgent

# names of the weights that act
_ACTING = (
    "world_model.encoders.",
    "world_model.rssm.pre_memory.",
    "world_model.rssm.memory_cell.",
    "world_model.rssm.posterior_",
    "policy.mean_net.",
)


class Snapshot(NamedTuple):
    """What acted at one time of a run."""

    env_id: str
    episode: int  # episodes in the replay by then
    world_model: WorldModel
    policy: TanhGaussianPolicy


def save_snapshot(
    folder: Path, episode: int, env_id: str, world_model: WorldModel, policy: TanhGaussianPolicy
) -> None:
    """Write what acts as `<episode>.safetensors`, whole or not at all."""
    tensors = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in _acting(world_model, policy).items()
    }
    about = {"env": env_id, "episode": episode, "world_model": asdict(world_model.config)}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{episode}.safetensors"
    unfinished = path.with_name(f".{path.name}.part")
    # one entry only: the order of several differs from time to time
    safetensors.torch.save_file(tensors, unfinished, {"snapshot": json.dumps(about)})
    os.replace(unfinished, path)


def load_snapshot(path: Path) -> Snapshot:
    """Rebuild what acted; the weights that do not act are fresh.

    Raises:
        ValueError: the file cannot be read, or is of another model variant.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads(file.metadata()["snapshot"])
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        env_id, episode = str(about["env"]), int(about["episode"])
        config = WorldModelConfig.from_dict(about["world_model"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a snapshot of an agent ({error}).") from error
    world_model = WorldModel(config)
    policy = TanhGaussianPolicy(config.feature_size, config.action_size)
    own = _acting(world_model, policy)
    for name in sorted(own.keys() | tensors.keys()):
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            raise ValueError(f"{path}: {name} does not fit the model that the file describes.")
        own[name].copy_(tensors[name])
    return Snapshot(env_id, episode, world_model, policy)


def replay_learning(
    folder: Path, episodes: int, seed: int, num_envs: int, steps: int | None = None
) -> Iterator[Episode]:
    """Make episodes as the run made its replay: the first ones random, the others by its snapshots.

    Episode i of N is by the snapshot nearest to i/N of the learning. Seed, number of episodes and
    of environments determine the result on one machine.

    Args:
        folder: of snapshots.
        episodes: how many to make.
        seed: of the environments and of the model's noise.
        num_envs: environments stepped together.
        steps: decision steps of an episode. None: as many as the task has.

    Raises:
        ValueError: there is no snapshot, one cannot be read, or a number is below 1.
    """
    if episodes < 1 or num_envs < 1:
        raise ValueError(
            f"episodes and num_envs must be at least 1, got {episodes} and {num_envs}."
        )
    paths = sorted(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
    if not paths:
        raise ValueError(f"{folder}: no snapshot of an agent.")
    return _replay(paths, episodes, seed, num_envs, steps)


def _replay(
    paths: list[Path], episodes: int, seed: int, num_envs: int, steps: int | None
) -> Iterator[Episode]:
    times = np.array([int(path.stem) for path in paths])
    wanted = np.arange(episodes) / episodes * times[-1]
    which = np.abs(wanted[:, None] - times).argmin(1)
    which[:PREFILL_EPISODES] = -1
    for k in np.unique(which):
        snapshot = load_snapshot(paths[max(k, 0)])
        numbers = np.flatnonzero(which == k)
        agent: Agent = (
            RandomAgent(snapshot.policy.action_size, seed)
            if k < 0
            else WorldModelAgent(snapshot.world_model, snapshot.policy, seed + int(k))
        )
        env = make_vec(snapshot.env_id, min(num_envs, len(numbers)), episode_steps=steps)
        try:
            start = int(np.random.SeedSequence((seed, int(numbers[0]))).generate_state(1)[0])
            yield from rollout(env, agent, len(numbers), seed=start)
        finally:
            env.close()


def _acting(world_model: WorldModel, policy: TanhGaussianPolicy) -> dict[str, Tensor]:
    modules: dict[str, nn.Module] = {"world_model": world_model, "policy": policy}
    return {
        f"{name}.{key}": value
        for name, module in modules.items()
        for key, value in module.state_dict().items()
        if f"{name}.{key}".startswith(_ACTING)
    }
