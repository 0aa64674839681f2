"""Half cheetah.

Source: dm_control/suite/cheetah.py (run) and AIME's two code bases for the others: `_aime1` rewards
look once at the end of the step, `_aime2` rewards are summed over its control steps.
"""

from typing import Any

import numba

from fastrssm.envs.physics import Physics, ramp, uniform
from fastrssm.envs.tasks.planar import TORSO as TORSO
from fastrssm.envs.tasks.planar import flip_aime1 as flip_aime1
from fastrssm.envs.tasks.planar import flip_aime2 as flip_aime2
from fastrssm.envs.tasks.planar import flipbackward_aime1 as flipbackward_aime1
from fastrssm.envs.tasks.planar import flipbackward_aime2 as flipbackward_aime2
from fastrssm.envs.tasks.rewards import linear


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Draw the limited joints from their ranges; the stepping loop lets the body settle."""
    for j in range(physics.qpos.shape[0]):
        if physics.jnt_limited[j]:
            physics.qpos[j] = uniform(rng, physics.jnt_range[j, 0], physics.jnt_range[j, 1])


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write position (8, without the horizontal one) and velocity (9)."""
    for q in range(8):
        out[q] = physics.qpos[q + 1]
    for v in range(9):
        out[8 + v] = physics.qvel[v]


@numba.njit
def run(physics: Physics) -> float:
    """Reward speed up to 10 m/s."""
    return linear(physics.sensordata[0], 10.0, 10.0, 0.0)


@numba.njit
def runbackward_aime1(physics: Physics, total: float) -> float:
    """Reward the root's backward velocity, at the end of the step only."""
    return ramp(-physics.qvel[0], 10.0)


@numba.njit
def runbackward_aime2(physics: Physics) -> float:
    """Reward backward speed up to 10 m/s."""
    return ramp(-physics.sensordata[0], 10.0)
