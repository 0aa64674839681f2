"""Tapes: episodes as the seeds of their environments and the actions, a byte each.

The simulator is deterministic, so both determine all the rest: whoever plays a tape gets the very
episodes that were recorded, at the speed of the simulator and without the policies that acted.
Another version of MuJoCo, or another processor, may round differently; the actions are then the
same, and what they lead to drifts apart within a second or two of chaotic motion.

    <name>.tape    safetensors: "seeds" int64 [N], "actions" int8 [N, L - 1, A]; metadata: the task,
                   and the algorithm and arguments of the run
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastrssm.data.dataset import episode_files
from fastrssm.data.episode import Array, Episode, read_episode
from fastrssm.envs import find_task, make_vec
from fastrssm.run.checkpoint import write_atomic
from fastrssm.run.collect import Agent, Bools, Floats, rollout

# an action is a multiple of 1 / _STEPS
_STEPS = 127


class OnGrid:
    """An agent whose actions a tape can keep: rounded to multiples of 1/127."""

    def __init__(self, agent: Agent) -> None:
        """Round what `agent` does."""
        self._agent = agent

    def reset(self, num_envs: int) -> None:
        """See `Agent`."""
        self._agent.reset(num_envs)

    def act(self, obs: dict[str, Array], is_first: Bools, prev_action: Floats) -> Floats:
        """See `Agent`."""
        return from_bytes(to_bytes(self._agent.act(obs, is_first, prev_action)))


def episode_seed(seed: int, episode: int, stream: int = 0) -> int:
    """Return the seed of an episode of a run with `seed`.

    Stream 0 is of the environment, which a tape relies on; 1 of random actions, 2 of the model's
    noise.
    """
    sequence = np.random.SeedSequence((seed, episode, stream))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


class Tape(NamedTuple):
    """Episodes of one task, all equally long."""

    env_id: str
    seeds: npt.NDArray[np.int64]  # [N]
    actions: npt.NDArray[np.int8]  # [N, L - 1, A]
    run: Mapping[str, Any]  # algorithm and arguments of the run


def record_run(run: Path) -> Tape:
    """Make a tape of the episodes of a dreamer or plan2explore run, and see that it plays them.

    Raises:
        FileNotFoundError: there are no episodes.
        ValueError: the folder holds another kind of run, an action is between two bytes, or playing
            the tape gives something else.
    """
    paths = episode_files(run / "episodes")
    try:
        config = json.loads((run / "config.json").read_text())
        made = {"algorithm": config["algorithm"], "args": {**config["args"], "out": None}}
        env_id, seed = str(config["args"]["env"]), int(config["args"]["seed"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{run} is not a dreamer or plan2explore run ({error}).") from error
    columns: list[npt.NDArray[np.int8]] = []
    for path in paths:
        action = read_episode(path, ("pre_action",))["pre_action"][1:]
        column = to_bytes(action)
        if not np.array_equal(from_bytes(column), action):
            raise ValueError(f"{path}: an action is not a multiple of 1/{_STEPS}")
        if columns and column.shape != columns[0].shape:
            raise ValueError(
                f"{path} has {len(column)} decision steps, the first one has {len(columns[0])}"
            )
        columns.append(column)
    seeds = np.array([episode_seed(seed, int(path.stem)) for path in paths])
    tape = Tape(env_id, seeds, np.stack(columns), made)
    for path, episode in zip(paths, play(tape, len(paths)), strict=True):
        recorded = read_episode(path)
        for key, column in recorded.items():
            if not np.array_equal(column, episode[key].astype(column.dtype)):
                raise ValueError(f"{path}: {key!r} is another when the actions are played again")
    return tape


def save_tape(path: Path, tape: Tape) -> None:
    """Write a tape, whole or not at all."""
    tensors = {"seeds": tape.seeds, "actions": tape.actions}
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"env": tape.env_id, "run": dict(tape.run)}
    write_atomic(path, save(tensors, {"tape": json.dumps(about)}))


def load_tape(path: Path) -> Tape:
    """Read a tape.

    Raises:
        ValueError: the file cannot be read, or is no tape of its task.
    """
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["tape"])
            env_id, run = str(about["env"]), dict(about["run"])
            seeds, actions = file.get_tensor("seeds"), file.get_tensor("actions")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a tape ({error}).") from error
    expected = (
        len(seeds),
        actions.shape[1] if actions.ndim == 3 else 0,
        find_task(env_id).action_size,
    )
    if actions.dtype != np.int8 or actions.shape != expected or 0 in expected:
        raise ValueError(
            f"{path}: actions are {actions.dtype} {list(actions.shape)}, expected int8 "
            f"[{len(seeds)}, steps, {expected[2]}] for {env_id}."
        )
    return Tape(env_id, seeds, actions, run)


def play(
    tape: Tape, episodes: int, num_envs: int = 16, steps: int | None = None
) -> Iterator[Episode]:
    """Give the episodes of a tape, in their order.

    Args:
        tape: what to play.
        episodes: how many; fewer than the tape has are spread evenly over it, so that they still
            show every stage of a learner.
        num_envs: environments stepped together; changes the speed only.
        steps: decision steps of an episode, the first ones. None: all.

    Raises:
        ValueError: the tape has fewer episodes or steps, or a number is below 1.
    """
    N, L, _ = tape.actions.shape
    for name, value, most in (("episodes", episodes, N), ("steps", steps or L, L)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} is {value}, expected 1 to {most}, what the tape has.")
    if num_envs < 1:
        raise ValueError(f"num_envs must be at least 1, got {num_envs}.")
    chosen = np.arange(episodes) * N // episodes
    part = tape._replace(seeds=tape.seeds[chosen], actions=tape.actions[chosen])
    return _play(part, num_envs, steps or L)


def _play(tape: Tape, num_envs: int, steps: int) -> Iterator[Episode]:
    episodes = len(tape.seeds)
    env = make_vec(tape.env_id, min(num_envs, episodes), episode_steps=steps)
    try:
        for first in range(0, episodes, env.num_envs):
            # the last round may have more environments than episodes are left
            numbers = np.minimum(np.arange(first, first + env.num_envs), episodes - 1)
            agent = _Player(tape.actions[numbers])
            seeds = [int(seed) for seed in tape.seeds[numbers]]
            yield from rollout(env, agent, min(env.num_envs, episodes - first), seed=seeds)
    finally:
        env.close()


class _Player:
    """Repeats actions [N, L - 1, A], whatever happens."""

    def __init__(self, actions: npt.NDArray[np.int8]) -> None:
        self._actions, self._step = actions, 0

    def reset(self, num_envs: int) -> None:
        assert num_envs == len(self._actions)
        self._step = 0

    def act(self, obs: dict[str, Array], is_first: Bools, prev_action: Floats) -> Floats:
        action = from_bytes(self._actions[:, self._step])
        self._step += 1
        return action


def to_bytes(action: Floats) -> npt.NDArray[np.int8]:
    """Round actions, clipped to [-1, 1], to what a tape keeps."""
    return np.rint(np.clip(action, -1, 1) * np.float32(_STEPS)).astype(np.int8)


def from_bytes(action: npt.NDArray[np.int8]) -> Floats:
    """Return the actions that a tape keeps."""
    return action.astype(np.float32) / np.float32(_STEPS)
