"""IIDM: the losses of both stages, exact resume, and that a policy is learnt through the model."""

import json

import pytest
import torch
from online import Killed

import fastrssm
from fastrssm.algos.iidm import Args, ForwardModel, imitation_loss, prediction_loss, train
from fastrssm.envs import find_task
from fastrssm.run.checkpoint import load_checkpoint
from fastrssm.run.early_stopping import Fit
from fastrssm.run.evaluate import evaluate
from fastrssm.run.stack_agent import STACK, StackPolicy, inputs, load_agent, sizes


@pytest.fixture(scope="module")
def iidm_args(walker_data):
    return {
        "body": str(walker_data),
        "data": str(walker_data),
        "env": "walker-walk",
        "batch_size": 16,
        "min_epochs": 2,
        "min_updates": 0,
        "max_epochs": 3,
        "final_episodes": 0,
    }


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_checkpoint(folder, expected=("iidm",)).tensors


@pytest.mark.parametrize(
    ("env", "setup", "parameters"),
    [
        ("walker-walk", "mdp", 64_536),
        ("walker-walk", "lpomdp", 55_951),
        ("cheetah-run", "mdp", 41_361),
        ("cheetah-run", "lpomdp", 23_560),
    ],
)
def test_the_model_has_the_published_size(env, setup, parameters):
    E, A = sizes(env, setup)
    seen = inputs(env, setup)
    widths = {name: size for name, size, _ in find_task(env).sensors if name in seen}
    model = ForwardModel(STACK[setup] * E + A, widths)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_losses_are_those_of_the_next_frame():
    torch.manual_seed(0)
    model, policy = ForwardModel(3 * 4 + 2, {"a": 1, "b": 3}), StackPolicy(3 * 4, 2)
    batch = {
        "a": torch.randn(4, 5, 1),
        "b": torch.randn(4, 5, 3),
        "pre_action": torch.rand(4, 5, 2),
    }
    first, second = 0.0, 0.0
    for i in range(5):
        frames = torch.cat([torch.cat((batch["a"][t, i], batch["b"][t, i])) for t in range(3)])
        for action, known in ((batch["pre_action"][3, i], True), (policy(frames), False)):
            x = torch.cat((frames, action))
            error = sum(
                (model.heads[name].net(x) - batch[name][3, i]).square().mean().item()
                for name in ("a", "b")
            )
            first, second = (first + error, second) if known else (first, second + error)
    sensors = ("a", "b")
    torch.testing.assert_close(prediction_loss(model, batch, sensors).item(), first / 5)
    del batch["pre_action"]
    model.requires_grad_(False)
    loss = imitation_loss(policy, batch, sensors, model)
    torch.testing.assert_close(loss.item(), second / 5)
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for p in policy.parameters())


def test_a_policy_is_learnt_through_the_model():
    """The next frame is the action plus a little, and the expert always goes to 0.5."""
    torch.manual_seed(0)
    model, policy = ForwardModel(2, {"x": 1}), StackPolicy(1, 1)

    def batches(action):
        x = torch.rand(2, 64, 1)
        x[1] = action + 0.1 * x[0]
        return {"x": x, "pre_action": torch.stack((torch.zeros(64, 1), action))}

    for network, loss, act in (
        (model, lambda b: prediction_loss(model, b, ("x",)), lambda: torch.rand(64, 1) * 2 - 1),
        (
            policy,
            lambda b: imitation_loss(policy, b, ("x",), model),
            lambda: torch.full((64, 1), 0.5),
        ),
    ):
        optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
        for _ in range(200):
            error = loss(batches(act()))
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
    acted = policy(torch.rand(64, 1))
    assert (acted - 0.5).abs().max() < 0.1


def test_a_run_leaves_what_it_promises(iidm_args, tmp_path):
    changes = {"max_epochs": 20, "min_epochs": 20, "lr": 1e-2, "final_episodes": 2}
    train(Args(**(iidm_args | changes), out=str(tmp_path)))
    lines = records(tmp_path)
    for name in ("forward", "policy"):
        losses = [line[f"{name}_train_loss"] for line in lines if f"{name}_train_loss" in line]
        assert len(losses) == 20
        assert losses[-1] < 0.8 * losses[0]
    checkpoint = load_checkpoint(tmp_path, expected=("iidm",))
    parts = {name.split(".")[0] for name in checkpoint.tensors}
    assert parts == {"forward", "forward_last", "policy", "policy_last"}
    result = json.loads((tmp_path / "eval.json").read_text())
    agent = load_agent(checkpoint, 0, torch.device("cpu"))
    assert list(evaluate(agent, "walker-walk", 2, seed=142).returns) == result["returns"]


@pytest.mark.parametrize("stop", [2, 5])
def test_a_killed_run_comes_to_the_same_end(iidm_args, tmp_path, monkeypatch, stop):
    train(Args(**iidm_args, out=str(tmp_path / "once")))
    with monkeypatch.context() as patch:
        run_epoch, calls = Fit.run_epoch, iter(range(1, 99))

        def mortal(*args):
            if next(calls) == stop:
                raise Killed
            return run_epoch(*args)

        patch.setattr(Fit, "run_epoch", mortal)
        with pytest.raises(Killed):
            train(Args(**iidm_args, out=str(tmp_path / "twice")))
    torch.manual_seed(7)
    train(Args(**iidm_args, out=str(tmp_path / "twice")))
    once, twice = weights(tmp_path / "once"), weights(tmp_path / "twice")
    assert once.keys() == twice.keys()
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


def test_both_backends_train_alike(iidm_args, tmp_path):
    losses = []
    for backend in ("reference", "cpu"):
        with fastrssm.use_backend(backend):
            train(Args(**(iidm_args | {"max_epochs": 2}), out=str(tmp_path / backend)))
        losses.append(records(tmp_path / backend)[-1]["policy_validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"setup": "visual"}, "--setup is 'visual', expected one of mdp, lpomdp"),
        ({"env": "cheetah-run"}, "column 'position' is missing"),
        ({"patience": 0}, "--patience is 0, expected a number above 0"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(iidm_args, tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(Args(**(iidm_args | changes), out=str(out)))
    assert not out.exists()
