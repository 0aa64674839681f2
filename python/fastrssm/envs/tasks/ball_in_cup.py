"""Ball on a string, to be caught in a cup.

Source: dm_control/suite/ball_in_cup.py
"""

from typing import Any

import numba

from fastrssm.envs.physics import Physics, forward, uniform

BALL = 2  # body
TARGET = 1  # site
BALL_GEOM = 6  # geom


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Draw the place of the ball until it touches nothing."""
    while True:
        physics.qpos[2] = uniform(rng, -0.2, 0.2)
        physics.qpos[3] = uniform(rng, 0.2, 0.5)
        if forward(physics) == 0:
            break


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write position (4) and velocity (4)."""
    for q in range(4):
        out[q] = physics.qpos[q]
        out[4 + q] = physics.qvel[q]


@numba.njit
def catch(physics: Physics) -> float:
    """Reward a ball that is wholly inside the cup."""
    for axis in (0, 2):
        # abs(ball_to_target) < target_size - ball_size
        distance = abs(physics.site_xpos[TARGET, axis] - physics.xpos[BALL, axis])
        if distance >= physics.site_size[TARGET, axis] - physics.geom_size[BALL_GEOM, 0]:
            return 0.0
    return 1.0
