"""Two-link arm in the plane, which reaches for a target.

Source: dm_control/suite/reacher.py
"""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import math
from typing import Any

import mujoco
import numba
import numpy as np

from fastrssm.envs.physics import Physics, randomize_joints, uniform

TARGET = 6
FINGER = 9


def edit_hard(spec: mujoco.MjSpec) -> None:
    """Shrink the target from 0.05 m to 0.015 m."""
    spec.geom("target").size[0] = 0.015


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Draw both joints, then the place of the target: angle, then radius."""
    randomize_joints(physics, rng)
    angle = uniform(rng, 0.0, 2 * np.pi)
    radius = uniform(rng, 0.05, 0.20)
    physics.parameters[0] = radius * math.sin(angle)  # geom_pos['target', 'x']
    physics.parameters[1] = radius * math.cos(angle)  # geom_pos['target', 'y']


@numba.njit
def _to_target(geoms: Any, axis: int) -> float:
    # geom_xpos['target', :2] - geom_xpos['finger', :2]
    return geoms[TARGET, axis] - geoms[FINGER, axis]


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write position (2), to_target (2) and velocity (2)."""
    for i in range(2):
        out[i] = physics.qpos[i]
        out[2 + i] = _to_target(physics.geom_xpos, i)
        out[4 + i] = physics.qvel[i]


@numba.njit
def reach(physics: Physics) -> float:
    """Reward a finger that touches the target."""
    x = _to_target(physics.geom_xpos, 0)
    y = _to_target(physics.geom_xpos, 1)
    # tolerance(norm(finger_to_target), (0, geom_size[['target', 'finger'], 0].sum()))
    radii = physics.geom_size[TARGET, 0] + physics.geom_size[FINGER, 0]
    return 1.0 if math.sqrt(x * x + y * y) <= radii else 0.0
