import json
import sys

import numpy as np
import pytest

from fastrssm.run import expert
from fastrssm.run.agents import EXPERTS, SnapshotAgent, Snapshots
from fastrssm.run.evaluate import evaluate

SHIPPED = ["walker-stand", "walker-walk", "walker-run", "cheetah-run"]


@pytest.mark.parametrize("env_id", SHIPPED)
def test_shipped_experts_are_as_good_as_their_curve_says(env_id):
    record = json.loads((EXPERTS / f"{env_id}.json").read_text())
    assert record["args"]["env"] == env_id
    snapshots = Snapshots.open(env_id)
    np.testing.assert_array_equal(snapshots.steps, record["steps"])
    assert record["returns"][0] < 0.25 * record["returns"][-1]
    result = evaluate(SnapshotAgent(snapshots), env_id, 4, seed=5, num_envs=4)
    assert result.median == pytest.approx(record["returns"][-1], rel=0.1)


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--env is 'walker-fly'"):
        expert.train(expert.Args(env="walker-fly", out=tmp_path))


def test_without_the_learner_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sbx", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fastrssm\[experts\]'"):
        expert.train(expert.Args(env="walker-walk", out=tmp_path))


@pytest.mark.slow
def test_training_keeps_snapshots_that_can_be_read(tmp_path):
    pytest.importorskip("sbx")
    args = expert.Args(
        env="walker-walk", out=tmp_path, steps=6400, snapshots=3, eval_episodes=2, updates=1
    )
    expert.train(args)
    record = json.loads((tmp_path / "walker-walk.json").read_text())
    assert len(record["returns"]) == 3
    snapshots = Snapshots.open("walker-walk", tmp_path)
    np.testing.assert_array_equal(snapshots.steps, record["steps"])
    assert snapshots.tensors["l0.weight"].shape == (3, 24, 128)
