"""Pendulum, to be swung up and held.

Source: dm_control/suite/pendulum.py
"""

from typing import Any

import numba
import numpy as np

from fastrssm.envs.physics import Physics, uniform

POLE = 1
_COSINE_BOUND = float(np.cos(np.deg2rad(8)))


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Draw the angle from the circle."""
    physics.qpos[0] = uniform(rng, -np.pi, np.pi)


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write orientation (2) and velocity (1)."""
    out[0] = physics.xmat[POLE, 2, 2]  # xmat['pole', ['zz', 'xz']]
    out[1] = physics.xmat[POLE, 0, 2]
    out[2] = physics.qvel[0]


@numba.njit
def swingup(physics: Physics) -> float:
    """Reward a pole within 8 degrees of the vertical."""
    # tolerance(pole_vertical, (cos(8 degrees), 1))
    return 1.0 if _COSINE_BOUND <= physics.xmat[POLE, 2, 2] <= 1 else 0.0
