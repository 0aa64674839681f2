"""Cart and pole, starting near the top; all but the start is `cartpole`'s.

Source: dm_control/suite/cartpole.py
"""

from typing import Any

import numba

from fastrssm.envs.physics import Physics, normal, uniform
from fastrssm.envs.tasks.cartpole import observe, smooth, sparse

__all__ = ["observe", "reset", "smooth", "sparse"]


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Put the cart near the middle and the pole near the vertical, hardly moving."""
    physics.qpos[0] = uniform(rng, -0.1, 0.1)
    physics.qpos[1] = uniform(rng, -0.034, 0.034)
    for v in range(2):
        physics.qvel[v] = 0.01 * normal(rng)
