"""A task of the user's own: a model file and one Python module."""

import dataclasses
import sys

import gymnasium
import numpy as np
import pytest

from fastrssm.envs import TASKS, Task, find_task, make_vec, register_task
from fastrssm.envs.model import load_model, parameter_views

MODEL = """<mujoco>
  <option timestep="0.01"/>
  <worldbody>
    <site name="mark" pos="0 0 1"/>
    <body name="cart">
      <joint name="slide" type="slide" axis="1 0 0" damping="1"/>
      <geom name="box" type="box" size=".1 .1 .1" mass="1"/>
    </body>
  </worldbody>
  <actuator><motor joint="slide" gear="10"/></actuator>
</mujoco>"""
MODULE = """
import numba
from fastrssm.envs import Task, register_task
from fastrssm.envs.physics import uniform

def heavy(spec):
    spec.geom("box").mass = 2.0

@numba.njit
def reset(physics, rng):
    physics.qpos[0] = uniform(rng, -0.5, 0.5)
    physics.parameters[0] = uniform(rng, 0.0, 5.0)

@numba.njit
def observe(physics, out):
    out[0] = physics.qpos[0]
    out[1] = physics.qvel[0]

@numba.njit
def centre(physics):
    return 1.0 - abs(physics.qpos[0])

def slow(physics):
    return 0.0

@numba.njit
def short(physics, total):
    return total / 2.0

register_task("slider-centre", Task(
    domain=__name__, model={model!r}, reward="centre", control_timestep=0.02, action_size=1,
    sensors=(("position", 1, "first"), ("velocity", 1, "second")), episode_steps=10,
    parameters=("dof_damping[slide]",),
))
"""


@pytest.fixture
def env_id(tmp_path, monkeypatch):
    (tmp_path / "slider.xml").write_text(MODEL)
    (tmp_path / "my_tasks.py").write_text(
        MODULE.replace("{model!r}", repr(str(tmp_path / "slider.xml")))
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_tasks:slider-centre"
    TASKS.pop("slider-centre", None)
    gymnasium.registry.pop("fastrssm/slider-centre-v0", None)
    sys.modules.pop("my_tasks", None)


def one_step(position, damping, action, mass=1.0):
    """Two substeps of MuJoCo's Euler integration with implicit damping, from rest."""
    velocity = 0.0
    for _ in range(4):
        velocity += 0.01 * (10 * action - damping * velocity) / (mass + 0.01 * damping)
        position += 0.01 * velocity
    return position, velocity


def test_it_steps_with_the_parameters_each_reset_drew(env_id):
    env = make_vec(env_id, 3, num_threads=2, dtype=np.float64)
    start, _ = env.reset(seed=0)
    damping = env.parameters[:, 0].copy()
    assert len(set(damping)) == 3
    action = np.array([[0.5], [-1.0], [0.25]])
    after, reward, *_ = env.step(action)
    for n in range(3):
        expected = one_step(start["position"][n, 0], damping[n], action[n, 0])
        np.testing.assert_allclose(
            [after["position"][n, 0], after["velocity"][n, 0]], expected, rtol=1e-12
        )
    assert reward.shape == (3,)
    assert env.model.dof_damping[0] == 1.0


def test_a_state_brings_its_parameters_along(env_id):
    env, other = make_vec(env_id, 2, dtype=np.float64), make_vec(env_id, 2, dtype=np.float64)
    env.reset(seed=1)
    other.set_state(env.state())
    np.testing.assert_array_equal(env.parameters, other.parameters)
    for _ in range(12):  # past an automatic reset
        one, two = env.step(np.ones((2, 1))), other.step(np.ones((2, 1)))
        np.testing.assert_array_equal(one[0]["position"], two[0]["position"])


def test_gymnasium_and_a_plain_task_find_it(env_id):
    env = gymnasium.make_vec("my_tasks:fastrssm/slider-centre-v0", num_envs=2)
    env.reset(seed=0)
    assert make_vec(find_task(env_id), 1).single_action_space.shape == (1,)
    with pytest.raises(ValueError, match="another task"):
        register_task("slider-centre", TASKS["walker-walk"])


def test_edit_changes_the_model(env_id):
    task = dataclasses.replace(find_task(env_id), edit="heavy")
    assert load_model(task).body_mass[1] == 2.0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"reward": "none"}, ValueError, "Task.reward is 'none', but my_tasks has no function"),
        ({"reward": "slow"}, ValueError, "no function of that name with numba.njit"),
        ({"sensors": (("position", 1, "first"),)}, ValueError, r"1 numbers .* wrote 2"),
        ({"sensors": (("position", 3, "first"),)}, ValueError, r"3 numbers .* wrote 2"),
        ({"action_size": 2}, ValueError, "action_size is 2, but the model has 1"),
        ({"control_timestep": 0.015}, ValueError, "expected a multiple"),
        ({"control_timestep": 0.0}, ValueError, "expected a multiple"),
        ({"model": "/nowhere/at_all.xml"}, FileNotFoundError, "at_all.xml"),
        ({"parameters": ("dof_damping",)}, ValueError, "expected for example"),
        ({"parameters": ("dof_damping[arm]",)}, ValueError, "no dof arm"),
        ({"parameters": ("dof_colour[slide]",)}, ValueError, "no float64 array dof_colour"),
        ({"parameters": ("geom_size[box,3]",)}, ValueError, "a column below 3"),
    ],
)
def test_a_task_that_does_not_fit_is_an_error(env_id, change, error, message):
    task: Task = dataclasses.replace(find_task(env_id), **change)
    with pytest.raises(error, match=message):
        make_vec(task, 1)


def test_parameters_are_named_by_array_element_and_column(env_id):
    model = load_model(find_task(env_id))
    (height,) = parameter_views(model, ["site_pos[mark,2]"])
    assert height == 1.0
    height[:] = 2.0
    assert model.site_pos[0, 2] == 2.0
