"""Recipes whose agents are explorers, and mixes of recipes."""

import numpy as np
import pytest

from fastrssm.data.episode import read_episode
from fastrssm.data.recipes import RECIPES, Recipe
from fastrssm.envs import find_task
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.world_model import WorldModel
from fastrssm.run import datasets
from fastrssm.run.datasets import make_dataset
from fastrssm.run.snapshots import save_snapshot
from fastrssm.run.start import Sizes, build_config


@pytest.fixture
def explorer(tmp_path, monkeypatch):
    """Two small explorers of walker-plan2explore."""
    folder = tmp_path / "explorers"
    config = build_config("walker-walk", "rssmo", "mdp", Sizes(deter=8, stoch=2, hidden=8))
    for episode in (5, 10):
        policy = TanhGaussianPolicy(config.feature_size, find_task("walker-walk").action_size)
        save_snapshot(
            folder / "walker-plan2explore", episode, "walker-walk", WorldModel(config), policy
        )
    monkeypatch.setattr(datasets, "EXPLORERS", folder)


def read(folder):
    return [read_episode(folder / f"{n}.npz") for n in range(len(list(folder.glob("*.npz"))))]


def roughness(episode):
    return np.abs(np.diff(episode["pre_action"][1:], axis=0)).mean()


def test_an_explorer_replays_its_learning(explorer, tmp_path):
    make_dataset("walker-plan2explore", tmp_path / "a", 8, steps=30)
    make_dataset("walker-plan2explore", tmp_path / "b", 8, steps=30)
    episodes = read(tmp_path / "a")
    assert [len(episode["reward"]) for episode in episodes] == [31] * 8
    # the first five are random, the others a policy's, whose actions change little by little
    rough = [roughness(episode) for episode in episodes]
    assert min(rough[:5]) > 3 * max(rough[5:])
    for episode, again in zip(episodes, read(tmp_path / "b"), strict=True):
        np.testing.assert_array_equal(episode["pre_action"], again["pre_action"])


def test_a_mix_is_its_parts_one_after_the_other(explorer, tmp_path, monkeypatch):
    parts = ("walker-random", "walker-plan2explore", "walker-walk-buffer")
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
def test_absent_explorers_are_named_before_any_work(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets, "EXPLORERS", tmp_path / "none")
    with pytest.raises(
        FileNotFoundError, match=r"no snapshots for walker-plan2explore .*`fastrssm data make RUN`"
    ):
        make_dataset(name, tmp_path / "set")
    assert not (tmp_path / "set").exists()
