import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, NoAsyncCallError
from gymnasium.vector import AutoresetMode

from fastrssm.envs import TASKS, make_vec
from fastrssm.envs.physics import normal, rng_words, uniform
from fastrssm.envs.tasks import cartpole, cheetah, pendulum, walker


def rollout(env, actions, seed=0):
    observation, _ = env.reset(seed=seed)
    rows = [np.concatenate(list(observation.values()), axis=1)]
    rewards = []
    for action in actions:
        observation, reward, *_ = env.step(action)
        rows.append(np.concatenate(list(observation.values()), axis=1))
        rewards.append(reward)
    return np.stack(rows), np.stack(rewards)


def actions_for(env, steps, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, *env.action_space.shape))


def test_uniform_equals_random_state():
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(4)))
    words = rng_words(random)
    ours = [uniform(words, -2.0, 3.0) for _ in range(2000)]  # past three twists of the generator
    np.testing.assert_array_equal(ours, random.uniform(-2, 3, 2000))


def test_normal_equals_random_state():
    random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence(4)))
    random.randn()  # leaves the second draw of a pair behind
    words = rng_words(random)
    for count in (1, 2, 1001):
        ours = [normal(words) for _ in range(count)]
        np.testing.assert_array_equal(ours, random.randn(count))
        assert uniform(words, 0.0, 1.0) == random.uniform()  # a kept draw waits for the next pair
    np.testing.assert_array_equal(words[:626], rng_words(random)[:626])


@pytest.mark.parametrize(
    ("env_id", "index", "name"),
    [
        ("walker-walk", walker.TORSO, "torso"),
        ("cheetah-run", cheetah.TORSO, "torso"),
        ("cartpole-swingup", cartpole.POLE, "pole_1"),
        ("pendulum-swingup", pendulum.POLE, "pole"),
    ],
)
def test_bodies_are_the_named_ones(env_id, index, name):
    assert make_vec(env_id, 1).model.body(name).id == index


def test_spaces_and_metadata():
    env = make_vec("walker-walk", 3)
    observation, info = env.reset(seed=0)
    assert info == {}
    assert list(observation) == ["orientations", "height", "velocity"]
    assert env.observation_space.contains(observation)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert env.episode_steps == 500
    assert env.single_action_space.shape == (TASKS["walker-walk"].action_size,)
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(observation)
    assert (reward.shape, reward.dtype) == ((3,), np.dtype(np.float64))
    assert terminated.dtype == truncated.dtype == np.bool_
    assert info == {}


@pytest.mark.parametrize("env_id", sorted(TASKS))
def test_every_task_keeps_its_promises(env_id):
    task = TASKS[env_id]
    env = make_vec(env_id, 2)
    assert env.model.nu == task.action_size
    observation, reward = rollout(env, actions_for(env, 20))
    assert observation.shape == (21, 2, sum(size for _, size, _ in task.sensors))
    bound = task.action_repeat if task.finish is None or "back" in env_id else 1
    assert np.isfinite(observation).all()
    assert ((reward >= 0) & (reward <= bound)).all()


def test_autoreset_on_the_next_step():
    env = make_vec("cheetah-run", 2)
    env.reset(seed=0)
    actions = actions_for(env, env.episode_steps + 2)
    ends = []
    for t, action in enumerate(actions):
        observation, reward, _, truncated, _ = env.step(action)
        ends.append(truncated.all())
        if t == env.episode_steps:
            first = observation
            assert (reward == 0).all()
    assert np.flatnonzero(ends).tolist() == [env.episode_steps - 1]
    # the settled cheetah stands near the ground and hardly moves
    assert np.abs(first["velocity"]).max() < 5


def test_episodes_can_be_shorter():
    env = make_vec("walker-walk", 2, episode_steps=3)
    assert env.episode_steps == 3
    env.reset(seed=0)
    ends = [env.step(np.zeros((2, 6)))[3].all() for _ in range(8)]
    assert np.flatnonzero(ends).tolist() == [2, 6]


def test_seeds_are_per_environment_and_exact():
    env = make_vec("walker-run", 3)
    actions = actions_for(env, 5)
    a, _ = rollout(env, actions, seed=1)
    b, _ = rollout(env, actions, seed=1)
    c, _ = rollout(env, actions, seed=2)
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not np.array_equal(a[0, 0], a[0, 1])
    one = make_vec("walker-run", 1)
    stream = np.random.SeedSequence(1).spawn(3)[2]
    alone = one.reset(seed=[11])[0]["velocity"]
    assert alone.shape == (1, 9)
    row = np.random.RandomState(np.random.MT19937(stream))
    env.reset(seed=1)
    assert env.data[2].qpos[2] == row.uniform(-np.pi, np.pi)  # the root's pitch is drawn first
    np.testing.assert_array_equal(
        env.reset(seed=[5, 6, 7])[0]["orientations"][1],
        one.reset(seed=[6])[0]["orientations"][0],
    )


def test_an_environment_does_not_depend_on_its_neighbours_or_threads():
    actions = actions_for(make_vec("cheetah-run", 5), 30)
    one, one_reward = rollout(make_vec("cheetah-run", 5, num_threads=1), actions)
    two, two_reward = rollout(make_vec("cheetah-run", 5, num_threads=2), actions)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one_reward, two_reward)


def test_float32_is_the_rounded_float64():
    double = make_vec("walker-walk", 2, dtype=np.float64)
    single = make_vec("walker-walk", 2)
    a = double.reset(seed=3)[0]["orientations"]
    b = single.reset(seed=3)[0]["orientations"]
    np.testing.assert_array_equal(a.astype(np.float32), b)


def test_actions_are_clipped():
    env = make_vec("cheetah-run", 1)
    actions = np.sign(actions_for(env, 20))
    inside, _ = rollout(env, actions)
    outside, _ = rollout(env, 3 * actions)
    np.testing.assert_array_equal(inside, outside)


def test_gymnasium_makes_it():
    env = gymnasium.make_vec("fastrssm/walker-walk-v0", num_envs=2)
    observation, _ = env.reset(seed=0)
    assert observation["orientations"].shape == (2, 14)
    env.close()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: make_vec("walker-fly", 1), ValueError, "env_id is 'walker-fly'"),
        (lambda: make_vec("walker-walk", 0), ValueError, "num_envs is 0"),
        (lambda: make_vec("walker-walk", 1, action_repeat=0), ValueError, "action_repeat is 0"),
        (lambda: make_vec("walker-walk", 1, episode_steps=0), ValueError, "episode_steps is 0"),
        (lambda: make_vec("walker-walk", 1, num_threads=-1), ValueError, "num_threads is -1"),
        (lambda: make_vec("walker-walk", 1, dtype=np.int32), TypeError, "dtype is int32"),
        (lambda: make_vec("walker-walk", 2).reset(seed=[1]), ValueError, "seed has 1 entries"),
        (lambda: make_vec("walker-walk", 2).step(np.zeros((2, 6))), RuntimeError, "before reset"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_bad_actions():
    env = make_vec("walker-walk", 2)
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions has shape \(2, 5\), expected \(2, 6\)"):
        env.step(np.zeros((2, 5)))
    action = np.zeros((2, 6))
    action[1, 3] = np.nan
    with pytest.raises(ValueError, match=r"actions\[1\] is NaN"):
        env.step(action)


def test_a_diverging_environment_is_reset_alone(capfd):
    env = make_vec("walker-walk", 3, dtype=np.float64)
    alone = make_vec("walker-walk", 3, dtype=np.float64)
    env.reset(seed=0)
    before, *_ = alone.reset(seed=0)
    env.data[1].qvel[:] = np.inf
    action = np.full((3, 6), 0.3)
    after, reward, _, truncated, infos = env.step(action)
    expected, expected_reward, *_ = alone.step(action)
    for name in after:
        np.testing.assert_array_equal(after[name][[0, 2]], expected[name][[0, 2]])
        np.testing.assert_array_equal(after[name][1], before[name][1])
    np.testing.assert_array_equal(reward, [expected_reward[0], 0, expected_reward[2]])
    np.testing.assert_array_equal(infos["diverged"], [False, True, False])
    np.testing.assert_array_equal(truncated, [False, True, False])
    after, reward, _, truncated, infos = env.step(action)  # a new episode, and all is well
    expected, *_ = alone.step(action)
    np.testing.assert_array_equal(after["velocity"][[0, 2]], expected["velocity"][[0, 2]])
    assert (after["velocity"][1] == 0).all()
    assert reward[1] == 0
    assert not truncated.any()
    assert infos == {}
    assert capfd.readouterr() == ("", "")


def test_a_huge_velocity_diverges_while_every_number_is_finite():
    env = make_vec("cheetah-run", 2)
    env.reset(seed=0)
    env.data[0].qvel[:] = 1e11  # beyond MuJoCo's mjMAXVAL
    observation, *_, infos = env.step(np.zeros((2, 6)))
    np.testing.assert_array_equal(infos["diverged"], [True, False])
    assert all(np.isfinite(value).all() for value in observation.values())


def test_infinite_actions_are_clipped():
    env, same = make_vec("walker-walk", 1), make_vec("walker-walk", 1)
    env.reset(seed=0)
    same.reset(seed=0)
    one = env.step(np.full((1, 6), np.inf))[0]["velocity"]
    np.testing.assert_array_equal(one, same.step(np.ones((1, 6)))[0]["velocity"])


def finished(mode, num_envs=3):
    """Environments one step before the end of an episode, and one at its start."""
    env = make_vec("cheetah-run", num_envs, episode_steps=4, autoreset_mode=mode)
    env.reset(seed=1)
    action = np.full((num_envs, 6), 0.5, np.float32)
    for _ in range(3):
        env.step(action)
    return env, action


def test_same_step_gives_the_last_observation_and_the_first():
    env, action = finished(AutoresetMode.SAME_STEP)
    plain, _ = finished(AutoresetMode.NEXT_STEP)
    first, reward, _, truncated, infos = env.step(action)
    last, last_reward, *_ = plain.step(action)
    assert truncated.all()
    np.testing.assert_array_equal(reward, last_reward)
    assert infos["_final_obs"].all()
    for n in range(3):
        for name in last:
            np.testing.assert_array_equal(infos["final_obs"][n][name], last[name][n])
    reborn, reward, _, truncated, infos = plain.step(action)
    for name in first:
        np.testing.assert_array_equal(first[name], reborn[name])
    assert not truncated.any()
    assert not reward.any()


def test_disabled_waits_for_a_masked_reset():
    env, action = finished("Disabled")
    *_, truncated, infos = env.step(action)
    assert truncated.all()
    assert infos == {}
    with pytest.raises(RuntimeError, match="environment 0 has ended"):
        env.step(action)
    mask = np.array([True, False, True])
    kept = env.data[1].qpos.copy()
    env.reset(seed=[5, 6, 7], options={"reset_mask": mask})
    np.testing.assert_array_equal(env.data[1].qpos, kept)
    with pytest.raises(RuntimeError, match="environment 1 has ended"):
        env.step(action)
    env.reset(options={"reset_mask": ~mask})
    env.step(action)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(2, bool), r"reset_mask'\] has shape \(2,\)"),
        (np.ones(3), "dtype float64"),
        (np.array([True, False, True]), "never reset"),
    ],
)
def test_bad_reset_masks(mask, message):
    with pytest.raises(ValueError, match=message):
        make_vec("cheetah-run", 3).reset(options={"reset_mask": mask})


def test_a_step_under_way_equals_a_step():
    env, other = make_vec("cheetah-run", 3), make_vec("cheetah-run", 3, num_threads=1)
    env.reset(seed=2)
    other.reset(seed=2)
    action = np.full((3, 6), 0.25)
    for _ in range(3):
        env.step_async(action)
        action[:] = 9.0  # the loop has its own copy
        with pytest.raises(AlreadyPendingCallError):
            env.step_async(action)
        with pytest.raises(AlreadyPendingCallError):
            env.reset()
        with pytest.raises(AlreadyPendingCallError):
            env.state()
        action[:] = 0.25
        one, two = env.step_wait(), other.step(action)
        np.testing.assert_array_equal(one[0]["velocity"], two[0]["velocity"])
        np.testing.assert_array_equal(one[1], two[1])
    with pytest.raises(NoAsyncCallError):
        env.step_wait()
    env.step_async(action)
    env.close()
    with pytest.raises(ClosedEnvironmentError):
        env.step(action)


def test_results_that_are_views_hold_for_one_more_step():
    env = make_vec("cheetah-run", 2, copy=False)
    env.reset(seed=0)
    action = np.full((2, 6), 0.5)
    first = env.step(action)[0]["velocity"]
    kept = first.copy()
    second = env.step(action)[0]["velocity"]
    np.testing.assert_array_equal(first, kept)
    third = env.step(action)[0]["velocity"]
    assert np.shares_memory(first, third)
    assert not np.shares_memory(second, third)


def test_results_become_tensors_without_a_copy():
    env = make_vec("cheetah-run", 2, copy=False)
    observation, _ = env.reset(seed=0)
    tensor = torch.from_numpy(observation["velocity"])
    assert tensor.dtype == torch.float32
    assert tensor.data_ptr() == observation["velocity"].ctypes.data
    reward = env.step(np.zeros((2, 6)))[1]
    assert torch.from_numpy(reward).data_ptr() == reward.ctypes.data


def test_loading_leaves_nothing_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_vec("cheetah-run", 1)
    assert list(tmp_path.iterdir()) == []
