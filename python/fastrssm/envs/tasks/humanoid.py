"""Humanoid, to stand and to move.

Source: dm_control/suite/humanoid.py
"""

import math
from typing import Any

import numba

from fastrssm.envs.physics import Physics, forward, randomize_joints
from fastrssm.envs.tasks.egocentric import rotate
from fastrssm.envs.tasks.rewards import gaussian, linear, mean_quadratic

TORSO = 1
HEAD = 2
EXTREMITIES = (16, 10, 13, 7)  # left hand and foot, right hand and foot


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Draw orientation and joints until no part touches another or the floor."""
    while True:
        randomize_joints(physics, rng)
        if forward(physics) == 0:
            break


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write what the body feels: see the names in the table of tasks."""
    for joint in range(21):
        out[joint] = physics.qpos[7 + joint]
    out[21] = physics.xpos[HEAD, 2]
    torso = physics.xpos[TORSO]
    for limb in range(4):
        position = physics.xpos[EXTREMITIES[limb]]
        x, y, z = position[0] - torso[0], position[1] - torso[1], position[2] - torso[2]
        rotate(physics.xmat[TORSO], x, y, z, out[22 + 3 * limb : 25 + 3 * limb])
    for k in range(3):
        out[34 + k] = physics.xmat[TORSO, 2, k]  # torso_vertical: xmat['torso', ['zx', 'zy', 'zz']]
        out[37 + k] = physics.sensordata[k]  # com_velocity: torso_subtreelinvel
    for v in range(27):
        out[40 + v] = physics.qvel[v]


@numba.njit
def observe_state(physics: Physics, out: Any) -> None:
    """Write position (28) and velocity (27)."""
    for q in range(28):
        out[q] = physics.qpos[q]
    for v in range(27):
        out[28 + v] = physics.qvel[v]


@numba.njit
def _upright_at_ease(physics: Physics) -> float:
    # tolerance(head_height, (1.4, inf), margin=1.4 / 4)
    standing = gaussian(max(1.4 - physics.xpos[HEAD, 2], 0.0), 1.4 / 4)
    # tolerance(torso_upright, (0.9, inf), sigmoid='linear', margin=1.9, value_at_margin=0)
    upright = linear(physics.xmat[TORSO, 2, 2], 0.9, 1.9, 0.0)
    # small_control = (4 + small_control) / 5
    return (4 + mean_quadratic(physics.ctrl)) / 5 * (standing * upright)


@numba.njit
def stand(physics: Physics) -> float:
    """Reward standing still with little force."""
    # tolerance(horizontal_velocity, margin=2).mean()
    still = (gaussian(physics.sensordata[0], 2.0) + gaussian(physics.sensordata[1], 2.0)) / 2
    return _upright_at_ease(physics) * still


@numba.njit
def _move(physics: Physics, speed: float) -> float:
    x, y = physics.sensordata[0], physics.sensordata[1]
    # tolerance(com_velocity, (speed, inf), margin=speed, value_at_margin=0, sigmoid='linear')
    move = linear(math.sqrt(x * x + y * y), speed, speed, 0.0)
    return _upright_at_ease(physics) * ((5 * move + 1) / 6)


@numba.njit
def walk(physics: Physics) -> float:
    """Reward standing and 1 m/s in any direction."""
    return _move(physics, 1.0)


@numba.njit
def run(physics: Physics) -> float:
    """Reward standing and 10 m/s in any direction."""
    return _move(physics, 10.0)
