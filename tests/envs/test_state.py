"""Snapshots: whatever happened before, the future is that of the state, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest

from fastrssm.envs import VectorState, make_vec

EPISODE = 25
NUM_ENVS = 3
# right after reset, falling, on the ground, at the end, automatically reset, in the next episode
MOMENTS = [0, 7, 20, EPISODE, EPISODE + 1, EPISODE + 9]


def make(env_id, **options):
    settings = {"episode_steps": EPISODE, "num_threads": 1, "dtype": np.float64}
    return make_vec(env_id, NUM_ENVS, **(settings | options))


def actions_for(steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, NUM_ENVS, 6))


def follow(env, actions):
    """All that is seen along `actions`, [T, ...] each: both kinds of results and the physics."""
    seen = []
    for action in actions:
        observation, reward, terminated, truncated, _ = env.step(action)
        seen.append([*observation.values(), reward, terminated, truncated, *physics_of(env)])
    return [np.stack(values) for values in zip(*seen, strict=True)]


def physics_of(env):
    """Copy what a task or a camera may read of the present position and velocity."""
    names = ("qpos", "qvel", "qacc_warmstart", "time", "xpos", "xmat", "geom_xpos", "geom_xmat")
    names += ("cam_xpos", "sensordata", "subtree_linvel", "subtree_angmom", "ctrl")
    return [np.stack([np.copy(getattr(data, name)) for data in env.data]) for name in names]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("env_id", ["walker-walk", "cheetah-run", "walker-flip-aime2"])
def test_the_future_repeats(env_id, moment):
    actions = actions_for(moment + EPISODE + 6)
    past, future = actions[:moment], actions[moment:]
    env = make(env_id)
    env.reset(seed=5)
    for action in past:
        env.step(action)
    state, present = env.state(), physics_of(env)
    assert moment not in (20, EPISODE) or any(data.ncon for data in env.data)
    expected = follow(env, future)

    env.step(actions_for(1, seed=9)[0])  # astray
    env.set_state(state)
    assert_same(physics_of(env), present)
    assert_same(follow(env, future), expected)

    fresh = make(env_id, num_threads=2)
    fresh.set_state(state)
    assert_same(physics_of(fresh), present)
    assert_same(follow(fresh, future), expected)
    # and the streams of later resets without a seed are where they were
    assert_same(fresh.reset()[0].values(), env.reset()[0].values())


def test_environments_may_stand_at_different_steps():
    env = make("walker-walk")
    env.reset(seed=0)
    env.set_state(replace(env.state(), control_steps=np.array([0, 46, 50])))
    truncated = np.stack([env.step(action)[3] for action in actions_for(5)])
    # two control steps a step: the second has two left, the third is over and starts anew
    assert np.argwhere(truncated).tolist() == [[1, 1]]
    assert env.state().control_steps.tolist() == [10, 4, 8]


def test_a_state_is_a_copy():
    env = make("walker-walk")
    env.reset(seed=0)
    state = env.state()
    before = {name: value.copy() for name, value in vars(state).items()}
    follow(env, actions_for(EPISODE + 2))
    env.set_state(state)
    follow(env, actions_for(EPISODE + 2))
    assert_same(vars(state).values(), before.values())


def test_a_state_fits_an_npz(tmp_path):
    env = make("cheetah-run")
    env.reset(seed=1)
    follow(env, actions_for(4))
    state = env.state()
    expected = follow(env, actions_for(6, seed=1))
    np.savez(tmp_path / "state.npz", **vars(state))
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        env.set_state(VectorState(**file))
    assert_same(follow(env, actions_for(6, seed=1)), expected)


def test_before_the_first_reset():
    state = make("walker-walk").state()
    env = make("walker-walk")
    env.reset(seed=0)
    env.set_state(state)
    with pytest.raises(RuntimeError, match="before reset"):
        env.step(np.zeros((NUM_ENVS, 6)))


def damaged(state, name, change):
    value = getattr(state, name).copy()
    return replace(state, **{name: change(value)})


def poke(value):
    value[1, 624] = 625
    return value


@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("env_id", lambda v: np.array("walker-run"), ValueError, "env_id is walker-run, expected"),
        ("action_repeat", lambda v: v + 1, ValueError, "action_repeat is 3, expected 2"),
        ("episode_control_steps", lambda v: 2 * v, ValueError, "control_steps is 100, expected 50"),
        ("physics", lambda v: v[:2], ValueError, r"physics has shape \(2, \d+\), expected \(3, "),
        ("physics", np.float32, TypeError, "physics has dtype float32, expected float64"),
        ("random", poke, ValueError, "random has 625 in column 624, expected at most 624"),
        ("control_steps", lambda v: v - 9, ValueError, "expected numbers from 0 to 50"),
        ("control_steps", lambda v: v + 50, ValueError, "expected numbers from 0 to 50"),
    ],
)
def test_foreign_and_damaged_states(name, change, error, words):
    env = make("walker-walk")
    env.reset(seed=0)
    follow(env, actions_for(2))
    before = env.state()
    with pytest.raises(error, match=words):
        env.set_state(damaged(before, name, change))
    assert_same(vars(env.state()).values(), vars(before).values())


def test_a_state_of_fewer_environments():
    env = make_vec("walker-walk", 2, episode_steps=EPISODE)
    with pytest.raises(ValueError, match=r"state\.physics has shape \(2, "):
        make("walker-walk").set_state(env.state())
