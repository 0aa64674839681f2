import json
import sys

import pytest

from fastrssm.run import expert
from fastrssm.run.agents import EXPERTS, Expert
from fastrssm.run.evaluate import evaluate
from fastrssm.run.tapes import load_tape, play

SHIPPED = ["walker-stand", "walker-walk", "walker-run", "cheetah-run"]


@pytest.mark.parametrize("env_id", SHIPPED)
def test_shipped_experts_are_as_good_as_their_curve_says(env_id):
    record = json.loads((EXPERTS / f"{env_id}.json").read_text())
    assert record["args"]["env"] == env_id
    assert record["returns"][0] < 0.25 * record["returns"][-1]
    result = evaluate(Expert.open(env_id), env_id, 4, seed=5, num_envs=4)
    assert result.median == pytest.approx(record["returns"][-1], rel=0.1)


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--env is 'walker-fly'"):
        expert.train(expert.Args(env="walker-fly", out=tmp_path))


def test_without_the_learner_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sbx", None)
    with pytest.raises(RuntimeError, match=r"pip install 'fastrssm\[experts\]'"):
        expert.train(expert.Args(env="walker-walk", out=tmp_path))


def test_a_tape_of_no_whole_episode_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--steps is 4999, expected at least 5000 for --tape"):
        expert.train(
            expert.Args(env="walker-walk", out=tmp_path, steps=4999, num_envs=10, tape=True)
        )


def test_an_entropy_beyond_that_of_uniform_actions_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--entropy is 0.7, expected below 0.69"):
        expert.train(expert.Args(env="walker-walk", out=tmp_path, entropy=0.7))


@pytest.mark.slow
def test_training_keeps_an_actor_and_its_replay(tmp_path):
    pytest.importorskip("sbx")
    args = expert.Args(
        env="walker-walk", out=tmp_path, steps=6400, evaluations=3, eval_episodes=2, updates=1,
        num_envs=6, tape=True,
    )  # fmt: skip
    expert.train(args)
    record = json.loads((tmp_path / "walker-walk.json").read_text())
    assert record["steps"] == [6, 1602, 6396]
    last = evaluate(Expert.open("walker-walk", tmp_path), "walker-walk", 2, seed=1000)
    assert round(last.mean, 2) == record["returns"][-1]
    tape = load_tape(tmp_path / "walker-walk-buffer.tape")
    assert (tape.env_id, tape.actions.shape) == ("walker-walk", (12, 500, 6))
    assert tape.run["args"]["steps"] == 6400
    starts = {episode["orientations"][0].tobytes() for episode in play(tape, 12, steps=1)}
    assert len(starts) == len({actions.tobytes() for actions in tape.actions}) == 12
