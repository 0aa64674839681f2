"""Phase 2: only the policy learns, it resumes exactly, and its agent acts as the paper says."""

import json

import numpy as np
import pytest
import torch

from fastrssm.algos.aime import Args, train
from fastrssm.data.dataset import episode_files
from fastrssm.models.policy import TanhGaussianPolicy
from fastrssm.models.rssm import State
from fastrssm.models.world_model import WorldModel
from fastrssm.run.checkpoint import load_checkpoint
from fastrssm.run.evaluate import evaluate
from fastrssm.run.model_agent import WorldModelAgent, load_agent
from fastrssm.run.start import Sizes, build_config


@pytest.fixture(scope="module")
def aime_args(walker_data, pretrained):
    return {
        "model": str(pretrained),
        "data": str(walker_data),
        "env": "walker-run",
        "updates": 6,
        "batch_size": 4,
        "horizon": 6,
        "log_every": 2,
        "checkpoint_every": 2,
        "eval_every": 0,
        "final_episodes": 0,
    }


@pytest.fixture(scope="module")
def finished(aime_args, tmp_path_factory):
    out = tmp_path_factory.mktemp("aime")
    train(
        Args(
            **(aime_args | {"eval_every": 6, "eval_episodes": 2, "final_episodes": 3}), out=str(out)
        )
    )
    return out


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_checkpoint(folder, expected=("aime",)).tensors


def test_the_defaults_are_the_papers():
    args = Args(model="", data="", out="", env="walker-run")
    wanted = {"updates": 50_000, "batch_size": 50, "horizon": 50, "lr": 3e-4, "grad_clip": 100.0}
    wanted |= {"max_episodes": 100, "eval_every": 1000, "eval_episodes": 10, "final_episodes": 100}
    assert {name: getattr(args, name) for name in wanted} == wanted


def test_a_run_leaves_what_it_promises(finished):
    lines = records(finished)
    assert [line["update"] for line in lines if "total_loss" in line] == [2, 4, 6]
    assert {"action_mse", "policy_grad_norm", "kl_loss"} <= lines[0].keys()
    assert [line["update"] for line in lines if "eval_return" in line] == [6]
    result = json.loads((finished / "eval.json").read_text())
    assert (len(result["returns"]), result["env_id"], result["seed"]) == (3, "walker-run", 142)


def test_the_world_model_stays_as_it_was(finished, pretrained):
    before = load_checkpoint(pretrained, expected=("pretrain",)).tensors
    after = weights(finished)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_a_resumed_run_equals_an_uninterrupted_one(aime_args, finished, tmp_path):
    # stopped between two checkpoints of the other run, which also evaluated on its way
    train(Args(**(aime_args | {"updates": 3}), out=str(tmp_path)))
    train(Args(**aime_args, out=str(tmp_path)))
    once, twice = weights(finished), weights(tmp_path)
    assert once.keys() == twice.keys()
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


def test_the_actions_of_the_demonstrations_are_not_used(aime_args, finished, walker_data, tmp_path):
    blind = tmp_path / "data"
    blind.mkdir()
    for path in episode_files(walker_data):
        with np.load(path) as episode:
            kept = {k: v for k, v in episode.items() if k != "pre_action"}
        np.savez(blind / path.name, **kept)
    train(Args(**(aime_args | {"data": str(blind)}), out=str(tmp_path / "run")))
    assert "action_mse" not in records(tmp_path / "run")[0]
    once, without = weights(finished), weights(tmp_path / "run")
    for name, value in once.items():
        assert torch.equal(value, without[name]), name


@pytest.mark.parametrize("variant", [{"kl_only": True}, {"kl_scale": 0.0}, {"use_idm": True}])
def test_a_variant_trains_another_policy(aime_args, finished, tmp_path, variant):
    train(Args(**(aime_args | variant), out=str(tmp_path)))
    name = "policy.mean_net.net.0.weight"
    assert not torch.equal(weights(tmp_path)[name], weights(finished)[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "walker-fly"}, "--env is 'walker-fly'"),
        ({"env": "cheetah-run"}, "--env cheetah-run gives .* but the model of .* reads"),
        ({"model": "nowhere"}, "nowhere is not the folder of a run that has a checkpoint"),
        ({"kl_scale": -1.0}, "--kl-scale is -1.0, expected a number 0 or above"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(aime_args, tmp_path, changes, message):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(Args(**(aime_args | changes), out=str(out)))
    assert not out.exists()


def test_a_policy_is_no_world_model(aime_args, finished, tmp_path):
    with pytest.raises(ValueError, match="holds a run of 'aime', expected 'pretrain'"):
        train(Args(**(aime_args | {"model": str(finished)}), out=str(tmp_path)))


def test_the_loaded_agent_repeats_the_evaluation(finished):
    checkpoint = load_checkpoint(finished, expected=("aime",))
    agent = load_agent(checkpoint, 142, torch.device("cpu"))
    result = json.loads((finished / "eval.json").read_text())
    assert list(evaluate(agent, "walker-run", 3, seed=142).returns) == result["returns"]


def test_the_agent_filters_step_by_step():
    """The agent equals filtering the whole sequence with the same noise, and forgets at a reset."""
    torch.manual_seed(0)
    sizes = Sizes(deter=16, stoch=4, hidden=8)
    model = WorldModel(build_config("walker-walk", "rssm", "mdp", sizes))
    policy = TanhGaussianPolicy(20, 6)
    agent = WorldModelAgent(model, policy, seed=7)
    T, N = 5, 3
    sizes = dict(model.config.sensors)
    random = np.random.default_rng(1)
    obs = {name: random.normal(size=(T, N, sizes[name])).astype(np.float32) for name in sizes}
    prev_action = random.uniform(-1, 1, (T, N, 6)).astype(np.float32)
    is_first = np.zeros((T, N), bool)
    is_first[0] = True
    is_first[3, 1] = True
    prev_action[is_first] = 0
    for _ in range(2):  # a reset starts everything anew, the noise too
        agent.reset(N)
        acted = [
            agent.act({k: v[t] for k, v in obs.items()}, is_first[t], prev_action[t])
            for t in range(T)
        ]
        noise = torch.Generator().manual_seed(7)
        states = model.rssm.observe(
            model.encode({k: torch.from_numpy(v) for k, v in obs.items()}),
            torch.from_numpy(prev_action),
            noise=torch.stack([torch.randn(N, 4, generator=noise) for _ in range(T)]),
            is_first=torch.from_numpy(is_first),
        )
        wanted = policy.act(State(states.deter, states.stoch).feature).detach().numpy()
        # float32, products over 38 inputs in another blocking: a few roundings of values below 1
        np.testing.assert_allclose(np.stack(acted), wanted, rtol=0, atol=40 * np.finfo("f4").eps)


def test_noise_on_actions_is_gaussian_and_clipped():
    torch.manual_seed(0)
    model = WorldModel(
        build_config("walker-walk", "rssm", "mdp", Sizes(deter=16, stoch=4, hidden=8))
    )
    policy = TanhGaussianPolicy(20, 6)
    N = 4000
    obs = {name: np.zeros((N, size), np.float32) for name, size in model.config.sensors}
    actions = {}
    for action_noise in (0.0, 0.3):
        agent = WorldModelAgent(model, policy, 7, action_noise)
        agent.reset(N)
        actions[action_noise] = agent.act(obs, np.ones(N, bool), np.zeros((N, 6), np.float32))
    noise = actions[0.3] - actions[0.0]
    # a fresh policy acts far from the bounds, which are three deviations away
    inside = np.abs(actions[0.3]) < 1
    assert inside.mean() > 0.99
    assert np.abs(actions[0.3]).max() <= 1
    # 24,000 draws: mean and deviation within five of their standard errors
    assert abs(noise[inside].mean()) < 5 * 0.3 / np.sqrt(noise.size)
    assert abs(noise[inside].std() - 0.3) < 5 * 0.3 / np.sqrt(2 * noise.size)
