"""Ball in cup, humanoid and quadruped against dm_control, where random actions hardly lead."""

import mujoco
import numpy as np
import pytest

from fastrssm.envs import TASKS, make_vec
from fastrssm.envs.tasks import ball_in_cup, humanoid, quadruped

pytest.importorskip("dm_control.suite")
from test_alignment import (  # noqa: E402
    allowed_difference,
    assert_same_observation,
    c_library,
    norm_in_order,
    pair,
)

pytestmark = pytest.mark.usefixtures("somewhere")

DOMAINS = ("ball_in_cup", "humanoid", "quadruped")
NAMES = [name for name in TASKS if name.split("-")[0] in DOMAINS]


@pytest.mark.parametrize(
    ("env_id", "kind", "index", "name"),
    [
        ("ball_in_cup-catch", "body", ball_in_cup.BALL, "ball"),
        ("ball_in_cup-catch", "geom", ball_in_cup.BALL_GEOM, "ball"),
        ("ball_in_cup-catch", "site", ball_in_cup.TARGET, "target"),
        ("humanoid-stand", "body", humanoid.TORSO, "torso"),
        ("humanoid-stand", "body", humanoid.HEAD, "head"),
        ("humanoid-stand", "body", humanoid.EXTREMITIES[0], "left_hand"),
        ("humanoid-stand", "body", humanoid.EXTREMITIES[1], "left_foot"),
        ("humanoid-stand", "body", humanoid.EXTREMITIES[2], "right_hand"),
        ("humanoid-stand", "body", humanoid.EXTREMITIES[3], "right_foot"),
        ("quadruped-walk", "body", quadruped.TORSO, "torso"),
        ("quadruped-fetch", "body", quadruped.TORSO, "torso"),
        ("quadruped-fetch", "body", quadruped.BALL, "ball"),
        ("quadruped-fetch", "geom", quadruped.BALL_GEOM, "ball"),
        ("quadruped-fetch", "geom", quadruped.FLOOR, "floor"),
        ("quadruped-fetch", "site", quadruped.TARGET, "target"),
        ("quadruped-fetch", "site", quadruped.WORKSPACE, "workspace"),
    ],
)
def test_indices_are_the_named_ones(env_id, kind, index, name):
    assert getattr(make_vec(env_id, 1).model, kind)(name).id == index


@pytest.mark.parametrize("env_id", [name for name in NAMES if name.startswith("quadruped")])
def test_edited_model_is_dm_controls(env_id):
    env, oracle = pair(env_id)
    theirs = oracle.physics.model.ptr
    compared = 0
    for name in dir(theirs):
        value = getattr(theirs, name)
        if not name.startswith("_") and isinstance(value, np.ndarray | int | bytes):
            np.testing.assert_array_equal(getattr(env.model, name), value, err_msg=name)
            compared += 1
    assert compared > 500


@pytest.mark.parametrize(
    "env_id", ["ball_in_cup-catch", "humanoid-stand", "quadruped-walk", "quadruped-fetch"]
)
@norm_in_order
def test_many_resets_equal_dm_control(env_id):
    """Poses that are drawn again or raised because something touches, among them."""
    env, oracle = pair(env_id, seed=5)
    ours, _ = env.reset(seed=5)
    for _ in range(30):
        with c_library:
            step = oracle.reset()
        assert_same_observation(env_id, {k: v[0] for k, v in ours.items()}, step.observation)
        np.testing.assert_array_equal(env.data[0].qpos, oracle.physics.data.qpos)
        np.testing.assert_array_equal(env.data[0].qvel, oracle.physics.data.qvel)
        ours, _ = env.reset()


def near_the_goal(env_id, model, rng):
    """Draw qpos and qvel that are often rewarded."""
    pose = model.qpos0.copy()
    velocity = rng.uniform(-0.1, 0.1, model.nv)
    if env_id == "ball_in_cup-catch":
        cup, ball = rng.uniform(-0.05, 0.05, (2, 2))
        return np.concatenate([cup, cup + ball + [0, 0.35]]), velocity
    pose[7:] += rng.uniform(-0.1, 0.1, model.nq - 7)
    pose[3:7] += rng.uniform(-0.1, 0.1, 4)
    velocity[:2] = rng.uniform(-1, 8, 2) if env_id.split("-")[1][:3] == "run" else rng.randn(2)
    if env_id == "quadruped-fetch":
        pose[:2] += rng.uniform(-2, 2, 2)
        pose[23:26] = *rng.uniform(-0.6, 0.6, 2), 0.2
    return pose, velocity


@pytest.mark.parametrize("env_id", NAMES)
@norm_in_order
def test_rewards_about_the_goal(env_id):
    env, oracle = pair(env_id)
    env.reset(seed=0)
    oracle.reset()
    sides = [(env.model, env.data[0]), (oracle.physics.model.ptr, oracle.physics.data.ptr)]
    rng = np.random.RandomState(0)
    rewards = []
    for _ in range(200):
        pose, velocity = near_the_goal(env_id, env.model, rng)
        for model, data in sides:
            mujoco.mj_resetData(model, data)
            data.qpos[:] = pose
            data.qvel[:] = velocity
            mujoco.mj_forward(model, data)
        action = rng.uniform(-1, 1, (1, env.model.nu))
        ours, reward, *_ = env.step(action)
        step = oracle.step(action[0])
        assert_same_observation(env_id, {k: v[0] for k, v in ours.items()}, step.observation)
        assert abs(reward[0] - step.reward) <= allowed_difference(step.reward)
        rewards.append(step.reward)
    assert max(rewards) > 0.6, "nothing was near the goal"
    if env_id == "ball_in_cup-catch":
        assert set(rewards) == {0, 1}
    else:
        assert len(set(rewards)) > 100
