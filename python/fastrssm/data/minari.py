"""Episodes of a Minari dataset, in the columns of ours.

A dictionary of observations gives one column each, any other observation the column
`observation`; nested names are joined by a slash. Flags and the zeros of frame 0 are added.
"""

# the reader is an optional extra
# pyright: reportMissingImports=false, reportUnknownVariableType=false

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastrssm.data.episode import COLUMNS, Array, Episode


def is_minari(folder: Path) -> bool:
    """Tell whether a folder is a Minari dataset."""
    return (folder / "data" / "metadata.json").is_file()


def minari_files(folder: Path) -> list[Path]:
    """List the files with the data."""
    return sorted(path for path in (folder / "data").rglob("*") if path.is_file())


def minari_episodes(folder: Path) -> Iterator[tuple[str, Episode]]:
    """Give each episode with a name for messages, all columns as they are on disk.

    Raises:
        RuntimeError: the reader is not installed.
        ValueError: the dataset cannot be read, or is not described without its environment.
    """
    try:
        from minari import MinariDataset
    except ImportError as error:
        raise RuntimeError(
            f"{folder} is a Minari dataset, and its reader is missing ({error}): "
            "pip install 'fastrssm[minari]'"
        ) from error
    try:
        described = json.loads((folder / "data" / "metadata.json").read_text())
        # without its spaces the reader would import and run what the file names as environment
        for name in ("observation_space", "action_space"):
            if name not in described:
                raise ValueError(f"{folder}: its metadata.json has no {name}.")
        dataset = MinariDataset(folder / "data")
        if not dataset.total_episodes:
            raise ValueError(f"{folder}: holds no episode.")
        for episode in dataset.iterate_episodes():
            where = f"{folder}: episode {episode.id}"
            yield where, _columns(where, episode)
    except (OSError, KeyError, TypeError, AssertionError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}: not a readable Minari dataset ({error}).") from error


def _columns(where: str, episode: Any) -> Episode:
    columns = dict(_flat(episode.observations, ""))
    taken = columns.keys() & set(COLUMNS)
    if taken:
        raise ValueError(f"{where}: an observation is called {min(taken)!r}, as a column of ours.")
    action = np.asarray(episode.actions)
    if action.dtype.kind != "f" or action.ndim != 2:
        raise ValueError(
            f"{where}: actions are {action.dtype} {list(action.shape)}, expected floats [steps, A]."
        )
    steps = len(action)
    ended = np.arange(steps + 1) == steps
    columns["pre_action"] = np.concatenate((np.zeros_like(action[:1]), action))
    columns["reward"] = np.concatenate(([0.0], episode.rewards))
    columns["is_first"] = np.arange(steps + 1) == 0
    columns["is_last"] = ended
    columns["is_terminal"] = ended & bool(steps and episode.terminations[-1])
    return columns


def _flat(observations: Any, name: str) -> Iterator[tuple[str, Array]]:
    if isinstance(observations, Mapping):
        for key, value in observations.items():
            yield from _flat(value, f"{name}/{key}" if name else str(key))
    else:
        yield name or "observation", np.asarray(observations)
