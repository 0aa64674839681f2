"""What AIME rewards in both of its planar bodies, walker and half cheetah.

`_aime1` looks once at the end of the step, `_aime2` is summed over its control steps.
"""

import numba

from fastrssm.envs.physics import Physics, ramp

TORSO = 1


@numba.njit
def flip_aime1(physics: Physics, total: float) -> float:
    """Reward the pitch rate, at the end of the step only."""
    return ramp(physics.qvel[2], 5.0)


@numba.njit
def flipbackward_aime1(physics: Physics, total: float) -> float:
    """Reward the negative pitch rate, at the end of the step only."""
    return ramp(-physics.qvel[2], 5.0)


@numba.njit
def flip_aime2(physics: Physics) -> float:
    """Reward angular momentum about the lateral axis."""
    return ramp(physics.subtree_angmom[TORSO, 1], 5.0)


@numba.njit
def flipbackward_aime2(physics: Physics) -> float:
    """Reward negative angular momentum about the lateral axis."""
    return ramp(-physics.subtree_angmom[TORSO, 1], 5.0)
