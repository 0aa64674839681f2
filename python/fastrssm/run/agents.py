"""The agents that make the datasets: uniform noise, and policies stored along their learning."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
from numba import njit
from safetensors import SafetensorError, safe_open

import fastrssm.data
from fastrssm.data.episode import Array
from fastrssm.data.recipes import PREFILL_EPISODES

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

EXPERTS = Path(fastrssm.data.__file__).parent / "experts"
_LAYERS = ("l0", "l1", "mean", "log_std")
# in the order in which _forward takes them
_TENSORS = (
    "obs_mean",
    "obs_scale",
    *(f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")),
)
# limits of the learner's log_std
_LOG_STD = (-20.0, 2.0)


class _Streams:
    """Number the episodes of an agent's environments; each has its own stream of noise."""

    def __init__(self, seed: int):
        self._seed, self._started = seed, 0
        self.number = np.zeros(0, np.int64)
        self._streams: list[np.random.Generator] = []

    def reset(self, num_envs: int) -> None:
        self.number = np.full(num_envs, -1)
        self._streams = [np.random.default_rng(0)] * num_envs

    def begin(self, is_first: Bools) -> None:
        for i in np.flatnonzero(is_first):
            self.number[i] = self._started
            self._streams[i] = np.random.default_rng((self._seed, self._started))
            self._started += 1

    def uniform(self, size: int, where: npt.NDArray[np.int64]) -> Floats:
        draws = [self._streams[i].random(size, np.float32) for i in where]
        return np.stack(draws) * np.float32(2) - np.float32(1)

    def normal(self, size: int) -> Floats:
        return np.stack([stream.standard_normal(size, np.float32) for stream in self._streams])


class RandomAgent:
    """Draw every action uniformly from [-1, 1]; an episode's noise depends on its number only."""

    def __init__(self, action_size: int, seed: int = 0):
        self._size = action_size
        self._streams = _Streams(seed)

    def reset(self, num_envs: int) -> None:
        """Start over with `num_envs` environments; the numbers of the episodes go on."""
        self._streams.reset(num_envs)

    def act(self, obs: dict[str, Array], is_first: Bools, prev_action: Floats) -> Floats:
        """Draw [N, A] actions."""
        self._streams.begin(is_first)
        return self._streams.uniform(self._size, np.arange(len(is_first)))


@dataclass(frozen=True, eq=False)
class Snapshots:
    """Policies of one task along its learning.

    Attributes:
        inputs: sensors in the order in which they are concatenated.
        steps: [K] decision steps that each had learned from, ascending; the last is the expert.
        tensors: "<layer>.<part>" -> [K, ...] float32, matrices as [K, inputs, outputs]; layers l0
            and l1 (ReLU), mean, log_std; parts weight and bias; and obs_mean, obs_scale.
    """

    inputs: tuple[str, ...]
    steps: npt.NDArray[np.float64]
    tensors: dict[str, Floats]

    @classmethod
    def open(cls, env_id: str, folder: Path | None = None) -> Self:
        """Read the snapshots of a task; those of the package, unless a folder is named.

        Raises:
            FileNotFoundError: the task has none.
            ValueError: the file cannot be read.
        """
        folder = EXPERTS if folder is None else folder
        path = folder / f"{env_id}.safetensors"
        if not path.is_file():
            have = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
            raise FileNotFoundError(
                f"no policy snapshots for {env_id!r} in {folder} (there are: {have})."
            )
        tensors: dict[str, Floats] = {}
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                steps = np.array(json.loads(metadata["steps"]), np.float64)
                inputs = tuple(json.loads(metadata["inputs"]))
                for name in _TENSORS:
                    parts = [file.get_tensor(f"snapshot_{k}.{name}") for k in range(len(steps))]
                    stacked = np.stack(parts).astype(np.float32)
                    # inputs first: the product then adds rows, in an order no library changes
                    swap = name.endswith("weight")
                    tensors[name] = np.ascontiguousarray(
                        stacked.swapaxes(1, 2) if swap else stacked
                    )
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a file of policy snapshots ({error}).") from error
        return cls(inputs, steps, tensors)


class SnapshotAgent:
    """Act as a policy did along its learning ("buffer"), or as it does at the end ("expert").

    An environment's actions depend on the number of its episode only, not on how many environments
    there are.

    Source:
        AIME (OpenReview WjlCQxpuxU): a buffer is a learner's replay, its first episodes random.
    """

    def __init__(self, snapshots: Snapshots, episodes: int | None = None, seed: int = 0):
        """Prepare.

        Args:
            snapshots: the policies.
            episodes: episodes of the whole buffer: episode i plays the policy nearest to i/episodes
                of the learning, the first five are random, actions are sampled. None: the expert,
                whose actions are the mode.
            seed: of the noise.
        """
        self._snapshots, self._episodes = snapshots, episodes
        self._size = snapshots.tensors["mean.bias"].shape[1]
        self._streams = _Streams(seed)
        self._which = np.zeros(0, np.int64)

    def reset(self, num_envs: int) -> None:
        """Start over with `num_envs` environments; the numbers of the episodes go on."""
        self._streams.reset(num_envs)

    def act(self, obs: dict[str, Array], is_first: Bools, prev_action: Floats) -> Floats:
        """Choose [N, A] actions from the sensors."""
        if is_first.any():
            self._streams.begin(is_first)
            self._which = self._choose(self._streams.number)
        s = self._snapshots
        rows = np.concatenate([obs[key] for key in s.inputs], axis=1).astype(np.float32, copy=False)
        mean = np.empty((len(rows), self._size), np.float32)
        log_std = np.empty_like(mean)
        _forward(rows, self._which, tuple(s.tensors[name] for name in _TENSORS), mean, log_std)
        if self._episodes is None:
            return np.tanh(mean)
        std = np.exp(np.clip(log_std, *_LOG_STD))
        action = np.tanh(mean + std * self._streams.normal(self._size))
        random = np.flatnonzero(self._streams.number < PREFILL_EPISODES)
        if random.size:
            action[random] = self._streams.uniform(self._size, random)
        return action

    def _choose(self, number: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        steps = self._snapshots.steps
        if self._episodes is None:
            return np.full(len(number), len(steps) - 1)
        place = number / self._episodes * steps[-1]
        return np.abs(place[:, None] - steps).argmin(axis=1)


@njit(cache=True)
def _dense(x: Floats, weight: Floats, bias: Floats, out: Floats) -> None:
    out[:] = bias
    for i in range(x.size):
        # half of what follows a ReLU is zero
        if x[i] != 0:
            for j in range(out.size):
                out[j] += x[i] * weight[i, j]


@njit(cache=True)
def _forward(
    obs: Floats,
    which: npt.NDArray[np.int64],
    tensors: tuple[Floats, ...],
    mean: Floats,
    log_std: Floats,
) -> None:
    """Evaluate policy which[n] on obs[n]; row by row, so that no row depends on the others."""
    obs_mean, obs_scale, w0, b0, w1, b1, w_mean, b_mean, w_log_std, b_log_std = tensors
    hidden0 = np.empty(b0.shape[1], np.float32)
    hidden1 = np.empty(b1.shape[1], np.float32)
    for n in range(obs.shape[0]):
        k = which[n]
        _dense((obs[n] - obs_mean[k]) * obs_scale[k], w0[k], b0[k], hidden0)
        hidden0 = np.maximum(hidden0, np.float32(0))
        _dense(hidden0, w1[k], b1[k], hidden1)
        hidden1 = np.maximum(hidden1, np.float32(0))
        _dense(hidden1, w_mean[k], b_mean[k], mean[n])
        _dense(hidden1, w_log_std[k], b_log_std[k], log_std[n])
