"""Four-legged body, to walk, run and fetch a ball.

Actions are in [-1, 1] as everywhere: MuJoCo clips them to an actuator's own range where that is
narrower, and the last tenth of the range of `lift`, which ends at 1.1, is out of reach.

Source: dm_control/suite/quadruped.py
"""

# mujoco ships no type information
# pyright: reportAttributeAccessIssue=false

import math
from typing import Any

import mujoco
import numba
import numpy as np

from fastrssm.envs.physics import Physics, forward, normal, reset_data, uniform
from fastrssm.envs.tasks.egocentric import rotate
from fastrssm.envs.tasks.rewards import linear

TORSO = 1  # bodies
BALL = 18
TARGET = 0  # sites and geoms of the model of fetch
WORKSPACE = 3
FLOOR = 0
BALL_GEOM = 24


def edit_walk(spec: mujoco.MjSpec) -> None:
    """Leave a floor as wide as an episode of walking is long."""
    _bare_floor(spec, 10)


def edit_run(spec: mujoco.MjSpec) -> None:
    """Leave a floor as wide as an episode of running is long."""
    _bare_floor(spec, 100)


def edit_fetch(spec: mujoco.MjSpec) -> None:
    """Remove terrain and range finders, keep walls, ball and target."""
    spec.delete(spec.geom("terrain"))
    for sensor in spec.sensors:
        if sensor.type == mujoco.mjtSensor.mjSENS_RANGEFINDER:
            spec.delete(sensor)


def _bare_floor(spec: mujoco.MjSpec, size: float) -> None:
    edit_fetch(spec)
    spec.geom("floor").size = (size, size, 0.5)
    for wall in ("wall_px", "wall_py", "wall_nx", "wall_ny"):
        spec.delete(spec.geom(wall))
    spec.delete(spec.body("ball"))
    spec.delete(spec.site("target"))


@numba.njit
def _place(physics: Physics, x: float, y: float, orientation: Any) -> None:
    """Raise the body by 1 cm until it touches nothing."""
    z = 0.0
    while True:
        reset_data(physics)
        physics.qpos[0], physics.qpos[1], physics.qpos[2] = x, y, z
        for k in range(4):
            physics.qpos[3 + k] = orientation[k]
        if forward(physics) == 0:
            break
        z += 0.01


@numba.njit
def reset(physics: Physics, rng: Any) -> None:
    """Draw any orientation and put the body just above the floor."""
    orientation = np.empty(4)
    square = 0.0
    for k in range(4):
        orientation[k] = normal(rng)
        square += orientation[k] * orientation[k]
    _place(physics, 0.0, 0.0, orientation / math.sqrt(square))


@numba.njit
def reset_fetch(physics: Physics, rng: Any) -> None:
    """Draw place and heading of the body, and a ball that falls from 2 m."""
    half_azimuth = uniform(rng, 0.0, 2 * np.pi) / 2
    orientation = np.array([math.cos(half_azimuth), 0.0, 0.0, math.sin(half_azimuth)])
    radius = 0.9 * physics.geom_size[FLOOR, 0]
    x = uniform(rng, -radius, radius)
    y = uniform(rng, -radius, radius)
    _place(physics, x, y, orientation)
    physics.qpos[23] = uniform(rng, -radius, radius)
    physics.qpos[24] = uniform(rng, -radius, radius)
    physics.qpos[25] = 2.0
    physics.qvel[22] = 5 * normal(rng)
    physics.qvel[23] = 5 * normal(rng)


@numba.njit
def observe(physics: Physics, out: Any) -> None:
    """Write what the body feels: see the names in the table of tasks."""
    for hinge in range(16):  # egocentric_state
        out[hinge] = physics.qpos[7 + hinge]
        out[16 + hinge] = physics.qvel[6 + hinge]
    for a in range(12):
        out[32 + a] = physics.act[a]
    for k in range(3):
        out[44 + k] = physics.sensordata[6 + k]  # torso_velocity: velocimeter
    out[47] = physics.xmat[TORSO, 2, 2]  # torso_upright
    for k in range(6):
        out[48 + k] = physics.sensordata[k]  # imu: accelerometer and gyro
    for k in range(24):
        out[54 + k] = math.asinh(physics.sensordata[9 + k])  # force_torque


@numba.njit
def observe_fetch(physics: Physics, out: Any) -> None:
    """Write what the body feels, then where ball and target are, seen from the torso."""
    observe(physics, out)
    frame = physics.xmat[TORSO]
    torso, ball, target = physics.xpos[TORSO], physics.xpos[BALL], physics.site_xpos[TARGET]
    own, roll = physics.qvel[:3], physics.qvel[22:28]
    # ball_state: relative position and velocity, then spin
    rotate(frame, ball[0] - torso[0], ball[1] - torso[1], ball[2] - torso[2], out[78:81])
    rotate(frame, roll[0] - own[0], roll[1] - own[1], roll[2] - own[2], out[81:84])
    rotate(frame, roll[3], roll[4], roll[5], out[84:87])
    rotate(frame, target[0] - torso[0], target[1] - torso[1], target[2] - torso[2], out[87:90])


@numba.njit
def _upright(xmat: Any) -> float:
    # tolerance(torso_upright, (1, inf), sigmoid='linear', margin=2, value_at_margin=0)
    return linear(xmat[TORSO, 2, 2], 1.0, 2.0, 0.0)


@numba.njit
def walk(physics: Physics) -> float:
    """Reward an upright torso and 0.5 m/s forward."""
    return _upright(physics.xmat) * linear(physics.sensordata[6], 0.5, 0.5, 0.5)


@numba.njit
def run(physics: Physics) -> float:
    """Reward an upright torso and 5 m/s forward."""
    return _upright(physics.xmat) * linear(physics.sensordata[6], 5.0, 5.0, 0.5)


@numba.njit
def _near(a: Any, b: Any, reach: float, margin: float) -> float:
    # tolerance(norm(a - b), (0, reach), sigmoid='linear', margin=arena_radius, value_at_margin=0)
    x, y = a[0] - b[0], a[1] - b[1]
    return linear(-math.sqrt(x * x + y * y), -reach, margin, 0.0)


@numba.njit
def fetch(physics: Physics) -> float:
    """Reward reaching the ball, and more so when it is on the target."""
    ball = physics.xpos[BALL]
    arena_radius = physics.geom_size[FLOOR, 0] * math.sqrt(2.0)
    reach = physics.site_size[WORKSPACE, 0] + physics.geom_size[BALL_GEOM, 0]
    reached = _near(physics.site_xpos[WORKSPACE], ball, reach, arena_radius)
    fetched = _near(physics.site_xpos[TARGET], ball, physics.site_size[TARGET, 0], arena_radius)
    return _upright(physics.xmat) * (reached * (0.5 + 0.5 * fetched))
