"""A growing set of episodes: on disk as a dataset, in memory for drawing windows."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from fastrssm.data import Dataset, WindowSampler
from fastrssm.data.episode import Array, Episode, read_episode, write_episode


class Replay:
    """Episodes `<n>.npz` of a folder that grows; any program that reads datasets reads it too.

    Windows are drawn from copies of the columns in memory, float32: 0.07 GB for 1,000 episodes of
    the walker.
    """

    def __init__(
        self,
        folder: Path,
        keys: Sequence[str],
        *,
        episodes: int,
        given: int,
        horizon: int,
        batch_size: int,
        seed: int,
        device: torch.device,
    ) -> None:
        """Read the first `episodes`, and delete later ones: whoever resumes will make them again.

        Args:
            folder: made if absent.
            keys: columns to draw windows of.
            episodes: that the folder held when the checkpoint was written.
            given: batches drawn until then.
            horizon: T, frames in a window.
            batch_size: B, windows in a batch.
            seed: of the stream of batches.
            device: where they are wanted.

        Raises:
            ValueError: one of the episodes is missing or damaged.
        """
        self.folder, self._keys = folder, tuple(keys)
        self._columns: dict[str, Array] = {}
        self._starts = [0]
        self._horizon, self._batch_size, self._seed = horizon, batch_size, seed
        self._device, self._given = device, given
        self._sampler: WindowSampler | None = None
        self.returns: list[float] = []
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if (name := re.fullmatch(r"(\d+)\.npz", path.name)) and int(name[1]) >= episodes:
                path.unlink()
        for number in range(episodes):
            path = self._path(number)
            if not path.exists():
                raise ValueError(
                    f"{path} is missing, expected the {episodes} episodes of the checkpoint"
                )
            self._append(path)

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self._starts) - 1

    @property
    def num_frames(self) -> int:
        """Number of frames of all episodes."""
        return self._starts[-1]

    def add(self, episode: Episode) -> None:
        """Write an episode and keep its columns.

        Raises:
            ValueError: it is malformed or lacks a column.
        """
        self.close()
        path = self._path(self.num_episodes)
        write_episode(path, episode)
        # read back, so that a resumed run has the same numbers
        self._append(path)

    def sample(self) -> dict[str, Tensor]:
        """Give the next batch, [T, B, ...] per column.

        Batch i depends on the seed, i, and the episodes there are then only.

        Raises:
            ValueError: no episode is as long as the horizon.
        """
        if self._sampler is None:
            columns = {key: column[: self.num_frames] for key, column in self._columns.items()}
            dataset = Dataset(self.folder, columns, np.array(self._starts, np.int64))
            self._sampler = WindowSampler(
                dataset, self._horizon, self._batch_size, self._seed, device=self._device
            )
            state = self._sampler.state_dict()
            self._sampler.load_state_dict({**state, "given": self._given})
        self._given += 1
        return self._sampler.sample()

    def close(self) -> None:
        """Stop the sampling thread; the next batch starts another."""
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.npz"

    def _append(self, path: Path) -> None:
        episode = read_episode(path, (*self._keys, "reward"))
        begin = self._starts[-1]
        end = begin + len(episode["reward"])
        for key in self._keys:
            rows = episode[key]
            column = self._columns.get(key)
            if column is None or len(column) < end:
                # twice as long each time, so that a frame is copied a few times at most
                grown = np.empty((2 * end, *rows.shape[1:]), np.float32)
                if column is not None:
                    grown[:begin] = column[:begin]
                self._columns[key] = column = grown
            column[begin:end] = rows
        self._starts.append(end)
        self.returns.append(float(episode["reward"].sum(dtype=np.float64)))
