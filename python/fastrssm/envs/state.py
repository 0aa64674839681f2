"""A snapshot of all environments of a vector, and what makes one acceptable."""

from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

_PLACE = 624  # the word of a random stream that says which of the 624 before it is next


@dataclass(frozen=True)
class VectorState:
    """All environments at one moment; every field is an array, so that it fits an npz as it is.

    `np.savez(path, **vars(state))` writes it, `VectorState(**np.load(path))` reads it.

    Attributes:
        env_id: [] str; this and the next two say which environments the state belongs to.
        action_repeat: [] int64.
        episode_control_steps: [] int64, control steps of a whole episode.
        is_reset: [] bool, whether reset was ever called.
        physics: [num_envs, P] float64, MuJoCo's integration state.
        parameters: [num_envs, K] float64, entries of the model drawn by the last resets.
        random: [num_envs, W] uint32, the random streams of the resets to come.
        control_steps: [num_envs] int64, control steps of the episode so far.
    """

    env_id: NDArray[np.str_]
    action_repeat: NDArray[np.int64]
    episode_control_steps: NDArray[np.int64]
    is_reset: NDArray[np.bool_]
    physics: NDArray[np.float64]
    parameters: NDArray[np.float64]
    random: NDArray[np.uint32]
    control_steps: NDArray[np.int64]

    def check_like(self, other: "VectorState") -> None:
        """Raise unless this state may replace `other`.

        Raises:
            ValueError: it belongs to another task, num_envs or lengths, or is damaged.
            TypeError: a field has another dtype.
        """
        for name in ("env_id", "action_repeat", "episode_control_steps"):
            value, expected = getattr(self, name), getattr(other, name)
            if not np.array_equal(value, expected):
                raise ValueError(f"state.{name} is {value}, expected {expected}")
        for field in fields(VectorState):
            value, expected = getattr(self, field.name), getattr(other, field.name)
            if value.shape != expected.shape:
                raise ValueError(
                    f"state.{field.name} has shape {value.shape}, expected {expected.shape}"
                )
            if value.dtype != expected.dtype:
                raise TypeError(
                    f"state.{field.name} has dtype {value.dtype}, expected {expected.dtype}"
                )
        # the place in a stream is used as an index without a check
        if (self.random[:, _PLACE] > _PLACE).any():
            raise ValueError(
                f"state.random has {self.random[:, _PLACE].max()} in column {_PLACE}, "
                f"expected at most {_PLACE}"
            )
        most = int(self.episode_control_steps)
        if ((self.control_steps < 0) | (self.control_steps > most)).any():
            raise ValueError(
                f"state.control_steps is {self.control_steps}, expected numbers from 0 to {most}"
            )
