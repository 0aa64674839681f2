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


pytestmark = pytest.mark.usefixtures("somewhere")


OFFICIAL = [
    "walker-stand",
    "walker-walk",
    "walker-run",
    "cheetah-run",
    "cartpole-swingup",
    "cartpole-swingup_sparse",
    "cartpole-balance",
    "cartpole-balance_sparse",
    "hopper-stand",
    "hopper-hop",
    "reacher-easy",
    "reacher-hard",
    "finger-spin",
    "finger-turn_easy",
    "finger-turn_hard",
    "pendulum-swingup",
    "ball_in_cup-catch",
    "humanoid-stand",
    "humanoid-walk",
    "humanoid-run",
    "humanoid-run_pure_state",
    "quadruped-walk",
    "quadruped-run",
    "quadruped-fetch",
]
NUM_ENVS = 2


def oracles(env_id, seed, num_envs):
    """dm_control's own environments with the random streams that `reset(seed=...)` promises."""
    streams = np.random.SeedSequence(seed).spawn(num_envs)
    return [
        suite.load(*env_id.split("-"), task_kwargs={"random": np.random.RandomState(generator)})
        for generator in map(np.random.MT19937, streams)
    ]


def pair(env_id, seed=0):
    """One environment of ours and dm_control's own, with the same random stream."""
    (oracle,) = oracles(env_id, seed, 1)
    return make_vec(env_id, 1, action_repeat=1, dtype=np.float64), oracle


def flat(observation):
    return np.concatenate([np.ravel(value) for value in observation.values()])


def _norm(vector):
    square = 0.0
    for x in vector:
        square += x * x
    return math.sqrt(square)


# whether BLAS fuses multiplications with additions depends on the processor; we do not
norm_in_order = mock.patch.object(np.linalg, "norm", _norm)
# as do the last places of what numpy gives to its vector units
c_library = mock.patch.multiple(
    np,
    **{
        name: np.vectorize(getattr(math, name), otypes=[np.float64])
        for name in ("exp", "cos", "sin")
    },
)


# sensors that dm_control turns into the axes of the torso with numpy's dot
ROTATED = {
    "humanoid": ("extremities",),
    "quadruped": ("ball_state", "target_position"),
}
# arcsinh and log1p: numpy's and the C library's are each within a unit in the last place
COMPRESSED = ("force_torque", "touch")


def assert_same_observation(env_id, ours, theirs):
    """Compare bit for bit what is read from MuJoCo, and to the rounding what numpy computes."""
    for name, value in theirs.items():
        expected = np.ravel(value)
        allowed = np.zeros_like(expected)
        if name in ROTATED.get(env_id.split("-")[0], ()):
            # sums of three products, fused or not: 3 roundings each of at most the length
            lengths = np.sqrt(np.square(expected.reshape(-1, 3)).sum(1))
            allowed = 3 * np.finfo(np.float64).eps * np.repeat(lengths, 3)
        elif name in COMPRESSED:
            allowed = 2 * np.spacing(np.abs(expected))
        difference = np.abs(ours[name] - expected)
        assert (difference <= allowed).all(), f"{name} differs by {difference.max()}"


def allowed_difference(reward):
    """How far numpy's exp and the arguments it gets may move `reward`.

    numpy squares a scalar d by pow, which may differ by a unit in the last place from d * d. That
    moves exp(-d * d / 2) by d * d / 2 = -log(exp(-d * d / 2)) times eps, relative to itself. And
    numpy's exp may be the other neighbour of the true value, after which each of the operations
    that follow (walker has most: 3 g, + u, times 5 m + 1, / 6) may round to the other side.
    """
    if reward == 0:
        return 0
    return 5 * np.spacing(reward) - np.finfo(np.float64).eps * min(math.log(reward), 0) * reward


def test_every_official_task_is_covered():
    assert [name for name in TASKS if "aime" not in name] == OFFICIAL


# the rest of the combinations, and more seeds, when there is time
MORE = [(0, 2), (7, 1), *((seed, repeat) for seed in (1, 2, 3) for repeat in (1, 2))]


@pytest.mark.parametrize(
    ("seed", "action_repeat"),
    [(0, 1), (7, 2), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)],
)
@pytest.mark.parametrize("env_id", OFFICIAL)
@norm_in_order
def test_whole_episodes_equal_dm_control(env_id, seed, action_repeat):
    env = make_vec(env_id, NUM_ENVS, action_repeat=action_repeat, dtype=np.float64)
    theirs = oracles(env_id, seed, NUM_ENVS)
    ours, _ = env.reset(seed=seed)
    with c_library:
        steps = [oracle.reset() for oracle in theirs]
    actions = np.random.default_rng(seed).uniform(
        -1, 1, (env.episode_steps + 30, *env.action_space.shape)
    )
    exact = 0
    for action in actions:  # one whole episode, its automatic reset, and the start of the next
        for n, step in enumerate(steps):
            assert list(ours) == list(step.observation)
            row = {name: value[n] for name, value in ours.items()}
            assert_same_observation(env_id, row, step.observation)
        ours, reward, terminated, truncated, _ = env.step(action)
        assert not terminated.any()
        for n, oracle in enumerate(theirs):
            expected = with_c_library = 0.0
            if steps[n].last():
                with c_library:
                    steps[n] = oracle.reset()
            else:
                for _ in range(action_repeat):
                    steps[n] = oracle.step(action[n])
                    expected += steps[n].reward
                    with c_library:
                        with_c_library += oracle.task.get_reward(oracle.physics)
                    if steps[n].last():
                        break
            assert truncated[n] == steps[n].last()
            assert np.float32(reward[n]) == np.float32(expected)
            assert abs(reward[n] - expected) <= allowed_difference(expected)
            exact += reward[n] == with_c_library
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
