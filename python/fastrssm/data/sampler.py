"""Batches [T, B, ...] of a dataset: windows with replacement, and shuffled epochs."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import torch

from fastrssm.data.dataset import Dataset

Batch = dict[str, torch.Tensor]
Split = Literal["episode", "window"]
# one batch waits while the next is gathered
_AHEAD = 2


class WindowSampler:
    """Draw windows uniformly with replacement from all (episode, start) pairs.

    Batch number i is drawn from `Philox(key=seed, counter=i)`, so the whole state is two integers,
    and a resumed sampler gives the very batches it would have given, with or without prefetching.
    """

    def __init__(
        self,
        dataset: Dataset,
        horizon: int = 50,
        batch_size: int = 50,
        seed: int = 0,
        keys: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
        prefetch: bool = True,
    ):
        """List the windows; the prefetching thread starts with the first sample.

        Args:
            dataset: the episodes.
            horizon: T, frames in a window.
            batch_size: B, windows in a batch.
            seed: of the stream of batches, >= 0.
            keys: columns to give. None: all that the dataset has mapped.
            device: where the batches are wanted; CUDA goes through pinned memory.
            prefetch: gather the next two batches in a thread.

        Raises:
            ValueError: a size below 1, a negative seed, a column that is not mapped, or no window
                fits.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self._arrays = _columns(dataset, keys)
        self._windows = dataset.windows(horizon)
        self._horizon, self._batch_size, self._seed = horizon, batch_size, seed
        self._device = torch.device(device)
        self._given = 0
        self._pool = ThreadPoolExecutor(1, "fastrssm-sampler") if prefetch else None
        self._pending: deque[Future[Batch]] = deque()

    def sample(self) -> Batch:
        """Give the next batch.

        Returns:
            Per column [T, B, size] float32 (flags as 0 and 1), or [T, B, Y, X, 3] uint8 for images.
        """
        if self._pool is None:
            batch = self._gather(self._given)
        else:
            while len(self._pending) < _AHEAD:
                number = self._given + len(self._pending)
                self._pending.append(self._pool.submit(self._gather, number))
            # one that failed stays at the head, so that no batch is ever skipped
            batch = self._pending[0].result()
            self._pending.popleft()
            self._pending.append(self._pool.submit(self._gather, self._given + _AHEAD))
        self._given += 1
        return _to_device(batch, self._device)

    def state_dict(self) -> dict[str, int]:
        """Give the seed, the batches given so far, and the windows they were drawn from."""
        return {"seed": self._seed, "given": self._given, "num_windows": len(self._windows)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue after the batch at which `state_dict` was called.

        Raises:
            ValueError: the state was taken over another number of windows.
        """
        if state["num_windows"] != len(self._windows):
            raise ValueError(
                f"the sampler's state was taken over {state['num_windows']} windows, "
                f"but the dataset has {len(self._windows)}; it or the horizon has changed."
            )
        for future in self._pending:
            future.cancel()
        self._pending.clear()
        self._seed, self._given = state["seed"], state["given"]

    def close(self) -> None:
        """Stop the prefetching thread; sampling afterwards is an error."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pending.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _gather(self, number: int) -> Batch:
        # the counter's last word counts batches; the lower ones are free for the draws of one batch
        stream = np.random.Generator(np.random.Philox(key=self._seed, counter=[0, 0, 0, number]))
        starts = self._windows[stream.integers(len(self._windows), size=self._batch_size)]
        return _gather(self._arrays, starts, self._horizon, pin=self._device.type == "cuda")


@dataclass(frozen=True, eq=False)
class FrameStacks:
    """Windows of a few frames in shuffled epochs without replacement, as the baselines use.

    Attributes:
        arrays: columns of the dataset.
        starts: [W] first frame of every window.
        length: frames in a window: 1 for single rows, k + 1 for k stacked frames and their target.
        device: where the batches are wanted.
    """

    arrays: Mapping[str, npt.NDArray[Any]]
    starts: npt.NDArray[np.int64]
    length: int
    device: torch.device

    @classmethod
    def split(
        cls,
        dataset: Dataset,
        length: int,
        *,
        train_share: float = 0.7,
        by: Split = "episode",
        seed: int = 0,
        keys: Sequence[str] | None = None,
        device: str | torch.device = "cpu",
    ) -> tuple[Self, Self]:
        """Divide the episodes at random into windows to train on and windows to validate on.

        Args:
            dataset: the episodes, at least two.
            length: frames in a window.
            train_share: share to train on, in (0, 1); each side gets at least one.
            by: divide whole episodes, or "window": windows, as AIME did, although those on the two
                sides overlap.
            seed: of the division.
            keys: columns to give. None: all that the dataset has mapped.
            device: where the batches are wanted.

        Raises:
            ValueError: train_share outside (0, 1), an unknown division, fewer than two episodes, a
                column that is not mapped, or a side without a window.
        """
        if not 0.0 < train_share < 1.0:
            raise ValueError(f"train_share must be between 0 and 1, got {train_share}.")
        if dataset.num_episodes < 2:
            raise ValueError(f"{dataset.folder}: one episode cannot be divided into two sides.")
        if by not in get_args(Split):
            raise ValueError(f"by must be one of {', '.join(get_args(Split))}, got {by!r}.")
        windows = dataset.windows(length) if by == "window" else None
        whole = dataset.num_episodes if windows is None else len(windows)
        order = np.random.default_rng(seed).permutation(whole)
        cut = min(max(round(train_share * len(order)), 1), len(order) - 1)
        arrays, place = _columns(dataset, keys), torch.device(device)

        def side(chosen: npt.NDArray[np.int64]) -> Self:
            chosen = np.sort(chosen)
            starts = dataset.windows(length, chosen) if windows is None else windows[chosen]
            return cls(arrays, starts, length, place)

        return side(order[:cut]), side(order[cut:])

    def __len__(self) -> int:
        return len(self.starts)

    def epoch(self, number: int, batch_size: int, seed: int = 0) -> Iterator[Batch]:
        """Give every window once; (seed, number) determines the order.

        Args:
            number: of the epoch, from 0.
            batch_size: windows in a batch.
            seed: of the orders.

        Returns:
            Batches as those of `WindowSampler.sample`, T = length; the last one may be smaller.
        """
        order = np.random.default_rng((seed, number)).permutation(self.starts)
        pin = self.device.type == "cuda"
        for begin in range(0, len(order), batch_size):
            starts = order[begin : begin + batch_size]
            yield _to_device(_gather(self.arrays, starts, self.length, pin=pin), self.device)


def _columns(dataset: Dataset, keys: Sequence[str] | None) -> dict[str, npt.NDArray[Any]]:
    unknown = [key for key in keys or () if key not in dataset.arrays]
    if unknown:
        have = ", ".join(dataset.arrays)
        raise ValueError(f"keys contains {', '.join(unknown)}; the dataset was opened with {have}.")
    return {key: dataset.arrays[key] for key in (keys or dataset.arrays)}


def _gather(
    arrays: Mapping[str, npt.NDArray[Any]],
    starts: npt.NDArray[np.int64],
    length: int,
    *,
    pin: bool,
) -> Batch:
    """Copy windows into new tensors [T, B, ...]; a batch that was given is never overwritten."""
    frames = starts + np.arange(length)[:, None]
    batch: Batch = {}
    for key, array in arrays.items():
        dtype = torch.uint8 if array.dtype == np.uint8 else torch.float32
        # torch's allocator recycles pinned memory once the copies from it are done
        tensor = torch.empty((*frames.shape, *array.shape[1:]), dtype=dtype, pin_memory=pin)
        # for 2500 rows of 24 a compiled loop takes 60 us, this 70; clip spares it a buffer
        np.take(array, frames, axis=0, out=tensor.numpy(), mode="clip")
        batch[key] = tensor
    return batch


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
