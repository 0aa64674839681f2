"""Every official task against dm_control: whole episodes, resets included, bit for bit."""

import logging
import math
from unittest import mock

import mujoco
import numpy as np
import pytest

from fastrssm.envs import TASKS, make_vec

logging.getLogger("absl").setLevel(logging.ERROR)  # a deprecation notice per loaded model
suite = pytest.importorskip("dm_control.suite")


@pytest.fixture(autouse=True)
def _somewhere(tmp_path, monkeypatch):
    """MuJoCo logs the warnings of dm_control's models to a file in the current folder."""
    monkeypatch.chdir(tmp_path)


OFFICIAL = [
    "walker-stand",
    "walker-walk",
    "walker-run",
    "cheetah-run",
    "cartpole-swingup",
    "cartpole-swingup_sparse",
    "cartpole-balance",
    "cartpole-balance_sparse",
    "pendulum-swingup",
]
NUM_ENVS = 2


def oracles(env_id, seed, num_envs):
    """dm_control's own environments with the random streams that `reset(seed=...)` promises."""
    streams = np.random.SeedSequence(seed).spawn(num_envs)
    return [
        suite.load(*env_id.split("-"), task_kwargs={"random": np.random.RandomState(generator)})
        for generator in map(np.random.MT19937, streams)
    ]


def flat(observation):
    return np.concatenate([np.ravel(value) for value in observation.values()])


# numpy's exp is not the C library's where it has AVX-512: they may differ in the last place
c_library_exp = mock.patch.object(np, "exp", np.vectorize(math.exp, otypes=[np.float64]))


def test_every_official_task_is_covered():
    assert [name for name in TASKS if "aime" not in name] == OFFICIAL


@pytest.mark.parametrize("action_repeat", [1, 2])
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("env_id", OFFICIAL)
def test_whole_episodes_equal_dm_control(env_id, seed, action_repeat):
    env = make_vec(env_id, NUM_ENVS, action_repeat=action_repeat, dtype=np.float64)
    theirs = oracles(env_id, seed, NUM_ENVS)
    ours, _ = env.reset(seed=seed)
    steps = [oracle.reset() for oracle in theirs]
    actions = np.random.default_rng(seed).uniform(
        -1, 1, (env.episode_steps + 30, *env.action_space.shape)
    )
    exact = 0
    for action in actions:  # one whole episode, its automatic reset, and the start of the next
        for n, step in enumerate(steps):
            row = np.concatenate([value[n] for value in ours.values()])
            np.testing.assert_array_equal(row, flat(step.observation))
        ours, reward, terminated, truncated, _ = env.step(action)
        assert not terminated.any()
        for n, oracle in enumerate(theirs):
            expected = with_c_exp = 0.0
            if steps[n].last():
                steps[n] = oracle.reset()
            else:
                for _ in range(action_repeat):
                    steps[n] = oracle.step(action[n])
                    expected += steps[n].reward
                    with c_library_exp:
                        with_c_exp += oracle.task.get_reward(oracle.physics)
                    if steps[n].last():
                        break
            assert truncated[n] == steps[n].last()
            assert np.float32(reward[n]) == np.float32(expected)
            assert abs(reward[n] - expected) <= 2 * np.spacing(expected)
            exact += reward[n] == with_c_exp
    # what is left: numpy's scalars are squared by pow
    assert exact >= 0.99 * actions.shape[0] * NUM_ENVS


@pytest.mark.parametrize(
    "env_id", ["cartpole-swingup_sparse", "cartpole-balance_sparse", "pendulum-swingup"]
)
def test_sparse_rewards_near_the_goal(env_id):
    """From poses about the upright one, which random actions hardly reach."""
    env = make_vec(env_id, 1, action_repeat=1, dtype=np.float64)
    (oracle,) = oracles(env_id, 0, 1)
    env.reset(seed=0)
    oracle.reset()
    rng = np.random.default_rng(0)
    seen = []
    for _ in range(300):
        pose = rng.uniform(-0.3, 0.3, env.model.nq)
        env.data[0].qpos[:] = oracle.physics.data.qpos[:] = pose
        mujoco.mj_forward(env.model, env.data[0])
        oracle.physics.forward()
        action = rng.uniform(-1, 1, (1, 1))
        observation, reward, *_ = env.step(action)
        step = oracle.step(action[0])
        np.testing.assert_array_equal(
            np.concatenate(list(observation.values()), 1)[0], flat(step.observation)
        )
        assert reward[0] == step.reward
        seen.append(step.reward)
    assert set(seen) == {0, 1}


@pytest.mark.parametrize("env_id", [name for name in TASKS if "aime" in name])
def test_aime_rewards(env_id):
    """AIME's own tasks: dm_control's stand or run with the reward computed here, in plain numpy."""
    domain, task, version = env_id.split("-")
    official = f"{domain}-{'stand' if domain == 'walker' else 'run'}"
    env = make_vec(env_id, 1, dtype=np.float64)
    (oracle,) = oracles(official, 3, 1)
    env.reset(seed=3)
    oracle.reset()
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(120):
        action = rng.uniform(-1, 1, (1, 6))
        _, reward, *_ = env.step(action)
        rewards, stands = [], []
        for _ in range(2):
            stands.append(oracle.step(action[0]).reward)
            rewards.append(_aime2_reward(oracle.physics, domain, task, stands[-1]))
        expected = sum(rewards)
        if version == "aime1":
            expected = _aime1_reward(oracle.physics, domain, task, sum(stands))
        assert reward[0] == pytest.approx(expected, rel=1e-14, abs=1e-14)
        seen.append(expected)
    assert np.std(seen) > 0, "the reward never moved: this test compared nothing"


def _ramp(x, target):
    return np.clip(x / target, 0, 1)


def _aime1_reward(physics, domain, task, stands):
    velocity = physics.velocity()
    match task:
        case "walkbackward":
            return stands * (5 * _ramp(-velocity[0], 1) + 1) / 6
        case "runbackward" if domain == "walker":
            return stands * (5 * _ramp(-velocity[0], 8) + 1) / 6
        case "runbackward":
            return _ramp(-velocity[0], 10)
        case "flip":
            return _ramp(velocity[2], 5)
        case "flipbackward":
            return _ramp(-velocity[2], 5)
        case "jump":
            return _ramp(physics.named.data.xpos["torso", "z"], 5)
    raise AssertionError(task)


def _aime2_reward(physics, domain, task, stand):
    velocity = physics.named.data.sensordata["torso_subtreelinvel"]
    spin = physics.named.data.subtree_angmom["torso"][1]
    match task:
        case "walkbackward":
            return stand * (5 * _ramp(-velocity[0], 1) + 1) / 6
        case "runbackward" if domain == "walker":
            return stand * (5 * _ramp(-velocity[0], 8) + 1) / 6
        case "runbackward":
            return _ramp(-velocity[0], 10)
        case "flip":
            return _ramp(spin, 5)
        case "flipbackward":
            return _ramp(-spin, 5)
        case "jump":
            return stand * _ramp(velocity[2], 2)
    raise AssertionError(task)
