"""What a task function sees of one environment, and how it becomes a C function.

A task is written in Python over a `Physics`: named float64 arrays that lie in MuJoCo's own memory.
numba compiles it to a C function, which the stepping loop calls without the GIL and without a copy.
"""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mujoco
import numba
import numpy as np
from numba import carray, types  # pyright: ignore[reportPrivateImportUsage]
from numpy.typing import NDArray

# 624 words of the Mersenne Twister, the place in them, whether a normal draw is kept, its 2 words
RNG_WORDS = 628


class Physics(NamedTuple):
    """One environment's arrays, named as in MuJoCo; float64."""

    qpos: Any  # [nq] generalised positions
    qvel: Any  # [nv] generalised velocities
    ctrl: Any  # [nu] controls
    xpos: Any  # [nbody, 3] body positions in the world
    xmat: Any  # [nbody, 3, 3] body orientations in the world
    sensordata: Any  # [nsensordata] sensor readings
    subtree_linvel: Any  # [nbody, 3] velocity of the centre of mass of the subtree
    subtree_angmom: Any  # [nbody, 3] angular momentum of the subtree
    jnt_type: Any  # [njnt] 0 free, 1 ball, 2 slide, 3 hinge
    jnt_limited: Any  # [njnt] 1 where the joint has a range
    jnt_range: Any  # [njnt, 2] lower and upper end, m or rad


def arrays_of(model: mujoco.MjModel, data: mujoco.MjData) -> Physics:
    """Give the arrays of `data` (views) and the constants of `model` (copies) a task reads."""
    return Physics(
        qpos=data.qpos,
        qvel=data.qvel,
        ctrl=data.ctrl,
        xpos=data.xpos,
        xmat=data.xmat.reshape(model.nbody, 3, 3),
        sensordata=data.sensordata,
        subtree_linvel=data.subtree_linvel,
        subtree_angmom=data.subtree_angmom,
        jnt_type=model.jnt_type.astype(np.float64),
        jnt_limited=model.jnt_limited.astype(np.float64),
        jnt_range=model.jnt_range.astype(np.float64),
    )


_DOUBLES = types.CPointer(types.float64)
_FIELDS = types.CPointer(_DOUBLES)


def compile_task(
    shapes: Physics,
    observation_size: int,
    reset: Callable[..., None],
    observe: Callable[..., None],
    reward: Callable[..., float],
    finish: Callable[..., float] | None,
) -> dict[str, Any]:
    """Compile the functions of a task to C functions over the addresses of a `Physics`.

    Args:
        shapes: the shape of each array of `Physics`.
        observation_size: width of the concatenated sensors.
        reset: njit (physics, rng): writes the initial pose.
        observe: njit (physics, out): writes the concatenated sensors, out [observation_size].
        reward: njit (physics) -> reward of one control step.
        finish: njit (physics, total) -> reward of the whole step, or None for the sum.

    Returns:
        The compiled functions by name; `.address` is what C++ calls. Keep them while C++ does.
    """
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10 = shapes

    @numba.njit
    def view(p: Any) -> Physics:
        return Physics(
            carray(p[0], s0),
            carray(p[1], s1),
            carray(p[2], s2),
            carray(p[3], s3),
            carray(p[4], s4),
            carray(p[5], s5),
            carray(p[6], s6),
            carray(p[7], s7),
            carray(p[8], s8),
            carray(p[9], s9),
            carray(p[10], s10),
        )

    @numba.cfunc(types.void(_FIELDS, types.CPointer(types.uint32)))
    def c_reset(p: Any, rng: Any) -> None:
        reset(view(p), carray(rng, (RNG_WORDS,)))

    @numba.cfunc(types.void(_FIELDS, _DOUBLES))
    def c_observe(p: Any, out: Any) -> None:
        observe(view(p), carray(out, (observation_size,)))

    @numba.cfunc(types.float64(_FIELDS))
    def c_reward(p: Any) -> float:
        return reward(view(p))

    compiled: dict[str, Any] = {"reset": c_reset, "observe": c_observe, "reward": c_reward}
    if finish is not None:

        @numba.cfunc(types.float64(_FIELDS, types.float64))
        def c_finish(p: Any, total: float) -> float:
            return finish(view(p), total)

        compiled["finish"] = c_finish
    return compiled


def rng_words(random: np.random.RandomState) -> NDArray[np.uint32]:
    """Give the state of `random` as the 628 words that `uniform` and `normal` draw from."""
    state = random.get_state(legacy=False)
    twister = state["state"]
    kept = np.array([state["gauss"]], np.float64).view(np.uint32)
    words = [*twister["key"], twister["pos"], state["has_gauss"], *kept]
    return np.array(words, np.uint32)


@numba.njit
def _next_word(rng: Any) -> Any:
    # the Mersenne Twister of Matsumoto and Nishimura 1998, as numpy.random.RandomState runs it
    if rng[624] == 624:
        for i in range(624):
            y = (rng[i] & np.uint32(0x80000000)) | (rng[(i + 1) % 624] & np.uint32(0x7FFFFFFF))
            twist = np.uint32(0x9908B0DF) if y & np.uint32(1) else np.uint32(0)
            rng[i] = rng[(i + 397) % 624] ^ (y >> np.uint32(1)) ^ twist
        rng[624] = 0
    y = rng[rng[624]]
    rng[624] += np.uint32(1)
    y ^= y >> np.uint32(11)
    y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
    y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
    return y ^ (y >> np.uint32(18))


@numba.njit
def uniform(rng: Any, low: float, high: float) -> float:
    """Draw from [low, high): the very number that `RandomState.uniform` would give."""
    a = _next_word(rng) >> np.uint32(5)
    b = _next_word(rng) >> np.uint32(6)
    return low + (high - low) * ((a * 67108864.0 + b) / 9007199254740992.0)


@numba.njit
def normal(rng: Any) -> float:
    """Draw from the standard normal: the very number that `RandomState.randn` would give."""
    # Marsaglia's polar method makes two draws at once: the second is kept for the next call
    kept = rng[626:628].view(np.float64)
    if rng[625]:
        rng[625] = 0
        return kept[0]
    while True:
        x = uniform(rng, -1.0, 1.0)
        y = uniform(rng, -1.0, 1.0)
        square = x * x + y * y
        if 0 < square < 1:
            break
    factor = math.sqrt(-2.0 * math.log(square) / square)
    kept[0] = factor * x
    rng[625] = 1
    return factor * y


@numba.njit
def randomize_joints(physics: Physics, rng: Any) -> None:
    """Draw limited joints from their range and unlimited hinges from the circle.

    Source: dm_control/suite/utils/randomizers.py, randomize_limited_and_rotational_joints
    """
    for j in range(physics.qpos.shape[0]):
        if physics.jnt_limited[j]:
            physics.qpos[j] = uniform(rng, physics.jnt_range[j, 0], physics.jnt_range[j, 1])
        elif physics.jnt_type[j] == 3:
            physics.qpos[j] = uniform(rng, -np.pi, np.pi)


@numba.njit
def ramp(x: float, target: float) -> float:
    """Rise linearly from 0 at x = 0 to 1 at x = target, and stay."""
    return min(max(x / target, 0.0), 1.0)
