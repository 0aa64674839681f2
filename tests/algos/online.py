"""Tiny arguments for learners that collect their own episodes."""

import json

import torch

from fastrssm.run.checkpoint import load_checkpoint
from fastrssm.run.start import Sizes

# six updates: two of the model alone, then two rounds of two, each ended by two episodes
TINY = {
    "env": "pendulum-swingup",
    "rssm": Sizes(deter=16, stoch=4, hidden=8),
    "episodes": 6,
    "prefill": 2,
    "steps": 12,
    "num_envs": 2,
    "action_noise": 0.3,
    "pretrain_updates": 2,
    "updates_per_episode": 1,
    "batch_size": 4,
    "horizon": 6,
    "imagine_horizon": 3,
    "log_every": 2,
    "checkpoint_every": 3,
}


class Killed(Exception):
    """Stands for a process that ends without another word."""


def kill_at(monkeypatch, module, number):
    """Let update `number` of this process end it, before it changes anything."""
    calls = iter(range(1, number + 1))
    update = module.update

    def mortal(*args):
        if next(calls) == number:
            raise Killed
        return update(*args)

    monkeypatch.setattr(module, "update", mortal)


def records(folder):
    """What metrics.jsonl holds, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("time", "updates_per_second")}
        for line in lines
    ]


def assert_same_run(one, other, algorithm):
    """Weights and episodes of two run folders are equal bit for bit."""
    once, twice = (load_checkpoint(f, expected=(algorithm,)) for f in (one, other))
    assert once.step == twice.step
    assert once.tensors.keys() == twice.tensors.keys()
    for name, value in once.tensors.items():
        assert torch.equal(value, twice.tensors[name]), name
    names = sorted(path.name for path in (one / "episodes").glob("*.npz"))
    assert names
    assert names == sorted(path.name for path in (other / "episodes").glob("*.npz"))
    for name in names:
        assert (one / "episodes" / name).read_bytes() == (other / "episodes" / name).read_bytes()
