"""Phase 1: it learns, it resumes exactly, and it refuses what does not fit."""

import json
from dataclasses import replace

import pytest
import torch

from fastrssm.algos.pretrain import Args, train
from fastrssm.run.checkpoint import load_checkpoint
from fastrssm.run.start import Sizes, build_config


def config_of(args):
    return build_config(args.env, args.preset, args.setup, args.rssm)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return load_checkpoint(folder, expected=("pretrain",)).tensors


def test_the_defaults_are_the_papers():
    args = Args(data="", out="", env="walker-walk")
    wanted = {"updates": 100_000, "batch_size": 50, "horizon": 50, "lr": 3e-4, "grad_clip": 100.0}
    assert {name: getattr(args, name) for name in wanted} == wanted
    rssm = config_of(args).rssm
    assert (rssm.deter, rssm.stoch, rssm.hidden) == (512, 128, 128)
    small = replace(args, preset="rssmo", env="cheetah-run", setup="lpomdp", rssm=Sizes(deter=32))
    config = config_of(small)
    assert (config.rssm.deter, config.rssm.stoch, config.inputs) == (32, 30, ("position",))


def test_a_run_leaves_what_it_promises(pretrained):
    lines = records(pretrained)
    assert [line["update"] for line in lines if "total_loss" in line] == [2, 4, 6]
    assert [line["update"] for line in lines if "prediction_velocity_mse" in line] == [3, 6]
    assert {"elbo", "kl_loss", "idm_loss", "model_grad_norm"} <= lines[0].keys()
    assert load_checkpoint(pretrained, expected=("pretrain",)).step == 6
    assert json.loads((pretrained / "config.json").read_text())["args"]["rssm"]["deter"] == 16


def test_the_inverse_dynamics_model_can_be_left_out(pretrain_args, pretrained, tmp_path):
    train(Args(**(pretrain_args | {"updates": 2}), idm=False, out=str(tmp_path)))
    rest = {name for name in weights(pretrained) if not name.startswith("world_model.idm.")}
    assert weights(tmp_path).keys() == rest < weights(pretrained).keys()
    assert "idm_loss" not in records(tmp_path)[0]


def test_the_loss_falls(pretrain_args, tmp_path):
    changes = {"updates": 120, "log_every": 40, "eval_every": 0, "lr": 3e-3}
    train(Args(**(pretrain_args | changes), out=str(tmp_path)))
    losses = [line["total_loss"] for line in records(tmp_path)]
    assert losses[0] > losses[1] > losses[2]


def test_muon_learns_and_resumes(pretrain_args, tmp_path):
    changes = {"updates": 60, "log_every": 20, "eval_every": 0, "lr": 0.01}
    changes |= {"optimizer": "muon", "weight_decay": 0.1}
    args = pretrain_args | changes | {"rssm": Sizes(deter=32, stoch=32, hidden=32)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(Args(**args, out=str(whole)))
    train(Args(**(args | {"updates": 25}), out=str(parts)))
    train(Args(**args, out=str(parts)))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(parts)[name]), name
    losses = [line["total_loss"] for line in records(whole)]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("stop", [2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(pretrain_args, pretrained, tmp_path, stop):
    train(Args(**(pretrain_args | {"updates": stop}), out=str(tmp_path)))
    torch.manual_seed(0)  # whatever happened in between must not matter
    train(Args(**pretrain_args, out=str(tmp_path)))
    once, twice = weights(pretrained), weights(tmp_path)
    assert once.keys() == twice.keys()
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name
    last = ("total_loss", "model_grad_norm")
    assert [records(pretrained)[-2][name] for name in last] == [
        records(tmp_path)[-2][name] for name in last
    ]


def test_a_lost_tail_comes_again(pretrain_args, pretrained, tmp_path):
    # a run that was killed after records which no checkpoint covers
    train(Args(**(pretrain_args | {"updates": 4}), out=str(tmp_path)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 5, "total_loss": 0.0}\n{"upd')
    train(Args(**pretrain_args, out=str(tmp_path)))
    keep = ("update", "total_loss", "prediction_velocity_mse")
    assert [{k: line.get(k) for k in keep} for line in records(tmp_path)] == [
        {k: line.get(k) for k in keep} for line in records(pretrained)
    ]


@pytest.mark.parametrize("preset", ["rssmo", "rssmo_v2", "rssmo_discrete"])
def test_every_preset_trains(pretrain_args, tmp_path, preset):
    sizes = Sizes(deter=16, stoch=8, hidden=16, groups=2 if preset == "rssmo_discrete" else None)
    changes = {"preset": preset, "setup": "lpomdp", "rssm": sizes, "updates": 2, "eval_every": 2}
    train(Args(**(pretrain_args | changes), out=str(tmp_path)))
    assert [line["update"] for line in records(tmp_path)] == [2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"env": "walker-fly"}, "--env is 'walker-fly', expected one of walker-stand"),
        ({"env": "cheetah-run"}, "column 'position' is missing"),
        ({"horizon": 31}, "no window of horizon 31 fits"),
        ({"horizon": 1}, "--horizon is 1, expected at least 2"),
        ({"lr": 0.0}, "--lr is 0.0, expected a number above 0"),
        ({"rssm": Sizes(deter=0)}, "deter is 0"),
        ({"preset": "rssm3"}, "preset is 'rssm3'"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1"),
        ({"optimizer": "sgd"}, "--optimizer is 'sgd', expected one of adam, muon"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_written(
    pretrain_args, tmp_path, changes, message
):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=message):
        train(Args(**(pretrain_args | changes), out=str(out)))
    assert not out.exists()


def test_a_changed_model_is_refused(pretrain_args, pretrained):
    changed = pretrain_args | {"rssm": Sizes(deter=32, stoch=4, hidden=8)}
    with pytest.raises(ValueError, match=r"rssm\.deter: 16 in the run, 32 now"):
        train(Args(**changed, out=str(pretrained)))
