"""The soft bounds that rewards are made of.

Source: dm_control/utils/rewards.py, tolerance; the same order of operations, so the same bits.
"""

import math
from typing import Any

import numba
import numpy as np

_GAUSSIAN = math.sqrt(-2 * math.log(0.1))


@numba.njit
def gaussian(x: float, margin: float) -> float:
    """Fall from 1 at x = 0 as a bell, which is 0.1 at a margin.

    Source: tolerance(x, margin=margin); with max(lower - x, 0) for x: bounds=(lower, inf)
    """
    d = x / margin * _GAUSSIAN
    return math.exp(-0.5 * (d * d))


@numba.njit
def linear(x: float, lower: float, margin: float, value_at_margin: float) -> float:
    """Rise linearly to 1 at x = lower, through value_at_margin a margin before.

    Source: tolerance(x, (lower, inf), margin, 'linear', value_at_margin)
    """
    if x >= lower:
        return 1.0
    d = (lower - x) / margin * (1 - value_at_margin)
    return 1 - d if d < 1 else 0.0


@numba.njit
def quadratic(x: float) -> float:
    """Fall from 1 at x = 0 to 0 at x = -1 and 1, and stay.

    Source: tolerance(x, margin=1, value_at_margin=0, sigmoid='quadratic')
    """
    return max(1 - x * x, 0.0)


@numba.njit
def mean_quadratic(x: Any) -> float:
    """Average `quadratic` over x [K], K < 128, adding in numpy's order.

    Source: tolerance(x, margin=1, value_at_margin=0, sigmoid='quadratic').mean()
    """
    size = x.shape[0]
    if size < 8:
        total = 0.0
        for k in range(size):
            total += quadratic(x[k])
        return total / size
    # numpy adds eight interleaved sums, pair by pair, then what is left over
    s = np.zeros(8)
    whole = size - size % 8
    for k in range(whole):
        s[k % 8] += quadratic(x[k])
    total = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]))
    for k in range(whole, size):
        total += quadratic(x[k])
    return total / size
