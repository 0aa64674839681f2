"""One episode: its columns, its checks, and its `.npz` file, laid out as in AIME.

Frame 0 is the observation after the reset. `pre_action[t]` led to frame t and `reward[t]` is what
it earned, so both are zero at t = 0. An episode of n decisions has L = n + 1 frames; every column
is [L, size], an image [L, Y, X, 3].
"""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Episode = dict[str, Array]

FLAGS = ("is_first", "is_last", "is_terminal")
# what every written episode holds besides its sensors
COLUMNS = ("pre_action", "reward", *FLAGS)
# actions of foreign float32 policies may leave [-1, 1] by their rounding
_ACTION_LIMIT = 1.0 + 1e-5
_UNREADABLE = (ValueError, KeyError, OSError, EOFError, NotImplementedError)
_UNREADABLE_ZIP = (zipfile.BadZipFile, zlib.error, *_UNREADABLE)


def read_arrays(path: Path, keys: Sequence[str] | None = None) -> Episode:
    """Read the columns of one `.npz` as they are on disk.

    Args:
        path: the file.
        keys: columns to read. None: all that hold numbers or flags.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, no `.npz`, needs pickle, or lacks a column.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such episode file.")
    try:
        archive = np.load(path, allow_pickle=False)
    except _UNREADABLE_ZIP as error:
        raise ValueError(f"{path}: not a readable .npz episode ({_reason(error)}).") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path}: not an .npz episode but a single array.")
    with archive:
        for key in keys or ():
            if key not in archive.files:
                have = ", ".join(archive.files)
                raise ValueError(f"{path}: column {key!r} is missing; the file has {have}.")
        arrays: Episode = {}
        for key in archive.files if keys is None else keys:
            try:
                array: Array = archive[key]
            except _UNREADABLE_ZIP as error:
                what = _reason(error)
                raise ValueError(f"{path}: column {key!r} cannot be read ({what}).") from error
            if array.dtype.kind in "fiub":
                arrays[key] = array
            elif keys is not None:
                raise ValueError(f"{path}: column {key!r} has dtype {array.dtype}, not numbers.")
    if not arrays:
        raise ValueError(f"{path}: the episode has no column of numbers.")
    return arrays


def read_episode(path: Path, keys: Sequence[str] | None = None) -> Episode:
    """Read and check one episode; columns that were not asked for are ignored.

    Flags come back as bool, images as uint8, everything else as float32; one-dimensional columns
    get a trailing axis.

    Args:
        path: an `.npz` with any float width, and bool or uint8 flags.
        keys: columns to read. None: all that hold numbers or flags.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read, lacks a column, or its content is no episode (see
            `check_episode`).
    """
    return canonical_episode(read_arrays(path, keys), str(path))


def canonical_episode(columns: Episode, where: str) -> Episode:
    """Convert columns as `read_episode` gives them.

    Raises:
        ValueError: the content is no episode (see `check_episode`).
    """
    episode = {key: _canonical(key, array, where) for key, array in columns.items()}
    check_episode(episode, where=where)
    return episode


def check_episode(episode: Episode, *, where: str) -> None:
    """Refuse columns of different length, values that are not finite, and actions outside [-1, 1].

    Args:
        episode: the columns that were read.
        where: the name of the source, put in front of the message.

    Raises:
        ValueError: one of the above.
    """
    lengths = {key: len(array) for key, array in episode.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: columns differ in length: {lengths}.")
    if 0 in lengths.values():
        raise ValueError(f"{where}: the episode has no frames.")
    for key, array in episode.items():
        if array.dtype.kind != "f" or np.isfinite(array).all():
            continue
        frame = int(np.argwhere(~np.isfinite(array))[0][0])
        raise ValueError(f"{where}: column {key!r} is not finite at frame {frame}.")
    action = episode.get("pre_action")
    if action is not None and np.abs(action).max(initial=0.0) > _ACTION_LIMIT:
        largest = float(np.abs(action).max())
        raise ValueError(f"{where}: 'pre_action' reaches {largest:g}, outside [-1, 1].")


def write_episode(path: Path, episode: Episode) -> None:
    """Write one episode under a temporary name, sync and rename it; equal arrays, equal bytes.

    Args:
        path: the `.npz` to create or replace.
        episode: sensors, `pre_action`, `reward` and the three flags.

    Raises:
        ValueError: a column is missing, the content is no episode (see `check_episode`), or the
            first or last frame breaks the layout.
    """
    missing = [key for key in COLUMNS if key not in episode]
    if missing:
        raise ValueError(f"{path}: the episode lacks {', '.join(missing)}.")
    columns = {key: _canonical(key, array, str(path)) for key, array in episode.items()}
    check_episode(columns, where=str(path))
    for key in ("pre_action", "reward"):
        if columns[key][0].any():
            raise ValueError(f"{path}: {key!r} of frame 0 must be zero, got {columns[key][0]}.")
    if np.flatnonzero(columns["is_first"]).tolist() != [0]:
        raise ValueError(f"{path}: 'is_first' must be true at frame 0 and nowhere else.")
    if np.flatnonzero(columns["is_last"]).tolist() != [len(columns["is_last"]) - 1]:
        raise ValueError(f"{path}: 'is_last' must be true at the last frame and nowhere else.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            # deflate would shrink random floats by a tenth and tie the bytes to a zlib version
            np.savez(file, allow_pickle=False, **columns)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _canonical(key: str, array: Array, where: str) -> Array:
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{where}: column {key!r} has dtype {array.dtype}, not numbers.")
    if array.ndim == 0:
        raise ValueError(f"{where}: column {key!r} is a single number, not one value per frame.")
    if array.ndim == 1:
        array = array[:, None]
    if key in FLAGS:
        return array.astype(np.bool_)
    if array.dtype == np.uint8 and array.ndim == 4:
        return array
    # what overflows float32 becomes infinite and is refused by check_episode
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error) else type(error).__name__
