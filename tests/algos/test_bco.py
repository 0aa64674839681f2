"""BCO(0): the losses of both stages, early stopping of each, exact resume, and that it imitates."""

import json

import numpy as np
import pytest
import torch
from online import Killed

import fastrssm
from fastrssm.algos import bco
from fastrssm.algos.bco import Args, clone_loss, inverse_loss, train
from fastrssm.data.dataset import episode_files
from fastrssm.run.checkpoint import load_checkpoint
from fastrssm.run.early_stopping import Fit
from fastrssm.run.evaluate import evaluate
from fastrssm.run.stack_agent import StackPolicy, build_policy, load_agent, sizes


@pytest.fixture(scope="module")
def demonstrations(walker_data, tmp_path_factory):
    """The same episodes without actions."""
    folder = tmp_path_factory.mktemp("demonstrations")
    for path in episode_files(walker_data):
        with np.load(path) as episode:
            kept = {name: value for name, value in episode.items() if name != "pre_action"}
        np.savez(folder / path.name, **kept)
    return folder


@pytest.fixture(scope="module")
def bco_args(walker_data, demonstrations):
    return {
        "body": str(walker_data),
        "data": str(demonstrations),
        "env": "walker-walk",
        "setup": "lpomdp",
        "batch_size": 16,
        "min_epochs": 2,
        "min_updates": 0,
        "max_epochs": 3,
        "final_episodes": 0,
    }


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_checkpoint(folder, expected=("bco",)).tensors


@pytest.mark.parametrize(
    ("env", "setup", "inverse", "policy"),
    [
        ("walker-walk", "mdp", 23_558, 20_486),
        ("walker-walk", "lpomdp", 28_934, 27_014),
        ("cheetah-run", "mdp", 21_766, 19_590),
        ("cheetah-run", "lpomdp", 23_558, 22_534),
    ],
)
def test_the_networks_have_the_published_sizes(env, setup, inverse, policy):
    k = 1 if setup == "mdp" else 5
    E, A = sizes(env, setup)
    nets = StackPolicy((k + 1) * E, A), build_policy(env, setup)
    assert [sum(p.numel() for p in net.parameters()) for net in nets] == [inverse, policy]


def test_the_defaults_are_the_papers():
    args = Args(body="", data="", out="", env="walker-walk")
    wanted = {"batch_size": 50, "lr": 1e-3, "min_epochs": 50, "min_updates": 5000, "patience": 3}
    wanted |= {"train_share": 0.7, "max_episodes": 100, "max_body_episodes": None}
    assert {name: getattr(args, name) for name in wanted} == wanted


def test_the_losses_are_those_of_the_last_action():
    torch.manual_seed(0)
    inverse, policy = StackPolicy(4 * 4, 2), StackPolicy(3 * 4, 2)
    batch = {
        "a": torch.randn(4, 5, 1),
        "b": torch.randn(4, 5, 3),
        "pre_action": torch.rand(4, 5, 2),
    }
    first, second = 0.0, 0.0
    for i in range(5):
        frames = [torch.cat((batch["a"][t, i], batch["b"][t, i])) for t in range(4)]
        label = inverse(torch.cat(frames))
        first += (label - batch["pre_action"][3, i]).square().mean().item()
        second += (policy(torch.cat(frames[:3])) - label).square().mean().item()
    sensors = ("a", "b")
    torch.testing.assert_close(inverse_loss(inverse, batch, sensors).item(), first / 5)
    del batch["pre_action"]
    cloned = clone_loss(policy, batch, sensors, inverse)
    torch.testing.assert_close(cloned.item(), second / 5)
    cloned.backward()
    assert all(p.grad is None for p in inverse.parameters())


def test_a_network_stops_when_it_must_and_no_earlier():
    args = Args(body="", data="", out="", env="walker-walk", min_epochs=10, max_epochs=40)
    fit = Fit("policy", StackPolicy(2, 1), 1e-3)
    cases = [
        (9, 9000, 5, False),  # too few epochs
        (12, 4999, 5, False),  # too few updates
        (12, 5000, 10, False),  # it got better two epochs ago
        (12, 5000, 9, True),
        (40, 100, 39, True),
    ]
    for fit.epoch, fit.updates, fit.best_epoch, done in cases:
        assert fit.is_done(args) == done


def test_it_learns_the_action_that_leads_from_frame_to_frame(bco_args, tmp_path):
    """The sensors tell the actions, so labels and clone come near the truth."""
    changes = {"setup": "mdp", "max_epochs": 50, "min_epochs": 50, "lr": 1e-2}
    train(Args(**(bco_args | changes), out=str(tmp_path)))
    lines = records(tmp_path)
    inverse, policy = (
        [line[f"{name}_validation_loss"] for line in lines if f"{name}_validation_loss" in line]
        for name in ("inverse", "policy")
    )
    assert len(inverse) == len(policy) == 50
    # uniform actions have a variance of 1/3, and the walk of the fake walker forgets none of them
    assert min(inverse) < 0.05
    assert min(inverse) < 0.2 * inverse[0]
    # frames alone do not tell what comes next: nothing is better than the mean
    assert min(policy) > 0.2


def test_the_body_teaches_and_the_demonstrations_tell_where(bco_args, tmp_path):
    train(Args(**(bco_args | {"final_episodes": 2}), out=str(tmp_path)))
    checkpoint = load_checkpoint(tmp_path, expected=("bco",))
    assert checkpoint.step == 6
    parts = {name.split(".")[0] for name in checkpoint.tensors}
    assert parts == {"inverse", "inverse_last", "policy", "policy_last"}
    result = json.loads((tmp_path / "eval.json").read_text())
    agent = load_agent(checkpoint, 0, torch.device("cpu"))
    assert list(evaluate(agent, "walker-walk", 2, seed=142).returns) == result["returns"]


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_a_killed_run_comes_to_the_same_end(bco_args, tmp_path, monkeypatch, stop):
    """In the first stage, between the stages, and in the second."""
    train(Args(**bco_args, out=str(tmp_path / "once")))
    with monkeypatch.context() as patch:
        run_epoch, calls = Fit.run_epoch, iter(range(1, 99))

        def mortal(*args):
            if next(calls) == stop:
                raise Killed
            return run_epoch(*args)

        patch.setattr(Fit, "run_epoch", mortal)
        with pytest.raises(Killed):
            train(Args(**bco_args, out=str(tmp_path / "twice")))
    torch.manual_seed(7)
    train(Args(**bco_args, out=str(tmp_path / "twice")))
    once, twice = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert once.keys() == twice.keys()
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name
    assert len(records(tmp_path / "twice")) == len(records(tmp_path / "once"))


def test_both_backends_train_alike(bco_args, tmp_path):
    losses = []
    for backend in ("reference", "cpu"):
        with fastrssm.use_backend(backend):
            train(Args(**(bco_args | {"max_epochs": 2}), out=str(tmp_path / backend)))
        losses.append(records(tmp_path / backend)[-1]["policy_validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_published_division_is_an_option(bco_args, tmp_path, capsys):
    changes = {"max_epochs": 1, "min_epochs": 1}
    for split in ("episode", "window"):
        args = Args(**(bco_args | changes), split=split, out=str(tmp_path / split))
        train(args)
    shown = [line for line in capsys.readouterr().out.splitlines() if "inverse" in line[:14]]
    # 6 episodes of 25 windows: 4 and 2 episodes, or 70 % of the windows
    assert "100 windows to train on, 50 to validate on" in shown[0]
    assert "105 windows to train on, 45 to validate on" in shown[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "walker-fly"}, "--env is 'walker-fly'"),
        ({"body": "nowhere"}, "nowhere: no such dataset folder"),
        ({"min_updates": -1}, "--min-updates is -1, expected a number 0 or above"),
        ({"split": "frame"}, "by must be one of episode, window, got 'frame'"),
        ({"max_body_episodes": 1}, "one episode cannot be divided"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(bco_args, tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(Args(**(bco_args | changes), out=str(out)))
    assert not out.exists()


def test_a_body_without_actions_is_refused(bco_args, demonstrations, tmp_path):
    with pytest.raises(ValueError, match="column 'pre_action' is missing"):
        bco.train(Args(**(bco_args | {"body": str(demonstrations)}), out=str(tmp_path / "run")))
