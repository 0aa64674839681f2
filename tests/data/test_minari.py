"""Minari datasets load unchanged."""

import json

import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector import EpisodeBuffer

from fastrssm.data import Dataset, info
from fastrssm.data.dataset import read_folder

# the writer misses a mail address and the like
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write episodes of 6, 6 and 4 steps, the last one cut, and return folder and actions."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    joints, height = spaces.Box(-9, 9, (3,), np.float32), spaces.Box(-9, 9, (1,), np.float32)

    def write(data_format="hdf5", *, nested=True, scale=1.0):
        space = joints
        if nested:
            space = spaces.Dict({"height": height, "body": spaces.Dict({"joints": joints})})
        rng, actions, episodes = np.random.default_rng(0), [], []
        for steps in (6, 6, 4):
            count = np.arange(steps + 1, dtype=np.float32)[:, None]
            seen = count + np.arange(3, dtype=np.float32)
            actions.append(scale * rng.uniform(-1, 1, (steps, 2)).astype(np.float32))
            episode = EpisodeBuffer(
                observations={"height": count / 2, "body": {"joints": seen}} if nested else seen,
                actions=actions[-1],
                rewards=list(range(1, steps + 1)),
                terminations=[step == 6 for step in range(1, steps + 1)],
                truncations=[step == 4 == steps for step in range(1, steps + 1)],
            )
            episodes.append(episode)
        minari.create_dataset_from_buffers(
            "body/test-v0",
            episodes,
            observation_space=space,
            action_space=spaces.Box(-9, 9, (2,), np.float32),
            data_format=data_format,
        )
        return tmp_path / "body" / "test-v0", actions

    return write


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
