"""Hopper, reacher and finger against dm_control, where random actions hardly lead."""

import math
from unittest import mock

import mujoco
import numpy as np
import pytest

from fastrssm.envs import TASKS
from fastrssm.envs.model import load_model
from fastrssm.envs.tasks import finger, hopper, reacher

suite = pytest.importorskip("dm_control.suite")
from test_alignment import pair  # noqa: E402

pytestmark = pytest.mark.usefixtures("somewhere")

DOMAINS = [name for name in TASKS if name.split("-")[0] in ("hopper", "reacher", "finger")]


c_library_log1p = mock.patch.object(np, "log1p", np.vectorize(math.log1p, otypes=[np.float64]))


def assert_same_observation(ours, theirs):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        if name == "touch":
            # numpy's log1p is not the C library's where it has AVX-512. Each is less than one
            # place from the truth, so the two are at most neighbours.
            assert (np.abs(ours[name][0] - value) <= np.spacing(value)).all()
        else:
            np.testing.assert_array_equal(ours[name][0], np.ravel(value), err_msg=name)


@pytest.mark.parametrize(
    ("env_id", "kind", "index", "name"),
    [
        ("hopper-hop", "body", hopper.TORSO, "torso"),
        ("hopper-hop", "body", hopper.FOOT, "foot"),
        ("reacher-easy", "geom", reacher.TARGET, "target"),
        ("reacher-easy", "geom", reacher.FINGER, "finger"),
        ("finger-spin", "joint", finger.HINGE, "hinge"),
        ("finger-spin", "geom", finger.CAP, "cap1"),
        ("finger-spin", "site", finger.TARGET, "target"),
    ],
)
def test_indices_are_the_named_ones(env_id, kind, index, name):
    assert getattr(load_model(TASKS[env_id]), kind)(name).id == index


@pytest.mark.parametrize("env_id", DOMAINS)
def test_model_is_dm_controls_after_its_reset(env_id):
    ours = load_model(TASKS[env_id])
    oracle = suite.load(*env_id.split("-"))
    oracle.reset()
    theirs = oracle.physics.model.ptr
    drawn = {"reacher": "geom_pos", "finger": "site_pos"}.get(env_id.split("-")[0])
    compared = 0
    # dm_control does not work bounds out anew; of reacher's target, which has no contacts
    skipped = (drawn, "geom_rbound", "geom_aabb", "bvh_aabb")
    for name in dir(theirs):
        value = getattr(theirs, name)
        if not isinstance(value, np.ndarray) or name in skipped:
            continue
        np.testing.assert_array_equal(getattr(ours, name), value, err_msg=name)
        compared += 1
    assert compared > 300


@pytest.mark.parametrize("env_id", DOMAINS)
def test_many_resets_equal_dm_control(env_id):
    """Poses that are drawn again because something touches, among them."""
    env, oracle = pair(env_id, seed=5)
    ours, _ = env.reset(seed=5)
    for _ in range(60):
        assert_same_observation(ours, oracle.reset().observation)
        ours, _ = env.reset()


@pytest.mark.parametrize("env_id", DOMAINS)
def test_rewards_about_the_goal(env_id):
    """From any pose at any speed: a good share of them is rewarded."""
    env, oracle = pair(env_id)
    env.reset(seed=0)
    oracle.reset()
    sides = [(env.model, env.data[0]), (oracle.physics.model.ptr, oracle.physics.data.ptr)]
    free = np.where(env.model.jnt_type == mujoco.mjtJoint.mjJNT_HINGE, np.pi, 1.0)
    limited = env.model.jnt_limited.astype(bool)
    low, high = np.where(limited, env.model.jnt_range.T, [-free, free])
    fastest = 30 if env_id.startswith("finger") else 3
    rng = np.random.default_rng(0)
    rewards = set()
    touched = 0
    for _ in range(400):
        pose = rng.uniform(low, high)
        velocity = rng.uniform(-fastest, fastest, env.model.nv)
        for model, data in sides:
            mujoco.mj_resetData(model, data)
            data.qpos[:] = pose
            data.qvel[:] = velocity
            mujoco.mj_forward(model, data)
        action = rng.uniform(-1, 1, (1, env.model.nu))
        ours, reward, *_ = env.step(action)
        step = oracle.step(action[0])
        assert_same_observation(ours, step.observation)
        if "touch" in ours:
            with c_library_log1p:
                np.testing.assert_array_equal(ours["touch"][0], oracle.physics.touch())
            touched += (step.observation["touch"] > 0).sum()
        assert reward[0] == step.reward
        rewards.add(step.reward)
    assert touched > 10 or env_id.startswith("reacher")
    if env_id.startswith("hopper"):
        assert len(rewards) > 10
    else:
        assert rewards == {0, 1}
