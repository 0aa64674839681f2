"""Dreamer: its equations, its schedule, exact resume after a kill, and that it learns."""

import json
import math

import pytest
import torch
from online import TINY, Killed, assert_same_run, kill_at, records

import fastrssm
from fastrssm.algos import dreamer, plan2explore, pretrain
from fastrssm.algos.dreamer import Args, build_config, train
from fastrssm.data import info
from fastrssm.models.behaviour import (
    Imagined,
    behaviour_losses,
    build_value,
    choose_starts,
    frozen,
    imagine,
)
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import State
from fastrssm.models.world_model import WorldModel
from fastrssm.run.checkpoint import load_checkpoint
from fastrssm.run.evaluate import evaluate
from fastrssm.run.model_agent import load_agent
from fastrssm.run.online import check_online, episodes_after, total_updates
from fastrssm.run.start import Sizes


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("dreamer")
    train(Args(**TINY, out=str(out), final_episodes=2))
    return out


def test_the_defaults_are_the_papers():
    args = Args(env="walker-walk", out="")
    wanted = {"episodes": 1000, "prefill": 5, "pretrain_updates": 100, "updates_per_episode": 100}
    wanted |= {"batch_size": 50, "horizon": 50, "imagine_horizon": 15, "gamma": 0.99}
    wanted |= {"return_lambda": 0.95, "entropy_scale": 1e-4, "model_lr": 3e-4, "actor_lr": 8e-5}
    wanted |= {"value_lr": 8e-5, "grad_clip": 100.0, "num_envs": 1, "start_states": 0}
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert total_updates(args) == 100 + 995 * 100
    # an episode after every hundred updates of everything
    assert [episodes_after(args, n) for n in (0, 199, 200, 300, 99_600)] == [5, 5, 6, 7, 1000]


@pytest.mark.parametrize("algorithm", [dreamer, plan2explore])
def test_the_scale_for_a_cpu_is_a_whole_run(algorithm):
    args = algorithm.Args(env="cheetah-run", out="", **algorithm.SCALES["cpu"])
    assert check_online(args).rssm.deter == 256
    assert total_updates(args) == 25_500
    assert episodes_after(args, 25_500) == args.episodes


@pytest.mark.parametrize(("preset", "parameters"), [("rssmo", 6_519_965), ("rssm", 2_395_966)])
def test_the_model_has_the_published_size(preset, parameters):
    model = WorldModel(build_config(Args(env="walker-walk", out="", preset=preset)))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.decoders["reward"] is not None


def test_the_losses_are_those_of_the_equations():
    """Element by element, in float64."""
    torch.manual_seed(0)
    H, N, F, A = 4, 3, 5, 2
    gamma, lambda_, scale = 0.9, 0.8, 0.01
    policy, value = TanhGaussianPolicy(F, A, 8).double(), build_value(F).double()
    imagined = Imagined(torch.randn(H + 1, N, F).double(), torch.randn(H, N, A).double())
    rewards = torch.randn(H, N).double()
    losses, metrics = behaviour_losses(
        imagined, rewards, policy, value, gamma=gamma, lambda_=lambda_, entropy_scale=scale
    )
    broad = torch.distributions.Normal(*torch.tensor([0.0, 0.88], dtype=torch.float64))
    actor, critic, penalty = 0.0, 0.0, 0.0
    with torch.no_grad():
        for n in range(N):
            r = [math.nan, *rewards[:, n].tolist()]
            raw = [value(imagined.feature[k, n]).item() for k in range(H + 1)]
            v = [x / (1 - gamma) for x in raw]
            G = v[H]
            for k in range(H - 1, 0, -1):
                G = r[k] + gamma * ((1 - lambda_) * v[k + 1] + lambda_ * G)
                actor -= gamma**k * G / ((H - 1) * N)
                critic += 0.5 * (raw[k] - (1 - gamma) * G) ** 2 / ((H - 1) * N)
            for k in range(H):
                acts = policy(imagined.feature[k, n])
                below = torch.distributions.Normal(acts.mean, acts.std)
                kl = torch.distributions.kl_divergence(below, broad)
                penalty += kl.sum().item() / (H * N)
    assert losses["actor"].item() == pytest.approx(actor + scale * penalty, rel=1e-12)
    assert losses["value"].item() == pytest.approx(critic, rel=1e-12)
    assert metrics["policy_kl"].item() == pytest.approx(penalty, rel=1e-12)


def test_each_loss_trains_its_own_network():
    torch.manual_seed(0)
    model = WorldModel(build_config(Args(**TINY, out="")))
    policy = TanhGaussianPolicy(model.config.feature_size, 1)
    value = build_value(model.config.feature_size)
    noise = torch.Generator().manual_seed(0)
    with frozen(model):
        imagined = imagine(model.rssm, policy, model.rssm.initial(3), 4, noise)
        rewards = model.decoders["reward"](imagined.feature[1:]).mode.squeeze(-1)
    losses, _ = behaviour_losses(
        imagined, rewards, policy, value, gamma=0.99, lambda_=0.95, entropy_scale=0.0
    )
    losses["actor"].backward()
    assert all(p.grad is None for module in (model, value) for p in module.parameters())
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad.abs().max() > 0 for p in policy.parameters())
    for p in policy.parameters():
        p.grad = None
    losses["value"].backward()
    assert all(p.grad is not None for p in value.parameters())
    assert all(p.grad is None for module in (model, policy) for p in module.parameters())


def test_starts_are_chosen_without_repetition():
    deter = torch.arange(12.0).reshape(3, 4, 1)
    state = State(deter, deter + 0.5)
    noise = torch.Generator().manual_seed(0)
    chosen = choose_starts(state, 5, noise)
    assert len(set(chosen.deter.flatten().tolist())) == 5
    assert torch.equal(chosen.stoch, chosen.deter + 0.5)
    assert torch.equal(choose_starts(state, 0, noise).deter, deter.flatten(0, 1))


def test_a_run_leaves_what_it_promises(finished, tmp_path):
    lines = records(finished)
    assert [line["update"] for line in lines if "model_grad_norm" in line] == [2, 3, 4, 6]
    assert [line["episodes"] for line in lines if "episodes" in line] == [4, 6]
    assert {"reward_mse", "kl_loss"} <= lines[0].keys()
    assert "actor_loss" not in lines[0]
    assert {"actor_loss", "value_loss", "imagined_return", "actor_grad_norm"} <= lines[2].keys()
    # the replay is a dataset
    made = info(finished / "episodes")
    assert (made["episodes"], made["frames"]) == (6, 6 * 13)
    sizes = {"rssm": Sizes(deter=8, stoch=2, hidden=8), "updates": 1, "batch_size": 2, "horizon": 6}
    data = {"data": str(finished / "episodes"), "env": TINY["env"], "out": str(tmp_path)}
    pretrain.train(pretrain.Args(**sizes, **data))
    # the evaluation can be repeated from the checkpoint
    result = json.loads((finished / "eval.json").read_text())
    checkpoint = load_checkpoint(finished, expected=("dreamer",))
    agent = load_agent(checkpoint, 142, torch.device("cpu"))
    assert list(evaluate(agent, TINY["env"], 2, seed=142).returns) == result["returns"]


@pytest.mark.parametrize("number", [1, 4, 6])
def test_a_killed_run_comes_to_the_same_end(finished, tmp_path, monkeypatch, number):
    """Before the first checkpoint, between checkpoint and episodes, and behind the last episode."""
    with monkeypatch.context() as patch:
        kill_at(patch, dreamer, number)
        with pytest.raises(Killed):
            train(Args(**TINY, out=str(tmp_path), final_episodes=0))
    torch.manual_seed(7)  # whatever happened in between must not matter
    train(Args(**TINY, out=str(tmp_path), final_episodes=0))
    assert_same_run(finished, tmp_path, "dreamer")
    assert records(tmp_path)[-1] == records(finished)[-1]


def test_more_episodes_can_be_asked_for_later(finished, tmp_path):
    train(Args(**(TINY | {"episodes": 4}), out=str(tmp_path), final_episodes=0))
    train(Args(**TINY, out=str(tmp_path), final_episodes=0))
    assert_same_run(finished, tmp_path, "dreamer")


def test_a_lost_episode_is_named(tmp_path):
    train(Args(**TINY, out=str(tmp_path), final_episodes=0))
    (tmp_path / "episodes" / "3.npz").unlink()
    with pytest.raises(ValueError, match=r"3\.npz is missing, expected the 6 episodes"):
        train(Args(**TINY, out=str(tmp_path), final_episodes=0))


def test_both_backends_train_alike(finished, tmp_path):
    with fastrssm.use_backend("reference"):
        train(Args(**TINY, out=str(tmp_path), final_episodes=0))
    ours, plain = records(finished)[-2], records(tmp_path)[-2]
    for name in ("total_loss", "actor_loss", "value_loss", "imagined_return"):
        # float32 of both; a few updates amplify its rounding a little
        assert ours[name] == pytest.approx(plain[name], rel=1e-3), name
    assert ours != plain, "both ran on one backend"


@pytest.mark.parametrize("log_every", [2, 100])
def test_a_diverging_run_stops_and_says_where(tmp_path, monkeypatch, log_every):
    """Before its policy acts again, however seldom it is looked at."""
    update, calls = dreamer.update, iter(range(1, 99))

    def diverging(*args):
        metrics = update(*args)
        nan = torch.tensor(math.nan)
        return metrics | {"actor_loss": nan} if next(calls) == 5 else metrics

    monkeypatch.setattr(dreamer, "update", diverging)
    message = r"actor_loss is nan at update 5, .*last good checkpoint is .*step-000000003"
    with pytest.raises(ValueError, match=message):
        train(Args(**(TINY | {"log_every": log_every}), out=str(tmp_path)))
    assert load_checkpoint(tmp_path, expected=("dreamer",)).step == 3


def test_imagined_returns_rise():
    """In a frozen model whose reward is an action's effect, the policy learns to act."""
    torch.manual_seed(0)
    model = WorldModel(build_config(Args(**TINY, out="")))
    model.freeze()
    policy = TanhGaussianPolicy(model.config.feature_size, 1)
    value = build_value(model.config.feature_size)
    actor = torch.optim.Adam(policy.parameters(), lr=3e-3)
    critic = torch.optim.Adam(value.parameters(), lr=3e-3)
    noise, seen = torch.Generator().manual_seed(0), []
    for _ in range(60):
        imagined = imagine(model.rssm, policy, model.rssm.initial(16), 6, noise)
        rewards = imagined.action.squeeze(-1)
        losses, _ = behaviour_losses(
            imagined, rewards, policy, value, gamma=0.9, lambda_=0.95, entropy_scale=1e-4
        )
        for optimizer, name in ((actor, "actor"), (critic, "value")):
            optimizer.zero_grad()
            losses[name].backward()
            optimizer.step()
        seen.append(rewards.mean().item())
    # random actions earn 0, the best 1
    assert seen[0] < 0.3
    assert seen[-1] > 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "pendulum-fly"}, "--env is 'pendulum-fly'"),
        ({"episodes": 7}, "--episodes is 7, expected --prefill 2 plus a multiple of --num-envs 2"),
        ({"episodes": 1}, "--episodes is 1, expected --prefill 2"),
        ({"imagine_horizon": 1}, "--imagine-horizon is 1, expected at least 2"),
        ({"gamma": 1.0}, r"--gamma is 1\.0, expected a number below 1"),
        ({"return_lambda": 2.0}, r"--return-lambda is 2\.0, expected a number in \[0, 1\]"),
        ({"num_envs": 0}, "--num-envs is 0, expected a number above 0"),
        ({"horizon": 20}, "--horizon is 20, expected at most the 13 frames of an episode"),
        ({"device": "tpu"}, "--device is 'tpu'"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(Args(**(TINY | changes), out=str(out)))
    assert not out.exists()
