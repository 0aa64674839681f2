"""Behavioural cloning: the loss, early stopping, exact resume, and the stack of the agent."""

import json

import numpy as np
import pytest
import torch

from fastrssm.algos import bc
from fastrssm.algos.bc import Args, train
from fastrssm.run.checkpoint import load_checkpoint
from fastrssm.run.evaluate import evaluate
from fastrssm.run.stack_agent import StackAgent, StackPolicy, build_policy, load_agent


@pytest.fixture(scope="module")
def bc_args(walker_data):
    return {
        "data": str(walker_data),
        "env": "walker-walk",
        "setup": "lpomdp",
        "batch_size": 16,
        "min_epochs": 4,
        "max_epochs": 4,
        "final_episodes": 0,
    }


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_checkpoint(folder, expected=("bc",)).tensors


def test_the_defaults_are_the_papers():
    args = Args(data="", out="", env="walker-walk")
    wanted = {"batch_size": 50, "lr": 1e-3, "min_epochs": 50, "patience": 3, "train_share": 0.7}
    wanted |= {"min_updates": 0, "max_episodes": 100, "split": "episode"}
    assert {name: getattr(args, name) for name in wanted} == wanted
    sizes = {setup: build_policy("walker-walk", setup).mlp for setup in ("mdp", "lpomdp")}
    assert sizes["mdp"].net[0].in_features == 24
    assert sizes["lpomdp"].net[0].in_features == 5 * 15


def test_the_loss_is_that_of_the_last_action_given_the_frames_before():
    torch.manual_seed(0)
    policy = StackPolicy(3 * 4, 2)
    batch = {
        "a": torch.randn(4, 5, 1),
        "b": torch.randn(4, 5, 3),
        "pre_action": torch.rand(4, 5, 2),
    }
    total = 0.0
    for i in range(5):
        stack = torch.cat([torch.cat((batch["a"][t, i], batch["b"][t, i])) for t in range(3)])
        total += (policy(stack) - batch["pre_action"][3, i]).square().mean().item()
    torch.testing.assert_close(bc.loss(policy, batch, ("a", "b")).item(), total / 5)


def test_a_run_stops_when_validation_says_so_and_keeps_the_best(bc_args, tmp_path):
    changes = {"min_epochs": 2, "max_epochs": 400, "patience": 2, "lr": 0.03, "final_episodes": 2}
    train(Args(**(bc_args | changes), out=str(tmp_path)))
    lines = records(tmp_path)
    errors = [line["policy_validation_loss"] for line in lines if "policy_validation_loss" in line]
    best = int(np.argmin(errors)) + 1
    assert len(errors) < 400
    assert len(errors) == max(best + 2, 2)
    checkpoint = load_checkpoint(tmp_path, expected=("bc",))
    assert checkpoint.step == len(errors)
    result = json.loads((tmp_path / "eval.json").read_text())
    agent = load_agent(checkpoint, 0, torch.device("cpu"))
    assert list(evaluate(agent, "walker-walk", 2, seed=142).returns) == result["returns"]
    # the stored policy is the one of the best epoch
    once = tmp_path / "again"
    train(Args(**(bc_args | {"lr": 0.03, "min_epochs": best, "max_epochs": best}), out=str(once)))
    for name, value in weights(once).items():
        if name.startswith("policy."):
            assert torch.equal(value, checkpoint.tensors[name]), name
    kept, last = (
        checkpoint.tensors[f"{name}.mlp.net.0.weight"] for name in ("policy", "policy_last")
    )
    assert not torch.equal(kept, last)


def test_a_resumed_run_equals_an_uninterrupted_one(bc_args, tmp_path):
    train(Args(**bc_args, out=str(tmp_path / "once")))
    train(Args(**(bc_args | {"max_epochs": 2}), out=str(tmp_path / "twice")))
    train(Args(**bc_args, out=str(tmp_path / "twice")))
    once, twice = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert once.keys() == twice.keys()
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name
    assert len(records(tmp_path / "twice")) == len(records(tmp_path / "once"))


def test_the_agent_stacks_frames_of_one_episode():
    policy = StackPolicy(3 * 2, 1)
    seen = []
    policy.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    agent = StackAgent(policy, ("x", "y"), 3)
    for _ in range(2):
        agent.reset(2)
        seen.clear()
        for t, first in enumerate([[True, True], [False, False], [False, True]]):
            obs = {"x": np.array([[t], [10 + t]]), "y": np.array([[t], [10 + t]])}
            action = agent.act(obs, np.array(first), np.zeros((2, 1)))
            assert action.shape == (2, 1)
        assert seen[0] == [[0] * 6, [10] * 6]
        assert seen[1] == [[0, 0, 0, 0, 1, 1], [10, 10, 10, 10, 11, 11]]
        assert seen[2] == [[0, 0, 1, 1, 2, 2], [12] * 6]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "walker-fly"}, "--env is 'walker-fly'"),
        ({"setup": "visual"}, "--setup is 'visual', expected one of mdp, lpomdp"),
        ({"patience": 0}, "--patience is 0, expected a number above 0"),
        ({"max_episodes": 1}, "one episode cannot be divided"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(bc_args, tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(Args(**(bc_args | changes), out=str(out)))
    assert not out.exists()
