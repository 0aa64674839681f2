"""Plan2Explore: predictors and their disagreement, and exact resume."""

import numpy as np
import pytest
import torch
from online import TINY, Killed, assert_same_run, kill_at, records

import fastrssm
from fastrssm.algos import plan2explore
from fastrssm.algos.plan2explore import Args, train
from fastrssm.data.episode import read_episode
from fastrssm.models.behaviour import frozen
from fastrssm.models.ensemble import Ensemble
from fastrssm.run.checkpoint import load_checkpoint
from fastrssm.run.online import check_online

SMALL = TINY | {"ensemble": 3, "ensemble_width": 8}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan2explore")
    train(Args(**SMALL, out=str(out)))
    return out


def test_the_defaults_are_the_papers():
    args = Args(env="walker-walk", out="")
    assert (args.ensemble, args.ensemble_width, args.preset) == (5, 1024, "rssmo")
    config = check_online(args)
    assert "reward" not in config.targets
    # the published ensemble, but for the size of the embedding it predicts
    ensemble = Ensemble(config.feature_size + 6, 1024)
    assert sum(p.numel() for p in ensemble.parameters()) == 13_306_880
    shapes = {name: tuple(p.shape) for name, p in ensemble.named_parameters()}
    assert shapes["net.0.weight"] == (5, 1024, 548)
    assert shapes["net.4.bias"] == (5, 1024)


@pytest.fixture
def ensemble():
    torch.manual_seed(0)
    return Ensemble(5, 2, members=3, width=4).double()


def member(ensemble, k, x):
    for layer in ensemble.net:
        if isinstance(layer, torch.nn.ELU):
            x = torch.where(x > 0, x, x.exp() - 1)
        else:
            x = layer.weight[k] @ x + layer.bias[k]
    return x


def test_members_are_networks_of_their_own(ensemble):
    x = torch.randn(7, 5).double()
    wanted = torch.stack([torch.stack([member(ensemble, k, row) for row in x]) for k in range(3)])
    torch.testing.assert_close(torch.stack(ensemble(x)), wanted, rtol=1e-12, atol=1e-12)


def test_the_loss_predicts_the_next_embedding(ensemble):
    feature, action = torch.randn(4, 2, 3).double(), torch.randn(4, 2, 2).double()
    embed = torch.randn(4, 2, 2).double()
    total = 0.0
    for k in range(3):
        for t in range(1, 4):
            for b in range(2):
                predicted = member(ensemble, k, torch.cat((feature[t - 1, b], action[t, b])))
                total += (predicted - embed[t, b]).square().sum().item() / (3 * 2 * 2)
    assert ensemble.loss(feature, action, embed).item() == pytest.approx(total, rel=1e-12)


def test_disagreement_is_the_log_variance(ensemble):
    feature, action = torch.randn(4, 2, 3).double(), torch.randn(4, 2, 2).double()
    with frozen(ensemble):
        seen = ensemble.disagreement(feature.requires_grad_(), action.requires_grad_())
    x = torch.cat((feature[1, 1], action[1, 1])).detach()
    members = np.array([member(ensemble, k, x).detach().numpy() for k in range(3)])
    wanted = np.log(members.var(axis=0, ddof=1)).mean()
    assert seen[1, 1].item() == pytest.approx(wanted, rel=1e-12)
    seen.sum().backward()
    assert feature.grad.abs().min() > 0
    assert action.grad.abs().min() > 0
    assert all(p.grad is None for p in ensemble.parameters())


def test_the_gradient_of_the_disagreement_is_that_of_its_formula(ensemble):
    x = torch.randn(2, 3, 5).double().requires_grad_()
    with frozen(ensemble):
        disagreement = ensemble.disagreement(x[..., :3], x[..., 3:])
        members = torch.stack(ensemble(x.flatten(0, 1)))
    wanted = members.var(0).log().mean(-1).unflatten(0, (2, 3))
    weight = torch.randn(2, 3).double()
    grads = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (disagreement, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_members_that_agree_are_no_error(ensemble):
    with torch.no_grad():
        for p in ensemble.parameters():
            p.copy_(p[:1].expand_as(p).clone())
    feature = torch.randn(1, 1, 3).double().requires_grad_()
    seen = ensemble.disagreement(feature, torch.randn(1, 1, 2).double())
    seen.sum().backward()
    assert torch.isfinite(seen).all()
    assert torch.isfinite(feature.grad).all()


def test_the_predictors_learn():
    torch.manual_seed(0)
    ensemble = Ensemble(4, 3, members=3, width=16)
    optimizer = torch.optim.Adam(ensemble.parameters(), lr=1e-2)
    losses = []
    for _ in range(100):
        feature, action = torch.randn(6, 8, 2), torch.randn(6, 8, 2)
        embed = torch.zeros(6, 8, 3)
        embed[1:] = torch.cat((feature[:-1], action[1:, :, :1]), -1)
        loss = ensemble.loss(feature, action, embed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.1 * np.mean(losses[:10])


def test_a_run_leaves_what_it_promises(finished):
    lines = records(finished)
    assert [line["update"] for line in lines if "emb_prediction_loss" in line] == [2, 3, 4, 6]
    assert {"actor_loss", "imagined_reward", "value_loss"} <= lines[2].keys()
    tensors = load_checkpoint(finished, expected=("plan2explore",)).tensors
    assert tensors["ensemble.net.0.weight"].shape == (3, 8, 21)
    assert not any("decoders.reward" in name for name in tensors)


@pytest.mark.parametrize("number", [2, 6])
def test_a_killed_run_comes_to_the_same_end(finished, tmp_path, monkeypatch, number):
    with monkeypatch.context() as patch:
        kill_at(patch, plan2explore, number)
        with pytest.raises(Killed):
            train(Args(**SMALL, out=str(tmp_path)))
    torch.manual_seed(7)
    train(Args(**SMALL, out=str(tmp_path)))
    assert_same_run(finished, tmp_path, "plan2explore")


def test_noise_is_added_to_the_actions_of_the_policy(finished, tmp_path):
    train(Args(**(SMALL | {"action_noise": 0.0}), out=str(tmp_path)))
    first, noisy = (
        [read_episode(run / "episodes" / f"{i}.npz")["pre_action"][1:] for i in range(6)]
        for run in (tmp_path, finished)
    )
    assert all(np.array_equal(first[i], noisy[i]) for i in range(2)), "random episodes differ"
    # the first action of the policy: all before it is the same
    differences = np.abs(np.stack(first[2:4]) - np.stack(noisy[2:4]))[:, 0]
    assert 0 < differences.min() < 1.5


def test_both_backends_train_alike(finished, tmp_path):
    with fastrssm.use_backend("reference"):
        train(Args(**SMALL, out=str(tmp_path)))
    ours, plain = records(finished)[-2], records(tmp_path)[-2]
    for name in ("total_loss", "emb_prediction_loss", "imagined_reward", "value_loss"):
        # float32 of both; a few updates amplify its rounding a little
        assert ours[name] == pytest.approx(plain[name], rel=1e-3), name
    assert ours != plain, "both ran on one backend"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": 1}, "--ensemble is 1 .* expected at least 2"),
        ({"episodes": 7}, "--episodes is 7, expected --prefill 2 plus a multiple"),
        ({"preset": "rssm3"}, "preset is 'rssm3'"),
        ({"horizon": 1}, "--horizon is 1, expected at least 2"),
        ({"action_noise": -0.1}, "--action-noise is -0.1"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(Args(**(SMALL | changes), out=str(out)))
    assert not out.exists()
