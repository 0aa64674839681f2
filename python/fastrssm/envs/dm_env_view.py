"""One MuJoCo environment as a `dm_env.Environment`, for code written for dm_control."""

# dm_env ships no type information
# pyright: reportIncompatibleMethodOverride=false

import dm_env
import numpy as np
from dm_env import specs
from numpy.typing import NDArray

from fastrssm.envs.vector_env import MujocoVectorEnv


class DmEnvView(dm_env.Environment):
    """`env`, which has one environment, in dm_env's words.

    Observations, and with them the specs, are `env`'s: of its dtype, and a scalar sensor (the
    walker's height) has shape [1]. With `dtype=np.float64` all else equals dm_control's.

    Args:
        env: with num_envs=1; the view drives it alone.
        seed: of the first episode; later ones go on. None: the stream that `env` has.

    Raises:
        ValueError: env has more than one environment.
    """

    def __init__(self, env: MujocoVectorEnv, *, seed: int | None = None):
        if env.num_envs != 1:
            raise ValueError(f"env has num_envs {env.num_envs}, expected 1")
        self._env = env
        self._seed = seed
        self._starts = True

    def reset(self) -> dm_env.TimeStep:
        """Start a new episode."""
        observation, _ = self._env.reset(seed=self._seed)
        self._seed = None
        self._starts = False
        return dm_env.restart(_row(observation))

    def step(self, action: NDArray[np.floating]) -> dm_env.TimeStep:
        """Take one step; before the first episode and after the last step of one, start a new one.

        Args:
            action: [A], clipped to [-1, 1]; not looked at where an episode starts.

        Raises:
            ValueError: action has another shape or contains NaN.
        """
        if self._starts:
            return self.reset()
        observation, reward, _, truncated, _ = self._env.step(np.asarray(action)[None])
        if truncated[0]:
            self._starts = True
            # the time is over, which is no reason to discount what would follow
            return dm_env.truncation(float(reward[0]), _row(observation))
        return dm_env.transition(float(reward[0]), _row(observation))

    def observation_spec(self) -> dict[str, specs.Array]:
        """Give an array spec per sensor."""
        return {
            name: specs.Array((size,), self._env.single_action_space.dtype, name=name)
            for name, size, _ in self._env.task.sensors
        }

    def action_spec(self) -> specs.BoundedArray:
        """Give the spec of an action [A] in [-1, 1]."""
        space = self._env.single_action_space
        return specs.BoundedArray(space.shape, space.dtype, -1.0, 1.0, name="action")

    def close(self) -> None:
        """Close `env`."""
        self._env.close()


def _row(observation: dict[str, NDArray[np.floating]]) -> dict[str, NDArray[np.floating]]:
    return {name: value[0] for name, value in observation.items()}
