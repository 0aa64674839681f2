"""Minari datasets load unchanged."""

import json

import gymnasium
import minari
import numpy as np
import pytest
from gymnasium import spaces

from fastrssm.data import Dataset, info
from fastrssm.data.dataset import read_folder


class Body(gymnasium.Env):
    """Two sensors, one of them nested; ends by itself after six steps."""

    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, nested):
        size = {"height": spaces.Box(-9, 9, (1,)), "joints": spaces.Box(-9, 9, (3,), np.float32)}
        inner = spaces.Dict({"joints": size["joints"]})
        self.nested = nested
        self.observation_space = (
            spaces.Dict({"height": size["height"], "body": inner}) if nested else size["joints"]
        )

    def look(self):
        joints = np.full(3, self.count, np.float32) + np.arange(3, dtype=np.float32)
        if not self.nested:
            return joints
        return {"height": joints[:1] / 2, "body": {"joints": joints}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.look(), {}

    def step(self, action):
        self.count += 1
        return self.look(), float(self.count), self.count == 6, False, {}


# the collector misses a mail address and the like
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Record episodes of 6, 6 and 4 steps, the last one cut, and return folder and actions."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def record(data_format="hdf5", *, nested=True, scale=1.0):
        collector = minari.DataCollector(Body(nested), data_format=data_format)
        collector.action_space.seed(0)
        actions = []
        for steps in (6, 6, 4):
            collector.reset(seed=0)
            actions.append([collector.action_space.sample() * np.float32(scale)])
            collector.step(actions[-1][0])
            for _ in range(steps - 1):
                actions[-1].append(collector.action_space.sample() * np.float32(scale))
                collector.step(actions[-1][-1])
        collector.reset()
        collector.create_dataset("body/test-v0", algorithm_name="random", author="us")
        collector.close()
        return tmp_path / "body" / "test-v0", [np.array(rows) for rows in actions]

    return record


@pytest.mark.parametrize("data_format", ["hdf5", "arrow"])
def test_a_dataset_opens_like_a_folder_of_ours(make, data_format):
    folder, actions = make(data_format)
    dataset = Dataset.open(folder, ("height", "body/joints", "pre_action", "reward", "is_terminal"))
    np.testing.assert_array_equal(dataset.starts, [0, 7, 14, 19])
    count = np.concatenate([np.arange(7), np.arange(7), np.arange(5)])
    np.testing.assert_array_equal(dataset.arrays["body/joints"], count[:, None] + np.arange(3))
    np.testing.assert_array_equal(dataset.arrays["height"][:, 0], count / 2)
    np.testing.assert_array_equal(dataset.arrays["reward"][:, 0], count)
    np.testing.assert_array_equal(np.flatnonzero(dataset.arrays["is_terminal"]), [6, 13])
    for begin, rows in zip(dataset.starts, actions, strict=False):
        assert not dataset.arrays["pre_action"][begin].any()
        np.testing.assert_array_equal(
            dataset.arrays["pre_action"][begin + 1 : begin + 1 + len(rows)], rows
        )
    found = info(folder)
    assert (found["episodes"], found["frames"]) == (3, 19)
    assert found["returns"]["max"] == 21


def test_other_observations_are_one_column(make):
    folder, _ = make(nested=False)
    assert Dataset.open(folder, ("observation",)).arrays["observation"].shape == (19, 3)
    with pytest.raises(ValueError, match="column 'height' is missing; there are observation, pre_"):
        Dataset.open(folder, ("height",))


def test_actions_must_be_in_our_range(make):
    folder, _ = make(scale=3.0)
    with pytest.raises(ValueError, match="episode 0: 'pre_action' reaches .* outside"):
        Dataset.open(folder, ("pre_action",))


def test_no_environment_is_made(make):
    folder, _ = make()
    path = folder / "data" / "metadata.json"
    described = json.loads(path.read_text())
    del described["action_space"]
    described["env_spec"] = json.dumps({"id": "x-v0", "entry_point": "os:abort"})
    path.write_text(json.dumps(described))
    with pytest.raises(ValueError, match="metadata.json has no action_space"):
        next(read_folder(folder))


@pytest.mark.parametrize("content", ["{", "{}", '{"observation_space": 1, "action_space": 2}'])
def test_a_damaged_dataset_is_named(make, content):
    folder, _ = make()
    (folder / "data" / "metadata.json").write_text(content)
    with pytest.raises(ValueError, match="test-v0"):
        next(read_folder(folder))
