"""Cart and pole: swing up from below, or balance near the top.

Source: dm_control/suite/cartpole.py
"""

from typing import Any

import numba
import numpy as np

from fastrssm.envs.physics import Physics, normal, uniform
from fastrssm.envs.tasks.rewards import gaussian, quadratic

POLE = 2


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Hang the pole below a cart in the middle, with a little noise on everything."""
    physics.qpos[0] = 0.01 * normal(rng)
    physics.qpos[1] = np.pi + 0.01 * normal(rng)
    for v in range(2):
        physics.qvel[v] = 0.01 * normal(rng)


@numba.njit
def reset_near_top(physics: Physics, rng: Any) -> None:
    """Put the cart near the middle and the pole near the vertical, hardly moving."""
    physics.qpos[0] = uniform(rng, -0.1, 0.1)
    physics.qpos[1] = uniform(rng, -0.034, 0.034)
    for v in range(2):
        physics.qvel[v] = 0.01 * normal(rng)


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write position (3) and velocity (2)."""
    out[0] = physics.qpos[0]
    out[1] = physics.xmat[POLE, 2, 2]  # xmat[2:, ['zz', 'xz']]
    out[2] = physics.xmat[POLE, 0, 2]
    out[3] = physics.qvel[0]
    out[4] = physics.qvel[1]


@numba.njit
def smooth(physics: Physics) -> float:
    """Reward an upright, slow pole over a cart in the middle, with little force."""
    upright = (physics.xmat[POLE, 2, 2] + 1) / 2
    # (1 + tolerance(cart_position, margin=2)) / 2
    centered = (1 + gaussian(physics.qpos[0], 2.0)) / 2
    # (4 + tolerance(control, margin=1, value_at_margin=0, sigmoid='quadratic')) / 5
    small_control = (4 + quadratic(physics.ctrl[0])) / 5
    # (1 + tolerance(angular_vel, margin=5)) / 2
    small_velocity = (1 + gaussian(physics.qvel[1], 5.0)) / 2
    return upright * small_control * small_velocity * centered


@numba.njit
def sparse(physics: Physics) -> float:
    """Reward a pole that stands while the cart is near the middle."""
    # tolerance(cart_position, (-.25, .25)) * tolerance(pole_angle_cosine, (.995, 1))
    centered = -0.25 <= physics.qpos[0] <= 0.25
    return 1.0 if centered and 0.995 <= physics.xmat[POLE, 2, 2] <= 1 else 0.0
