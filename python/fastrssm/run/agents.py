"""The agents that make datasets: uniform noise, and the experts that come with the package."""

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

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]

EXPERTS = Path(fastrssm.data.__file__).parent / "experts"
_LAYERS = ("l0", "l1", "mean")
# in the order in which _forward takes them
_TENSORS = (
    "obs_mean",
    "obs_scale",
    *(f"{layer}.{part}" for layer in _LAYERS for part in ("weight", "bias")),
)


class RandomAgent:
    """Draw every action uniformly from [-1, 1]; an episode's noise depends on its number only."""

    def __init__(self, action_size: int, seed: int = 0):
        self._size, self._seed, self._started = action_size, seed, 0
        self._streams: list[np.random.Generator] = []

    def reset(self, num_envs: int) -> None:
        """Start over with `num_envs` environments; the numbers of the episodes go on."""
        self._streams = [np.random.default_rng(0)] * num_envs

    def act(self, obs: dict[str, Array], is_first: Bools, prev_action: Floats) -> Floats:
        """Draw [N, A] actions."""
        for i in np.flatnonzero(is_first):
            self._streams[i] = np.random.default_rng((self._seed, self._started))
            self._started += 1
        draws = [stream.random(self._size, np.float32) for stream in self._streams]
        return np.stack(draws) * np.float32(2) - np.float32(1)


@dataclass(frozen=True, eq=False)
class Expert:
    """The policy of an expert, which acts by its mode.

    Attributes:
        inputs: sensors in the order in which they are concatenated.
        tensors: "<layer>.<part>" -> float32, matrices as [inputs, outputs]; layers l0 and l1
            (ReLU) and mean; parts weight and bias; and obs_mean, obs_scale.
    """

    inputs: tuple[str, ...]
    tensors: dict[str, Floats]

    @classmethod
    def open(cls, env_id: str, folder: Path | None = None) -> Self:
        """Read the expert of a task; that of the package, unless a folder is named.

        Raises:
            FileNotFoundError: the task has none.
            ValueError: the file cannot be read.
        """
        folder = EXPERTS if folder is None else folder
        path = folder / f"{env_id}.safetensors"
        if not path.is_file():
            have = ", ".join(sorted(p.stem for p in folder.glob("*.safetensors"))) or "none"
            raise FileNotFoundError(f"no expert for {env_id!r} in {folder} (there are: {have}).")
        tensors: dict[str, Floats] = {}
        try:
            with safe_open(path, framework="numpy") as file:
                inputs = tuple(json.loads((file.metadata() or {})["inputs"]))
                for name in _TENSORS:
                    tensor = file.get_tensor(name).astype(np.float32)
                    # inputs first: the product then adds rows, in an order no library changes
                    tensors[name] = np.ascontiguousarray(tensor.T)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{path}: not a file of an expert ({error}).") from error
        return cls(inputs, tensors)

    def reset(self, num_envs: int) -> None:
        """See `Agent`; an expert has no memory."""

    def act(self, obs: dict[str, Array], is_first: Bools, prev_action: Floats) -> Floats:
        """Choose [N, A] actions from the sensors."""
        rows = np.concatenate([obs[key] for key in self.inputs], axis=1)
        mean = np.empty((len(rows), self.tensors["mean.bias"].size), np.float32)
        tensors = tuple(self.tensors[name] for name in _TENSORS)
        _forward(rows.astype(np.float32, copy=False), tensors, mean)
        return np.tanh(mean)


@njit(cache=True)
def _dense(x: Floats, weight: Floats, bias: Floats, out: Floats) -> None:
    out[:] = bias
    for i in range(x.size):
        # half of what follows a ReLU is zero
        if x[i] != 0:
            for j in range(out.size):
                out[j] += x[i] * weight[i, j]


@njit(cache=True)
def _forward(obs: Floats, tensors: tuple[Floats, ...], mean: Floats) -> None:
    """Evaluate the policy row by row, so that no row depends on the others."""
    obs_mean, obs_scale, w0, b0, w1, b1, w_mean, b_mean = tensors
    hidden0, hidden1 = np.empty(b0.size, np.float32), np.empty(b1.size, np.float32)
    for n in range(obs.shape[0]):
        _dense((obs[n] - obs_mean) * obs_scale, w0, b0, hidden0)
        hidden0 = np.maximum(hidden0, np.float32(0))
        _dense(hidden0, w1, b1, hidden1)
        hidden1 = np.maximum(hidden1, np.float32(0))
        _dense(hidden1, w_mean, b_mean, mean[n])
