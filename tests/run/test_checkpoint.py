"""Checkpoints: what is written is read, nothing is ever torn, and other models are refused."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastrssm.run.checkpoint import load_checkpoint, restore, resume, save_checkpoint

ARGS = {"seed": 1, "updates": 10, "rssm": {"deter": 512, "stoch": None}, "data": Path("walker")}


def save(folder: Path, step: int, value: float, **train_state: object) -> nn.Linear:
    module = nn.Linear(3, 2)
    nn.init.constant_(module.weight, value)
    save_checkpoint(
        folder,
        step,
        algorithm="aime",
        config={"args": ARGS},
        modules={"policy": module},
        train_state=train_state,
    )
    return module


def test_what_is_saved_is_resumed(tmp_path):
    random, noise = np.random.default_rng(3), torch.Generator().manual_seed(4)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    module = save(
        tmp_path,
        7,
        0.5,
        optimizer=optimizer.state_dict(),
        numpy=random.bit_generator.state,
        torch=noise.get_state(),
    )
    copy = nn.Linear(3, 2)
    state = resume(tmp_path, "aime", {"policy": copy})
    assert state is not None
    assert state["step"] == 7
    # the state of numpy's generator holds integers of 128 bits
    assert state["numpy"] == random.bit_generator.state
    assert torch.equal(state["torch"], noise.get_state())
    assert state["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    for name, value in module.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value)
    assert load_checkpoint(tmp_path, expected=("aime",)).config["args"]["data"] == "walker"


def test_only_the_latest_checkpoint_stays(tmp_path):
    for step in (1, 2, 2, 3):
        save(tmp_path, step, float(step))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-000000003",
    ]


def test_a_copy_that_followed_links_goes_on(tmp_path):
    save(tmp_path / "run", 4, 4.0)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", symlinks=False)
    save(tmp_path / "copy", 5, 5.0)
    checkpoint = load_checkpoint(tmp_path / "copy", expected=("aime",))
    assert checkpoint.step == 5
    assert len(list((tmp_path / "copy" / "checkpoints").iterdir())) == 2


# one interpreter imports torch once and forks a writer per round; the writer dies in the middle
KILLER = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from fastrssm.run.checkpoint import load_checkpoint, resume, save_checkpoint

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
random.seed(0)
torn = changed = last = 0
for _ in range(rounds):
    child = os.fork()
    if child == 0:
        step = last
        while True:
            step += 1
            module = nn.Linear(64, 64)
            nn.init.constant_(module.weight, step)
            mark = torch.full((64,), step)
            save_checkpoint(folder, step, algorithm="aime", config={"args": {}},
                            modules={"policy": module}, train_state={"mark": mark})
    time.sleep(random.uniform(0.0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    checkpoints = folder / "checkpoints"
    names = [p.name for p in checkpoints.iterdir()] if checkpoints.exists() else []
    torn += any(name.endswith(".tmp") for name in names) or len(names) > 2
    module = nn.Linear(64, 64)
    state = resume(folder, "aime", {"policy": module})
    if state is None:
        assert last == 0, "a checkpoint was lost"
        continue
    step = state["step"]
    assert step >= last, f"went back from {last} to {step}"
    assert bool((module.weight == step).all()), "weights of another step"
    assert bool((state["mark"] == step).all()), "training state of another step"
    assert load_checkpoint(folder, expected=("aime",)).step == step
    changed += step > last
    last = step
print(torn, changed)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(tmp_path), "60"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    torn, changed = map(int, done.stdout.split())
    # otherwise the kills never hit a write, or nothing was ever written
    assert torn >= 5
    assert changed >= 5


def test_a_run_of_another_algorithm_is_refused(tmp_path):
    save(tmp_path, 1, 1.0)
    with pytest.raises(ValueError, match="holds a run of 'aime', expected 'pretrain'"):
        load_checkpoint(tmp_path, expected=("pretrain",))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(4, 2), r"policy\.weight is \[2, 3\], expected \[2, 4\]"),
        (nn.Linear(3, 2, bias=False), r"policy\.bias is \[2\], expected absent"),
        (nn.Sequential(nn.Linear(3, 2)), r"policy\.0\.bias is absent, expected \[2\]"),
    ],
)
def test_another_model_variant_is_refused(tmp_path, module, message):
    save(tmp_path, 1, 1.0)
    with pytest.raises(ValueError, match=message):
        restore(load_checkpoint(tmp_path, expected=("aime",)), {"policy": module})


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    save(tmp_path, 1, 1.0)
    with pytest.raises(ValueError, match=r"policy\.weight is not finite at step 2"):
        save(tmp_path, 2, float("nan"))
    assert load_checkpoint(tmp_path, expected=("aime",)).step == 1


@pytest.mark.parametrize("name", ["model.safetensors", "train_state.pt"])
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    save(tmp_path, 1, 1.0)
    path = tmp_path / "checkpoints" / "latest" / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{name} is damaged or foreign"):
        resume(tmp_path, "aime", {"policy": nn.Linear(3, 2)})


def test_a_folder_without_checkpoint_is_one_sentence(tmp_path):
    assert resume(tmp_path, "aime", {}) is None
    with pytest.raises(ValueError, match="is not the folder of a run that has a checkpoint"):
        load_checkpoint(tmp_path, expected=("aime",))


def test_loading_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "trapped"),)

    save(tmp_path, 1, 1.0)
    torch.save({"step": Trap()}, tmp_path / "checkpoints" / "latest" / "train_state.pt")
    with pytest.raises(ValueError, match="is damaged or foreign"):
        resume(tmp_path, "aime", {"policy": nn.Linear(3, 2)})
    assert not (tmp_path / "trapped").exists()
