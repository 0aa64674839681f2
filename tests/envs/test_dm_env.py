"""The dm_env view against dm_control and dm_env's own checks; gymnasium's and torch's faces."""

import logging
import unittest

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector.utils import iterate
from gymnasium.wrappers.vector import RecordEpisodeStatistics

from fastrssm.envs import DmEnvView, make_vec

logging.getLogger("absl").setLevel(logging.ERROR)  # a deprecation notice per loaded model
suite = pytest.importorskip("dm_control.suite")
dm_env = pytest.importorskip("dm_env")
test_utils = pytest.importorskip("dm_env.test_utils")

STEPS = 20  # 0.5 s of walker


pytestmark = pytest.mark.usefixtures("somewhere")


def view(**options):
    settings = {"action_repeat": 1, "episode_steps": STEPS, "dtype": np.float64}
    return DmEnvView(make_vec("walker-walk", 1, **(settings | options)), seed=3)


def oracle():
    (stream,) = np.random.SeedSequence(3).spawn(1)
    random = np.random.RandomState(np.random.MT19937(stream))
    return suite.load("walker", "walk", task_kwargs={"time_limit": 0.5, "random": random})


class TestContract(test_utils.EnvironmentTestMixin, unittest.TestCase):
    """dm_env's own checks of an environment."""

    def make_object_under_test(self):
        return view(dtype=np.float32)

    def make_action_sequence(self):
        for _ in range(2 * STEPS + 5):
            yield self.make_action()


def test_specs_equal_dm_control():
    ours, theirs = view(), oracle()
    assert ours.action_spec() == theirs.action_spec()
    assert ours.reward_spec() == theirs.reward_spec()
    assert ours.discount_spec() == theirs.discount_spec()
    observations, expected = ours.observation_spec(), theirs.observation_spec()
    assert list(observations) == list(expected)
    for name, spec in observations.items():
        assert (spec.name, spec.dtype) == (name, expected[name].dtype)
        # dm_control's height is a scalar
        assert spec.shape == (expected[name].shape or (1,))


def test_time_steps_equal_dm_control():
    ours, theirs = view(), oracle()
    kinds = []
    # the first step starts an episode, and so does the one after the last
    for action in np.random.default_rng(0).uniform(-1, 1, (2 * STEPS + 4, 6)):
        got, expected = ours.step(action), theirs.step(action)
        assert got.step_type == expected.step_type
        assert got.discount == expected.discount
        if expected.first():
            assert got.reward is None
        else:
            assert np.float32(got.reward) == np.float32(expected.reward)
        for name, value in expected.observation.items():
            np.testing.assert_array_equal(got.observation[name].squeeze(), value)
        kinds.append(got.step_type)
    first, mid, last = dm_env.StepType
    episode = [first] + [mid] * (STEPS - 1) + [last]
    assert kinds == (3 * episode)[: len(kinds)]
    # an episode may be left in the middle
    for got, expected in ((ours.reset(), theirs.reset()), (ours.reset(), theirs.reset())):
        assert got.first()
        np.testing.assert_array_equal(
            got.observation["orientations"], expected.observation["orientations"]
        )


def test_a_view_has_one_environment():
    with pytest.raises(ValueError, match="env has num_envs 2, expected 1"):
        DmEnvView(make_vec("walker-walk", 2))


def test_a_view_refuses_a_batch():
    env = view()
    env.reset()
    with pytest.raises(ValueError, match=r"actions has shape \(1, 1, 6\), expected \(1, 6\)"):
        env.step(np.zeros((1, 6)))


def test_gymnasium_counts_episodes_over_an_automatic_reset():
    plain = make_vec("cheetah-run", 2, episode_steps=5)
    env = RecordEpisodeStatistics(
        gymnasium.make_vec("fastrssm/cheetah-run-v0", num_envs=2, episode_steps=5)
    )
    env.reset(seed=2)
    plain.reset(seed=2)
    rewards, episodes = [], []
    for action in np.random.default_rng(0).uniform(-1, 1, (11, 2, 6)):
        info = env.step(action)[4]
        rewards.append(plain.step(action)[1])
        if "episode" in info:
            assert info["_episode"].all()
            episodes.append(info["episode"])
    rewards = np.stack(rewards)
    # the sixth call resets: it is a step of neither episode
    first, second = rewards[:5].sum(0), rewards[6:].sum(0)
    assert (rewards[5] == 0).all()
    assert (first > 0).all()
    np.testing.assert_allclose([episode["r"] for episode in episodes], [first, second], rtol=1e-14)
    assert [episode["l"].tolist() for episode in episodes] == [[5, 5], [5, 5]]
    env.close()


def test_gymnasium_takes_a_batch_apart():
    env = make_vec("walker-walk", 3)
    observation, _ = env.reset(seed=0)
    rows = list(iterate(env.observation_space, observation))
    assert len(rows) == 3
    assert all(env.single_observation_space.contains(dict(row)) for row in rows)
    actions = list(iterate(env.action_space, env.action_space.sample()))
    assert all(env.single_action_space.contains(action) for action in actions)


def test_torch_shares_the_memory_and_later_steps_leave_it_alone():
    env = make_vec("walker-walk", 2, episode_steps=3)
    observation, _ = env.reset(seed=0)
    kept = []
    for _ in range(5):  # over an automatic reset
        tensors = {name: torch.from_numpy(value) for name, value in observation.items()}
        for name, tensor in tensors.items():
            assert tensor.data_ptr() == observation[name].ctypes.data
            assert tensor.dtype is torch.float32
            kept.append((tensor, tensor.clone()))
        observation, reward, _, truncated, _ = env.step(env.action_space.sample())
        for array in (reward, truncated):
            kept.append((torch.from_numpy(array), torch.from_numpy(array.copy())))
    env.reset()
    assert all(torch.equal(tensor, copy) for tensor, copy in kept)
    # a write into what was returned does not reach the environment either
    state = env.state()
    for tensor, _ in kept:
        tensor.zero_()
    for name, value in vars(env.state()).items():
        np.testing.assert_array_equal(value, getattr(state, name))
