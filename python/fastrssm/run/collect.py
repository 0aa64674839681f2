"""Drive an agent through a vector environment, and write what it does as a dataset."""

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from fastrssm.data.episode import Array, Episode, write_episode

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]


class Agent(Protocol):
    """What acts in N environments at once."""

    def reset(self, num_envs: int) -> None:
        """Forget all environments; from now on there are `num_envs`."""
        ...

    def act(self, obs: dict[str, Array], is_first: Bools, prev_action: Floats) -> Floats:
        """Choose the next actions.

        Args:
            obs: per sensor [N, size].
            is_first: [N] an episode starts with this observation.
            prev_action: [N, A] the action that led here; zero where is_first.

        Returns:
            [N, A] actions; what lies outside the action space is clipped.
        """
        ...


def rollout(
    env: VectorEnv[Any, Any, Any],
    agent: Agent,
    episodes: int,
    *,
    seed: int | Sequence[int] | None = None,
) -> Iterator[Episode]:
    """Run the first `episodes` episodes that start, and yield them in the order of their starts.

    Short episodes are not preferred: an environment that is done takes the next one, and the one
    that started first is given first, however long it lasts.

    Args:
        env: with dictionary observations, box actions, and autoreset mode NEXT_STEP.
        agent: reset once, before the first episode.
        episodes: how many.
        seed: of `env.reset`.

    Returns:
        Per episode: the sensors [L, size] as the environment gives them, pre_action [L, A] float32,
        reward [L, 1] float64, and is_first, is_last, is_terminal [L, 1] bool.

    Raises:
        ValueError: episodes below 1, an unsuitable environment, or actions of a wrong shape or not
            finite.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}.")
    mode = env.metadata.get("autoreset_mode")
    if mode is not AutoresetMode.NEXT_STEP:
        raise ValueError(f"env must have autoreset mode NEXT_STEP, got {mode}.")
    if not isinstance(env.single_observation_space, spaces.Dict):
        raise ValueError(f"env must give a Dict of sensors, got {env.single_observation_space}.")
    if not isinstance(env.single_action_space, spaces.Box):
        raise ValueError(f"env must have Box actions, got {env.single_action_space}.")
    return _rollout(env, agent, episodes, seed)


def _rollout(
    env: VectorEnv[Any, Any, Any], agent: Agent, episodes: int, seed: int | Sequence[int] | None
) -> Iterator[Episode]:
    space: Any = env.single_action_space
    n = env.num_envs
    # gymnasium's annotation lacks None in the sequence, not the sequence
    obs, _ = env.reset(seed=seed)  # pyright: ignore[reportArgumentType]
    agent.reset(n)
    action = np.zeros((n, *space.shape), np.float32)
    reward = np.zeros(n)
    is_first, terminated, done = np.ones(n, np.bool_), np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    # which episode an environment plays, and the step at which that began
    number, begin = np.arange(n), np.zeros(n, np.int64)
    history: list[dict[str, Array]] = []
    dropped, given = 0, 0
    finished: dict[int, Episode] = {}
    while True:
        # an environment may reuse the memory of its observations
        obs = {key: np.array(value) for key, value in obs.items()}
        flags = {"is_first": is_first, "is_last": done, "is_terminal": terminated}
        columns = {"reward": reward, **flags}
        frame = {key: column[:, None] for key, column in columns.items()}
        history.append({**obs, "pre_action": action, **frame})
        ended = np.flatnonzero(done & (number < episodes))
        if ended.size:
            first = int(begin[ended].min())
            frames = history[first - dropped :]
            stacked = {key: np.stack([frame[key] for frame in frames]) for key in frames[0]}
            for i in ended:
                own = {key: column[begin[i] - first :, i] for key, column in stacked.items()}
                finished[int(number[i])] = {k: np.ascontiguousarray(v) for k, v in own.items()}
        while given in finished:
            yield finished.pop(given)
            given += 1
        if given == episodes:
            return
        chosen = _checked_action(agent.act(obs, is_first, action), space, n)
        # the step after an end ignores the action and only resets
        is_first = done
        action = np.where(is_first[:, None], np.float32(0), chosen)
        obs, reward, terminated, truncated, _ = env.step(chosen)
        reward = np.where(is_first, 0.0, reward)
        terminated = np.array(terminated, np.bool_) & ~is_first
        done = terminated | (np.array(truncated, np.bool_) & ~is_first)
        starting = np.flatnonzero(is_first)
        if starting.size:
            number[starting] = number.max() + 1 + np.arange(len(starting))
            begin[starting] = dropped + len(history)
            keep = int(begin.min())
            del history[: keep - dropped]
            dropped = keep


def _checked_action(action: Floats, space: spaces.Box, n: int) -> Floats:
    if action.shape != (n, *space.shape):
        expected = (n, *space.shape)
        raise ValueError(f"the agent's actions must have shape {expected}, got {action.shape}.")
    if not np.isfinite(action).all():
        where = int(np.argwhere(~np.isfinite(action))[0][0])
        raise ValueError(f"the agent's action for environment {where} is not finite.")
    return np.clip(action, space.low, space.high).astype(np.float32)


def write_dataset(
    folder: str | Path,
    episodes: Iterable[Episode],
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Path:
    """Write episodes as `0.npz`, `1.npz`, ... into a folder that appears only when it is whole.

    Args:
        folder: the folder to make.
        episodes: what to write, for example a `rollout`.
        overwrite: replace a folder of episodes.
        progress: called with the number of episodes written, after each.

    Raises:
        FileExistsError: the folder exists and may not be overwritten, or holds something else than
            episodes.
        ValueError: there is no episode, or one is malformed.
    """
    folder = Path(folder).absolute()
    check_target(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    temporary.mkdir()
    try:
        count = 0
        for episode in episodes:
            write_episode(temporary / f"{count}.npz", episode)
            count += 1
            if progress is not None:
                progress(count)
        if not count:
            raise ValueError(f"{folder}: there is no episode to write.")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that exists and may not be overwritten, see `write_dataset`."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{folder} exists already; remove it or ask to overwrite it.")
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else [folder.name]
    foreign = [name for name in names if not re.fullmatch(r"\d+\.npz|\.cache", name)]
    if foreign:
        raise FileExistsError(f"{folder} is not overwritten: it holds {foreign[0]}, not episodes.")
