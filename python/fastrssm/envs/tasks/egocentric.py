"""Vectors as the torso sees them."""

from typing import Any

import numba


@numba.njit
def rotate(frame: Any, x: float, y: float, z: float, out: Any) -> None:
    """Write the vector (x, y, z) of the world in the axes of a body.

    numpy leaves this product to BLAS, which may fuse multiplications with additions: the results
    agree to a few units in the last place of the largest of the three terms.

    Args:
        frame: [3, 3] the body's orientation, a row of xmat.
        x: first component in the world.
        y: second component.
        z: third component.
        out: [3], is written.

    Source: vector.dot(frame) in dm_control/suite/humanoid.py and quadruped.py
    """
    for k in range(3):
        out[k] = x * frame[0, k] + y * frame[1, k] + z * frame[2, k]
