"""Ours beside gymnasium's own vector of single environments, in every autoreset mode."""

from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastrssm.envs import make_vec

EPISODE = 6
# of the episode so far, so that ends fall on different steps, two of them on the same
STEPS = np.array([0, 3, 3, 5])
NUM_ENVS = len(STEPS)


class Single(gymnasium.Env):
    """A vector of one that resets only when told to, as an environment."""

    def __init__(self, steps):
        self.vector = make_vec("cheetah-run", 1, episode_steps=EPISODE, autoreset_mode="Disabled")
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space
        self.steps = steps

    def reset(self, *, seed=None, options=None):
        observation, info = self.vector.reset(seed=None if seed is None else [seed])
        start_at(self.vector, [self.steps])
        self.steps = 0
        return {name: value[0] for name, value in observation.items()}, info

    def step(self, action):
        observation, reward, terminated, truncated, info = self.vector.step(action[None])
        only = {name: value[0] for name, value in observation.items()}
        return only, reward[0], terminated[0], truncated[0], info


def start_at(env, steps):
    control_steps = np.asarray(steps) * env.action_repeat
    env.set_state(replace(env.state(), control_steps=control_steps))


def both(mode):
    ours = make_vec("cheetah-run", NUM_ENVS, episode_steps=EPISODE, autoreset_mode=mode)
    theirs = SyncVectorEnv([lambda n=n: Single(n) for n in STEPS], autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] == theirs.metadata["autoreset_mode"] == mode
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    seeds = list(range(NUM_ENVS))
    first = ours.reset(seed=seeds)
    start_at(ours, STEPS)
    assert data_equivalence(first, theirs.reset(seed=seeds), exact=True)
    return ours, theirs


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_result_is_what_gymnasium_gives(mode):
    ours, theirs = both(mode)
    actions = np.random.default_rng(0).uniform(-1, 1, (3 * EPISODE, NUM_ENVS, 6))
    ends = np.zeros(NUM_ENVS, int)
    for action in actions.astype(np.float32):
        got, expected = ours.step(action), theirs.step(action)
        assert data_equivalence(got, expected, exact=True)
        truncated = got[3]
        ends += truncated
        if mode is AutoresetMode.DISABLED and truncated.any():
            got, expected = (env.reset(options={"reset_mask": truncated}) for env in (ours, theirs))
            assert data_equivalence(got, expected, exact=True)
    assert (ends >= 2).all()
