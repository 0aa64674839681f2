"""Recipes of tapes, and mixes of recipes."""

import numpy as np
import pytest

from fastrssm.data.episode import read_episode
from fastrssm.data.recipes import RECIPES, Recipe
from fastrssm.run import datasets
from fastrssm.run.datasets import make_dataset
from fastrssm.run.tapes import Tape, save_tape


@pytest.fixture
def tape(tmp_path, monkeypatch):
    """A tape of walker-plan2explore: 6 episodes of 30 steps."""
    rng = np.random.default_rng(0)
    actions = rng.integers(-127, 128, (6, 30, 6), dtype=np.int8)
    made = Tape("walker-walk", np.arange(100, 106), actions, {})
    save_tape(tmp_path / "tapes" / "walker-plan2explore.tape", made)
    monkeypatch.setattr(datasets, "TAPES", tmp_path / "tapes")
    return made


def read(folder):
    return [read_episode(folder / f"{n}.npz") for n in range(len(list(folder.glob("*.npz"))))]


def test_a_recipe_plays_its_tape(tape, tmp_path):
    make_dataset("walker-plan2explore", tmp_path / "a", 4, steps=20)
    episodes = read(tmp_path / "a")
    assert [len(episode["reward"]) for episode in episodes] == [21] * 4
    # spread evenly over the six
    for episode, actions in zip(episodes, tape.actions[[0, 1, 3, 4]], strict=True):
        np.testing.assert_allclose(episode["pre_action"][1:], actions[:20] / 127, atol=1e-7)
    with pytest.raises(ValueError, match="episodes is 7, expected 1 to 6, what the tape has"):
        make_dataset("walker-plan2explore", tmp_path / "b", 7)
    with pytest.raises(ValueError, match="steps is 31, expected 1 to 30, what the tape has"):
        make_dataset("walker-plan2explore", tmp_path / "b", 2, steps=31)
    assert not (tmp_path / "b").exists()


def test_a_mix_is_its_parts_one_after_the_other(tape, tmp_path, monkeypatch):
    parts = ("walker-random", "walker-plan2explore", "walker-walk-expert")
    mix = Recipe("walker-walk", "mix", 12, parts)
    monkeypatch.setitem(RECIPES, "walker-mix", mix)
    make_dataset("walker-mix", tmp_path / "mix", 11, steps=10)
    made = read(tmp_path / "mix")
    alone = []
    for part, episodes in zip(parts, (4, 4, 3), strict=True):
        make_dataset(part, tmp_path / part, episodes, steps=10)
        alone += read(tmp_path / part)
    assert len(made) == len(alone) == 11
    for ours, theirs in zip(made, alone, strict=True):
        np.testing.assert_array_equal(ours["pre_action"], theirs["pre_action"])
    with pytest.raises(ValueError, match="at least 3, the parts of walker-mix, got 2"):
        make_dataset("walker-mix", tmp_path / "small", 2)


@pytest.mark.parametrize("name", ["walker-plan2explore", "walker-mix"])
def test_an_absent_tape_is_named_before_any_work(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets, "TAPES", tmp_path / "none")
    error = "no tape of walker-plan2explore .*is made by: fastrssm plan2explore --env walker-walk"
    with pytest.raises(FileNotFoundError, match=error):
        make_dataset(name, tmp_path / "set")
    assert not (tmp_path / "set").exists()
