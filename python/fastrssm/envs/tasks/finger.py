"""Finger that spins a free body, or turns its tip to a target.

Source: dm_control/suite/finger.py
"""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import math
from typing import Any

import mujoco
import numba
import numpy as np

from fastrssm.envs.physics import Physics, forward, randomize_joints, uniform

HINGE = 2  # a joint
CAP = 5  # a geom of the body that spins
TARGET = 0  # a site

# where the readings begin in sensordata
_TIP = 5
_TARGET = 8
_SPINNER = 11
_TOUCH = 14


def edit_spin(spec: mujoco.MjSpec) -> None:
    """Let the body spin more freely and hide what belongs to the other tasks."""
    spec.joint("hinge").damping[0] = 0.03
    for name in ("target", "tip"):
        spec.site(name).rgba[3] = 0


def edit_turn_easy(spec: mujoco.MjSpec) -> None:
    """Grow the target from 0.03 m to 0.07 m."""
    spec.site("target").size[0] = 0.07


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Draw the joints until nothing touches."""
    randomize_joints(physics, rng)
    while forward(physics) > 0:
        randomize_joints(physics, rng)


@numba.njit
def reset_target(physics: Physics, rng: Any) -> None:
    """Draw the place of the target on the circle of the body's tip, then the joints."""
    angle = uniform(rng, -np.pi, np.pi)
    size = physics.geom_size[CAP]
    radius = size[0] + size[1] + size[2]  # geom_size['cap1'].sum()
    # site_pos['target', ['x', 'z']]
    physics.parameters[0] = physics.xanchor[HINGE, 0] + radius * math.sin(angle)
    physics.parameters[1] = physics.xanchor[HINGE, 2] + radius * math.cos(angle)
    reset(physics, rng)


@numba.njit
def _from_spinner(readings: Any, sensor: int, axis: int) -> float:
    # sensordata[sensor][axis] - sensordata['spinner'][axis]
    return readings[sensor + axis] - readings[_SPINNER + axis]


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write position (4), velocity (3) and touch (2)."""
    readings = physics.sensordata
    out[0] = readings[0]
    out[1] = readings[1]
    out[2] = _from_spinner(readings, _TIP, 0)
    out[3] = _from_spinner(readings, _TIP, 2)
    for v in range(3):
        out[4 + v] = readings[2 + v]
    for s in range(2):
        # log1p(sensordata[['touchtop', 'touchbottom']])
        out[7 + s] = math.log1p(readings[_TOUCH + s])


@numba.njit
def _distance_to_target(readings: Any, radius: float) -> float:
    # norm(target_position - tip_position) - site_size['target', 0]
    x = _from_spinner(readings, _TARGET, 0) - _from_spinner(readings, _TIP, 0)
    z = _from_spinner(readings, _TARGET, 2) - _from_spinner(readings, _TIP, 2)
    return math.sqrt(x * x + z * z) - radius


@numba.njit
def observe_target(physics: Physics, out: Any) -> None:
    """Write what `observe` does, then target_position (2) and dist_to_target (1)."""
    observe(physics, out)
    out[9] = _from_spinner(physics.sensordata, _TARGET, 0)
    out[10] = _from_spinner(physics.sensordata, _TARGET, 2)
    out[11] = _distance_to_target(physics.sensordata, physics.site_size[TARGET, 0])


@numba.njit
def spin(physics: Physics) -> float:
    """Reward a body that spins at 15 rad/s or more."""
    return 1.0 if physics.sensordata[4] <= -15 else 0.0


@numba.njit
def turn(physics: Physics) -> float:
    """Reward a tip inside the target."""
    distance = _distance_to_target(physics.sensordata, physics.site_size[TARGET, 0])
    return 1.0 if distance <= 0 else 0.0
