"""Planar walker.

Source: dm_control/suite/walker.py (stand, walk, run) and AIME's two code bases for the others:
`_aime1` looks once at the end of the step, `_aime2` is summed over its control steps.
"""

from typing import Any

import numba

from fastrssm.envs.physics import Physics, ramp, randomize_joints
from fastrssm.envs.tasks.planar import TORSO as TORSO
from fastrssm.envs.tasks.planar import flip_aime1 as flip_aime1
from fastrssm.envs.tasks.planar import flip_aime2 as flip_aime2
from fastrssm.envs.tasks.planar import flipbackward_aime1 as flipbackward_aime1
from fastrssm.envs.tasks.planar import flipbackward_aime2 as flipbackward_aime2
from fastrssm.envs.tasks.rewards import gaussian, linear

reset = randomize_joints


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write orientations (14), height (1) and velocity (9)."""
    for body in range(1, 8):
        out[2 * body - 2] = physics.xmat[body, 0, 0]  # xmat[1:, ['xx', 'xz']]
        out[2 * body - 1] = physics.xmat[body, 0, 2]
    out[14] = physics.xpos[TORSO, 2]  # torso_height
    for v in range(9):
        out[15 + v] = physics.qvel[v]


@numba.njit
def stand(physics: Physics) -> float:
    """Reward an upright torso at its full height."""
    # tolerance(torso_height, (1.2, inf), margin=0.6)
    standing = gaussian(max(1.2 - physics.xpos[TORSO, 2], 0.0), 0.6)
    upright = (1 + physics.xmat[TORSO, 2, 2]) / 2
    return (3 * standing + upright) / 4


@numba.njit
def _move(physics: Physics, amount: float) -> float:
    return stand(physics) * (5 * amount + 1) / 6


@numba.njit
def walk(physics: Physics) -> float:
    """Reward standing and 1 m/s forward."""
    return _move(physics, linear(physics.sensordata[0], 1.0, 0.5, 0.5))


@numba.njit
def run(physics: Physics) -> float:
    """Reward standing and 8 m/s forward."""
    return _move(physics, linear(physics.sensordata[0], 8.0, 4.0, 0.5))


@numba.njit
def walkbackward_aime1(physics: Physics, total: float) -> float:
    """Scale the summed stand reward by the first joint's velocity, which is the vertical one."""
    return total * (5 * ramp(-physics.qvel[0], 1.0) + 1) / 6


@numba.njit
def runbackward_aime1(physics: Physics, total: float) -> float:
    """Scale the summed stand reward by the first joint's velocity, which is the vertical one."""
    return total * (5 * ramp(-physics.qvel[0], 8.0) + 1) / 6


@numba.njit
def jump_aime1(physics: Physics, total: float) -> float:
    """Reward the height of the torso, at the end of the step only."""
    return ramp(physics.xpos[TORSO, 2], 5.0)


@numba.njit
def walkbackward_aime2(physics: Physics) -> float:
    """Reward standing and 1 m/s backward."""
    return _move(physics, ramp(-physics.sensordata[0], 1.0))


@numba.njit
def runbackward_aime2(physics: Physics) -> float:
    """Reward standing and 8 m/s backward."""
    return _move(physics, ramp(-physics.sensordata[0], 8.0))


@numba.njit
def jump_aime2(physics: Physics) -> float:
    """Reward standing and 2 m/s upward."""
    return stand(physics) * ramp(physics.sensordata[2], 2.0)
