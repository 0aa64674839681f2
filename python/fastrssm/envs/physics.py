"""What a task function sees of one environment, and what it may call.

A task is written in Python over a `Physics`: named float64 arrays that lie in MuJoCo's own memory.
numba compiles it to a C function, which the stepping loop calls without the GIL and without a copy.
"""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import math
from typing import Any, NamedTuple

import mujoco
import numba
import numpy as np
from llvmlite import ir
from numba import types  # pyright: ignore[reportPrivateImportUsage]
from numba.extending import intrinsic
from numpy.typing import NDArray

# 624 words of the Mersenne Twister, the place in them, whether a normal draw is kept, its 2 words
RNG_WORDS = 628


class Physics(NamedTuple):
    """One environment's arrays, named as in MuJoCo; float64."""

    qpos: Any  # [nq] generalised positions
    qvel: Any  # [nv] generalised velocities
    act: Any  # [na] actuator activations
    ctrl: Any  # [nu] controls
    xpos: Any  # [nbody, 3] body positions in the world
    xmat: Any  # [nbody, 3, 3] body orientations in the world
    xipos: Any  # [nbody, 3] centres of mass of the bodies in the world
    xanchor: Any  # [njnt, 3] joint anchors in the world
    geom_xpos: Any  # [ngeom, 3] geom positions in the world
    site_xpos: Any  # [nsite, 3] site positions in the world
    sensordata: Any  # [nsensordata] sensor readings
    subtree_com: Any  # [nbody, 3] centre of mass of the subtree
    subtree_linvel: Any  # [nbody, 3] velocity of the centre of mass of the subtree
    subtree_angmom: Any  # [nbody, 3] angular momentum of the subtree
    jnt_type: Any  # [njnt] 0 free, 1 ball, 2 slide, 3 hinge
    jnt_limited: Any  # [njnt] 1 where the joint has a range
    jnt_range: Any  # [njnt, 2] lower and upper end, m or rad
    jnt_qposadr: Any  # [njnt] where the joint begins in qpos
    geom_size: Any  # [ngeom, 3] sizes by type of geom, m
    site_size: Any  # [nsite, 3] the same of sites
    parameters: Any  # [P] what the task's `parameters` name: entries of the model, drawn by resets
    engine: Any  # [3] how `forward` and `reset_data` reach the stepping loop


def arrays_of(model: mujoco.MjModel, data: mujoco.MjData, parameters: Any) -> Physics:
    """Give the arrays of `data` (views) and the constants of `model` (copies) a task reads."""
    views = {name: getattr(data, name) for name in Physics._fields if hasattr(data, name)}
    constants = {
        name: getattr(model, name).astype(np.float64)
        for name in Physics._fields
        if name.startswith(("jnt_", "geom_size", "site_size"))
    }
    views["xmat"] = data.xmat.reshape(model.nbody, 3, 3)
    return Physics(**views, **constants, parameters=parameters, engine=np.zeros(3))


@intrinsic
def _call(typing_context: Any, function: Any, engine: Any) -> Any:
    """Call the C function at address `function` with the word `engine`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, word = arguments
        kind = ir.FunctionType(ir.IntType(64), [ir.IntType(64)])
        return builder.call(builder.inttoptr(address, kind.as_pointer()), [word])

    return types.int64(types.uint64, types.uint64), generate


@numba.njit
def forward(physics: Physics) -> int:
    """Work out everything that follows from the pose, actuators at rest; only inside a reset.

    Returns:
        How many contacts there are.

    Source: dm_control/mujoco/engine.py, Physics.after_reset
    """
    words = physics.engine.view(np.uint64)
    return _call(words[0], words[2])  # pyright: ignore[reportCallIssue] (numba gives the first)


@numba.njit
def reset_data(physics: Physics) -> int:
    """Return to the model's own pose and velocity, then `forward`; only inside a reset."""
    words = physics.engine.view(np.uint64)
    return _call(words[1], words[2])  # pyright: ignore[reportCallIssue] (numba gives the first)


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
    """Draw limited joints from their range, unlimited hinges and orientations from all there are.

    Source: dm_control/suite/utils/randomizers.py, randomize_limited_and_rotational_joints
    """
    for j in range(physics.jnt_type.shape[0]):
        q = int(physics.jnt_qposadr[j])
        if physics.jnt_limited[j]:
            physics.qpos[q] = uniform(rng, physics.jnt_range[j, 0], physics.jnt_range[j, 1])
        elif physics.jnt_type[j] == 3:
            physics.qpos[q] = uniform(rng, -np.pi, np.pi)
        elif physics.jnt_type[j] == 0:
            # a quaternion of uniform draws: not quite uniform over orientations, as in dm_control
            square = 0.0
            for k in range(q + 3, q + 7):
                physics.qpos[k] = uniform(rng, 0.0, 1.0)
                square += physics.qpos[k] * physics.qpos[k]
            # one by one: numba takes two seconds to compile an assignment to a slice
            for k in range(q + 3, q + 7):
                physics.qpos[k] /= math.sqrt(square)


@numba.njit
def ramp(x: float, target: float) -> float:
    """Rise linearly from 0 at x = 0 to 1 at x = target, and stay."""
    return min(max(x / target, 0.0), 1.0)
