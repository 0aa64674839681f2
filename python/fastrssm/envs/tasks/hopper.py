"""Planar one-legged hopper.

Source: dm_control/suite/hopper.py
"""

import math
from typing import Any

import numba

from fastrssm.envs.physics import Physics, randomize_joints
from fastrssm.envs.tasks.rewards import linear, mean_quadratic

TORSO = 1
FOOT = 5

reset = randomize_joints


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write position (6, without the horizontal one), velocity (7) and touch (2)."""
    for q in range(6):
        out[q] = physics.qpos[q + 1]
    for v in range(7):
        out[6 + v] = physics.qvel[v]
    for s in range(2):
        # log1p(sensordata[['touch_toe', 'touch_heel']])
        out[13 + s] = math.log1p(physics.sensordata[3 + s])


@numba.njit
def _standing(centres: Any) -> float:
    # tolerance(xipos['torso', 'z'] - xipos['foot', 'z'], (0.6, 2))
    height = centres[TORSO, 2] - centres[FOOT, 2]
    return 1.0 if 0.6 <= height <= 2 else 0.0


@numba.njit
def stand(physics: Physics) -> float:
    """Reward a torso high above the foot, with little force."""
    return _standing(physics.xipos) * ((mean_quadratic(physics.ctrl) + 4) / 5)


@numba.njit
def hop(physics: Physics) -> float:
    """Reward a torso high above the foot and 2 m/s forward."""
    return _standing(physics.xipos) * linear(physics.sensordata[0], 2.0, 1.0, 0.5)
