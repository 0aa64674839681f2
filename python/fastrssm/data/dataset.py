"""A folder of episodes as memory-mapped columns plus an index of episode starts."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from fastrssm.data.episode import Array, Episode, canonical_episode, read_arrays
from fastrssm.data.minari import is_minari, minari_episodes, minari_files

# part of the fingerprint: raise it when the layout of the cache changes
_CACHE_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Dataset:
    """Columns of all episodes, one after the other.

    Attributes:
        folder: where the episodes are.
        arrays: per column [num_frames, ...], read-only memory maps; float32, or uint8 for images.
        starts: [num_episodes + 1] frame at which each episode starts, and the end.
    """

    folder: Path
    arrays: Mapping[str, Array]
    starts: npt.NDArray[np.int64]

    @classmethod
    def open(cls, folder: str | Path, keys: Sequence[str], max_episodes: int | None = None) -> Self:
        """Map columns of a folder of episodes, through its `.cache`.

        Columns that the cache lacks, or all when the episodes have changed, are unpacked first.

        Args:
            folder: holds `<n>.npz`, ordered by that integer, or is a Minari dataset.
            keys: columns to map; others are neither read nor checked.
            max_episodes: keep at most the first so many episodes. None: all.

        Raises:
            FileNotFoundError: there is no such folder.
            ValueError: it holds no episode, a column is missing or has varying sizes, an episode
                is damaged, or max_episodes is below 1.
        """
        folder = Path(folder)
        if isinstance(keys, str) or not keys:
            raise ValueError(f"keys must be a non-empty sequence of column names, got {keys!r}.")
        if max_episodes is not None and max_episodes < 1:
            raise ValueError(f"max_episodes must be at least 1, got {max_episodes}.")
        paths = minari_files(folder) if is_minari(folder) else episode_files(folder)
        cache = folder / ".cache" / _fingerprint(paths)
        missing = [key for key in dict.fromkeys(keys) if not _column(cache, key).exists()]
        if missing:
            _unpack(folder, cache, missing)
        starts: npt.NDArray[np.int64] = np.load(cache / "starts.npy", allow_pickle=False)
        arrays: dict[str, Array] = {}
        for key in keys:
            array: Array = np.load(_column(cache, key), mmap_mode="r", allow_pickle=False)
            if len(array) != starts[-1]:
                raise ValueError(
                    f"{_column(cache, key)}: damaged cache; delete {folder / '.cache'}."
                )
            # a plain view: the memmap subclass costs more than the gather
            arrays[key] = array.view(np.ndarray)
        if max_episodes is not None:
            starts = starts[: max_episodes + 1]
        return cls(folder, {key: array[: starts[-1]] for key, array in arrays.items()}, starts)

    @property
    def num_episodes(self) -> int:
        """Number of episodes."""
        return len(self.starts) - 1

    @property
    def num_frames(self) -> int:
        """Number of frames of all episodes."""
        return int(self.starts[-1])

    def windows(
        self, horizon: int, episodes: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """List the first frame of every window that lies inside one episode.

        Args:
            horizon: frames in a window.
            episodes: which episodes to use. None: all.

        Returns:
            [W] frames, ascending within an episode.

        Raises:
            ValueError: horizon is below 1, or no episode is long enough.
        """
        if horizon < 1:
            raise ValueError(f"horizon must be at least 1, got {horizon}.")
        chosen = np.arange(self.num_episodes) if episodes is None else episodes
        begins, ends = self.starts[chosen], self.starts[chosen + 1]
        ranges = [np.arange(b, e - horizon + 1) for b, e in zip(begins, ends, strict=True)]
        windows = np.concatenate([np.empty(0, np.int64), *ranges])
        if not windows.size:
            longest = int((ends - begins).max(initial=0))
            raise ValueError(
                f"{self.folder}: no window of horizon {horizon} fits; "
                f"the longest of {len(chosen)} episodes has {longest} frames."
            )
        return windows


def episode_files(folder: Path) -> list[Path]:
    """List the files `<n>.npz` of a folder, ordered by the integer.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no such file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such dataset folder.")
    names = [entry.name for entry in os.scandir(folder) if re.fullmatch(r"\d+\.npz", entry.name)]
    if not names:
        raise ValueError(f"{folder}: holds no episode named <number>.npz.")
    names.sort(key=lambda name: (int(name.split(".")[0]), name))
    return [folder / name for name in names]


def read_folder(folder: Path, keys: Sequence[str] | None = None) -> Iterator[tuple[str, Episode]]:
    """Give each episode of a folder with a name for messages, its columns as they are on disk.

    Args:
        folder: holds `<n>.npz`, or is a Minari dataset.
        keys: columns to read. None: all.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no episode, one cannot be read, or a column is missing.
        RuntimeError: it is a Minari dataset, whose reader is not installed.
    """
    if not is_minari(folder):
        for path in episode_files(folder):
            yield str(path), read_arrays(path, keys)
        return
    for where, columns in minari_episodes(folder):
        for key in keys or ():
            if key not in columns:
                raise ValueError(
                    f"{where}: column {key!r} is missing; there are {', '.join(columns)}."
                )
        yield where, columns if keys is None else {key: columns[key] for key in keys}


def info(folder: str | Path) -> dict[str, Any]:
    """Summarise a dataset; the result can be written as JSON.

    Returns:
        episodes, frames, keys (shape of a frame and dtype on disk), returns (mean, std, min,
        median, max, or None where there are no rewards), and checksum: sha256 over names, dtypes,
        shapes and bytes of all columns in order, which does not depend on the compression.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no episode, or one cannot be read.
    """
    folder = Path(folder)
    digest, frames, keys, returns = hashlib.sha256(), 0, dict[str, dict[str, Any]](), list[float]()
    number = -1
    for number, (_, arrays) in enumerate(read_folder(folder)):
        for key in sorted(arrays):
            array = np.ascontiguousarray(arrays[key])
            digest.update(f"{number} {key} {array.dtype.str} {array.shape}".encode())
            digest.update(array.data)
            keys.setdefault(key, {"shape": list(array.shape[1:]), "dtype": array.dtype.name})
        frames += max(array.shape[0] if array.ndim else 0 for array in arrays.values())
        if "reward" in arrays:
            returns.append(float(arrays["reward"].sum(dtype=np.float64)))
    summary = {"mean": np.mean, "std": np.std, "min": np.min, "median": np.median, "max": np.max}
    return {
        "folder": str(folder),
        "episodes": number + 1,
        "frames": frames,
        "keys": keys,
        "returns": {name: float(f(returns)) for name, f in summary.items()} if returns else None,
        "checksum": digest.hexdigest(),
    }


def _fingerprint(paths: Sequence[Path]) -> str:
    stats = [(path.name, path.stat()) for path in paths]
    listing = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps([_CACHE_FORMAT, listing]).encode()).hexdigest()[:16]


def _column(cache: Path, key: str) -> Path:
    # a zip member may be called a/b
    return cache / f"column-{quote(key, safe='')}.npy"


def _unpack(folder: Path, cache: Path, keys: Sequence[str]) -> None:
    """Append every episode to one `.npy` per column; each gets its name when it is whole."""
    cache.mkdir(parents=True, exist_ok=True)
    targets = {key: _column(cache, key) for key in keys}
    temporary = {key: path.with_suffix(f".{os.getpid()}.tmp") for key, path in targets.items()}
    layout: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
    starts = [0]
    try:
        with ExitStack() as stack:
            files = {key: stack.enter_context(temporary[key].open("wb")) for key in keys}
            for where, found in read_folder(folder, keys):
                episode = canonical_episode(found, where)
                for key, array in episode.items():
                    rows = np.ascontiguousarray(
                        array, dtype=np.uint8 if array.dtype == np.uint8 else np.float32
                    )
                    here = (rows.dtype, rows.shape[1:])
                    if key not in layout:
                        layout[key] = here
                        _write_header(files[key], *here, frames=0)
                    if layout[key] != here:
                        raise ValueError(
                            f"{where}: column {key!r} has frames of {here[0]} {here[1]}, "
                            f"earlier episodes have {layout[key][0]} {layout[key][1]}."
                        )
                    files[key].write(rows.data)
                starts.append(starts[-1] + len(episode[keys[0]]))
            for key, file in files.items():
                file.seek(0)
                _write_header(file, *layout[key], frames=starts[-1])
                file.flush()
                os.fsync(file.fileno())
        # the index goes first: a column that exists implies that the index does
        index = cache / f"starts.{os.getpid()}.tmp"
        with index.open("wb") as file:
            np.save(file, np.array(starts, np.int64), allow_pickle=False)
        os.replace(index, cache / "starts.npy")
        for key in keys:
            os.replace(temporary[key], targets[key])
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
    for old in cache.parent.iterdir():
        if old != cache:
            # another process may be removing it at the same time
            shutil.rmtree(old, ignore_errors=True)


def _write_header(file: Any, dtype: np.dtype[Any], frame: tuple[int, ...], *, frames: int) -> None:
    # numpy pads this header so that the first axis may grow without moving what follows
    header = {"descr": dtype.str, "fortran_order": False, "shape": (frames, *frame)}
    np.lib.format.write_array_header_1_0(file, header)
