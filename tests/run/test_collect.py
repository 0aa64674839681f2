import json

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from safetensors.numpy import save_file

from fastrssm.data import Dataset, info
from fastrssm.data.episode import read_episode
from fastrssm.run import agents
from fastrssm.run.agents import Expert, RandomAgent
from fastrssm.run.collect import rollout, write_dataset
from fastrssm.run.datasets import make_dataset


class Counting(VectorEnv):
    """Episode k of environment i lasts lengths[i][k] steps; `clock` tells (environment, k, step).

    As allowed by gymnasium, one buffer is reused for all observations, and the reward of a reset
    is not cleared.
    """

    def __init__(self, lengths, mode=AutoresetMode.NEXT_STEP, terminates=False):
        self.metadata = {"autoreset_mode": mode}
        self.num_envs, self.lengths, self.terminates = len(lengths), lengths, terminates
        self.single_observation_space = spaces.Dict({"clock": spaces.Box(-1, 99, (3,), np.float32)})
        self.single_action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.clock = np.zeros((self.num_envs, 3), np.float32)
        self.actions = []

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        self.clock[:] = 0
        self.clock[:, 0] = np.arange(self.num_envs)
        self.over = np.zeros(self.num_envs, bool)
        return {"clock": self.clock}, {}

    def step(self, actions):
        self.actions.append(actions)
        self.clock[self.over, 1] += 1
        self.clock[:, 2] = np.where(self.over, 0, self.clock[:, 2] + 1)
        lasts = [self.lengths[int(i)][int(k)] for i, k, _ in self.clock]
        self.over = self.clock[:, 2] == lasts
        ends = (self.over, np.zeros_like(self.over))
        terminated, truncated = ends if self.terminates else ends[::-1]
        return {"clock": self.clock}, np.ones(self.num_envs), terminated, truncated, {}


class Recorder:
    """Act with a number that tells the step, and remember what was seen."""

    def __init__(self, scale=0.01):
        self.scale, self.seen = scale, []

    def reset(self, num_envs):
        self.num_envs = num_envs

    def act(self, obs, is_first, prev_action):
        self.seen.append((obs["clock"].copy(), is_first.copy(), prev_action.copy()))
        step = obs["clock"][:, 2:] + 1
        return np.concatenate([step, -step], axis=1) * self.scale


LENGTHS = [[3, 2, 4, 1], [5, 1, 1, 9], [1, 6, 2, 2]]


def test_episodes_come_in_the_order_of_their_starts():
    episodes = list(rollout(Counting(LENGTHS), Recorder(), 7))
    # starts: 0, 1, 2 at once; environment 2 is over first, then 0, then 1, then 0 again
    owners = [tuple(episode["clock"][0, :2].astype(int)) for episode in episodes]
    assert owners == [(0, 0), (1, 0), (2, 0), (2, 1), (0, 1), (1, 1), (0, 2)]
    for (i, k), episode in zip(owners, episodes, strict=True):
        assert len(episode["clock"]) == LENGTHS[i][k] + 1


@pytest.mark.parametrize("terminates", [True, False])
def test_frames_pair_the_action_with_what_it_led_to(terminates):
    for episode in rollout(Counting(LENGTHS, terminates=terminates), Recorder(), 7, seed=5):
        length = len(episode["clock"])
        steps = np.arange(length)
        np.testing.assert_array_equal(episode["clock"][:, 2], steps)
        assert (episode["clock"][:, :2] == episode["clock"][0, :2]).all()
        expected = np.stack([steps, -steps], axis=1).astype(np.float32) * np.float32(0.01)
        np.testing.assert_array_equal(episode["pre_action"], expected)
        np.testing.assert_array_equal(episode["reward"][:, 0], steps > 0)
        np.testing.assert_array_equal(episode["is_first"][:, 0], steps == 0)
        np.testing.assert_array_equal(episode["is_last"][:, 0], steps == length - 1)
        terminal = (steps == length - 1) & terminates
        np.testing.assert_array_equal(episode["is_terminal"][:, 0], terminal)
        dtypes = {key: column.dtype for key, column in episode.items()}
        assert dtypes["pre_action"] == np.float32
        assert dtypes["reward"] == np.float64


def test_agent_sees_what_the_episodes_hold():
    agent = Recorder()
    list(rollout(Counting(LENGTHS), agent, 7))
    for clock, is_first, prev_action in agent.seen:
        np.testing.assert_array_equal(is_first, clock[:, 2] == 0)
        np.testing.assert_array_equal(prev_action[:, 0], clock[:, 2] * np.float32(0.01))


def test_actions_are_clipped_to_the_space():
    env = Counting([[4]])
    (episode,) = rollout(env, Recorder(scale=0.4), 1, seed=[7])
    assert env.seed == [7]
    expected = np.float32([0, 0.4, 0.8, 1, 1])
    np.testing.assert_allclose(episode["pre_action"][:, 0], expected, rtol=1e-7)
    np.testing.assert_array_equal(np.concatenate(env.actions), episode["pre_action"][1:])


def test_any_gymnasium_environment_with_a_dict_works():
    class Walk(gymnasium.Env):
        observation_space = spaces.Dict({"place": spaces.Box(-9, 9, (1,), np.float64)})
        action_space = spaces.Box(-1, 1, (1,), np.float32)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.place = self.np_random.uniform(-1, 1, 1)
            return {"place": self.place}, {}

        def step(self, action):
            self.place = self.place + action
            over = bool(abs(self.place[0]) > 2)
            return {"place": self.place}, 1.0, over, False, {}

    def play():
        env = gymnasium.vector.SyncVectorEnv([Walk] * 3)
        return list(rollout(env, RandomAgent(1, seed=2), 8, seed=1))

    episodes = play()
    assert len({len(episode["place"]) for episode in episodes}) > 1
    for episode, again in zip(episodes, play(), strict=True):
        moved = np.diff(episode["place"], axis=0)
        np.testing.assert_allclose(moved, episode["pre_action"][1:], rtol=0, atol=1e-12)
        assert (np.abs(episode["place"][:-1]) <= 2).all()
        assert abs(episode["place"][-1]) > 2
        assert episode["is_terminal"][-1]
        for key, column in episode.items():
            np.testing.assert_array_equal(column, again[key])


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (np.zeros((1, 2)), r"actions must have shape \(3, 2\), got \(1, 2\)"),
        (np.array([[0, 0], [0, np.nan], [0, 0]]), "action for environment 1 is not finite"),
    ],
)
def test_bad_actions_are_refused(action, message):
    agent = Recorder()
    agent.act = lambda *_: action
    with pytest.raises(ValueError, match=message):
        next(rollout(Counting(LENGTHS), agent, 1))


def test_unsuitable_environments_are_refused_at_once():
    with pytest.raises(ValueError, match="episodes must be at least 1, got 0"):
        rollout(Counting(LENGTHS), Recorder(), 0)
    with pytest.raises(ValueError, match="autoreset mode NEXT_STEP, got .*SAME_STEP"):
        rollout(Counting(LENGTHS, AutoresetMode.SAME_STEP), Recorder(), 1)
    env = Counting(LENGTHS)
    env.single_action_space = spaces.Discrete(2)
    with pytest.raises(ValueError, match="env must have Box actions"):
        rollout(env, Recorder(), 1)
    env.single_observation_space = spaces.Box(-1, 1, (2,))
    with pytest.raises(ValueError, match="env must give a Dict of sensors"):
        rollout(env, Recorder(), 1)


def test_written_episodes_are_read_back(tmp_path):
    done = []
    episodes = list(rollout(Counting(LENGTHS), Recorder(), 7))
    folder = write_dataset(tmp_path / "new" / "set", iter(episodes), progress=done.append)
    assert done == [1, 2, 3, 4, 5, 6, 7]
    for n, episode in enumerate(episodes):
        for key, column in read_episode(folder / f"{n}.npz").items():
            np.testing.assert_array_equal(column, episode[key])
    assert [path.name for path in folder.parent.iterdir()] == ["set"]


def test_a_dataset_appears_whole_or_not_at_all(tmp_path):
    def broken():
        yield from rollout(Counting(LENGTHS), Recorder(), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "set", broken())
    with pytest.raises(ValueError, match="there is no episode to write"):
        write_dataset(tmp_path / "set", [])
    assert not list(tmp_path.iterdir())


def test_overwriting_is_asked_for_and_keeps_foreign_files(tmp_path):
    def play(n):
        return rollout(Counting(LENGTHS), Recorder(), n)

    folder = tmp_path / "set"
    folder.mkdir()
    write_dataset(folder, play(3))
    Dataset.open(folder, ["clock"])
    with pytest.raises(FileExistsError, match="set exists already; remove it or ask to overwrite"):
        write_dataset(folder, play(2))
    write_dataset(folder, play(2), overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == ["0.npz", "1.npz"]
    (folder / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"not overwritten: it holds thesis\.tex"):
        write_dataset(folder, play(2), overwrite=True)
    assert (folder / "0.npz").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


SIZES = {"l0": (24, 8), "l1": (8, 8), "mean": (8, 6)}


@pytest.fixture
def experts(tmp_path, monkeypatch):
    """Write an expert of walker-walk with random weights."""
    rng = np.random.default_rng(0)
    tensors = {"obs_mean": rng.standard_normal(24), "obs_scale": rng.uniform(0.5, 2, 24)}
    for layer, (inputs, outputs) in SIZES.items():
        tensors[f"{layer}.weight"] = rng.standard_normal((outputs, inputs)) / inputs**0.5
        tensors[f"{layer}.bias"] = rng.standard_normal(outputs)
    tensors = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    inputs = ["velocity", "orientations", "height"]
    folder = tmp_path / "experts"
    folder.mkdir()
    save_file(tensors, folder / "walker-walk.safetensors", {"inputs": json.dumps(inputs)})
    monkeypatch.setattr(agents, "EXPERTS", folder)
    return tensors


def test_an_expert_acts_by_its_mode(experts):
    expert = Expert.open("walker-walk")
    expert.reset(5)
    rng = np.random.default_rng(1)
    sizes = {"orientations": 14, "height": 1, "velocity": 9}
    obs = {key: rng.standard_normal((5, size)).astype(np.float32) for key, size in sizes.items()}
    action = expert.act(obs, np.ones(5, bool), np.zeros((5, 6), np.float32))
    own = {name: tensor.astype(np.float64) for name, tensor in experts.items()}
    x = np.concatenate([obs["velocity"], obs["orientations"], obs["height"]], axis=1)
    x = (x.astype(np.float64) - own["obs_mean"]) * own["obs_scale"]
    for layer in ("l0", "l1"):
        x = np.maximum(x @ own[f"{layer}.weight"].T + own[f"{layer}.bias"], 0)
    mean = x @ own["mean.weight"].T + own["mean.bias"]
    # float32 sums of 24 + 8 + 8 terms of size 10 or less, then tanh, whose slope is at most 1
    atol = 40 * 10 * np.finfo(np.float32).eps
    np.testing.assert_allclose(action, np.tanh(mean), rtol=0, atol=atol)
    # no memory and no noise
    np.testing.assert_array_equal(expert.act(obs, np.zeros(5, bool), action), action)


@pytest.mark.parametrize("name", ["walker-random", "walker-walk-expert"])
def test_name_episodes_and_seed_give_the_same_bytes(experts, tmp_path, name):
    def make(folder, episodes, seed, num_envs):
        done = []
        path = tmp_path / folder
        make_dataset(
            name, path, episodes, seed, num_envs, lambda *counts: done.append(counts), steps=50
        )
        assert done == [(n, episodes) for n in range(1, episodes + 1)]
        return [(path / f"{n}.npz").read_bytes() for n in range(episodes)]

    whole = make("a", 7, 0, 16)
    assert len(set(whole)) == 7
    # how many environments share the work does not change a byte
    assert make("b", 7, 0, 4) == whole
    assert make("c", 1, 1, 1)[0] not in whole
    summary = info(tmp_path / "a")
    assert summary["frames"] == 7 * 51
    assert set(summary["keys"]) == {
        *("orientations", "height", "velocity", "pre_action", "reward"),
        *("is_first", "is_last", "is_terminal"),
    }


def test_make_dataset_refuses_before_any_work(experts, tmp_path):
    with pytest.raises(ValueError, match="no dataset recipe is called 'walker-fly'"):
        make_dataset("walker-fly", tmp_path / "set")
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 16"):
        make_dataset("walker-random", tmp_path / "set", 0)
    with pytest.raises(FileNotFoundError, match="no expert for 'walker-run'"):
        make_dataset("walker-run-expert", tmp_path / "set")
    with pytest.raises(FileExistsError, match="exists already"):
        make_dataset("walker-random", tmp_path / "experts")
    (tmp_path / "experts" / "walker-run.safetensors").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match=r"walker-run\.safetensors: not a file of an expert"):
        Expert.open("walker-run")
    assert not (tmp_path / "set").exists()
