"""The start of a run: arguments, the folder's configuration, the device."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastrssm.run.start import check_arguments, choose_device, open_run

ARGS = {"seed": 1, "updates": 10, "rssm": {"deter": 512, "stoch": None}, "data": Path("walker")}


def test_a_changed_argument_is_named(tmp_path):
    open_run(tmp_path, "aime", ARGS)
    with pytest.raises(ValueError, match=r"rssm\.deter: 512 in the run, 256 now") as error:
        open_run(tmp_path, "aime", ARGS | {"seed": 2, "rssm": {"deter": 256, "stoch": None}})
    assert "seed: 1 in the run, 2 now" in str(error.value)
    assert "stoch" not in str(error.value)


def test_an_argument_that_says_how_long_may_change(tmp_path):
    open_run(tmp_path, "aime", ARGS)
    open_run(tmp_path, "aime", ARGS | {"updates": 20})
    assert json.loads((tmp_path / "config.json").read_text())["args"]["updates"] == 20


def test_a_run_of_another_algorithm_is_refused(tmp_path):
    open_run(tmp_path, "aime", ARGS)
    with pytest.raises(ValueError, match="holds a run of 'aime', expected 'bc'"):
        open_run(tmp_path, "bc", ARGS)


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not the config\.json of a run"):
        open_run(tmp_path, "aime", ARGS)
    (tmp_path / "config.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"has checkpoints but no config\.json"):
        open_run(tmp_path, "aime", ARGS)


@dataclass(frozen=True)
class Args:
    batch_size: int = 1
    eval_every: int = 0


def test_a_number_out_of_range_is_named():
    check_arguments(Args(), positive=("batch_size",), not_negative=("eval_every",))
    with pytest.raises(ValueError, match="--batch-size is 0, expected a number above 0"):
        check_arguments(Args(batch_size=0), positive=("batch_size",), not_negative=())
    with pytest.raises(ValueError, match="--eval-every is -1, expected a number 0 or above"):
        check_arguments(Args(eval_every=-1), positive=(), not_negative=("eval_every",))
    with pytest.raises(ValueError, match="is nan"):
        check_arguments(Args(batch_size=float("nan")), positive=("batch_size",), not_negative=())


def test_the_device_is_checked(monkeypatch):
    assert choose_device("cpu", 0) == torch.device("cpu")
    with pytest.raises(ValueError, match="--device is 'gpu'"):
        choose_device("gpu", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="finds no CUDA device"):
        choose_device("cuda:0", 0)


def test_a_share_lies_between_0_and_1():
    @dataclass
    class Args:
        lr_decay: float

    check_arguments(Args(1.0), positive=(), not_negative=(), shares=("lr_decay",))
    with pytest.raises(ValueError, match=r"--lr-decay is 1\.5, expected a number in \[0, 1\]"):
        check_arguments(Args(1.5), positive=(), not_negative=(), shares=("lr_decay",))


def test_the_precision_of_products_is_set():
    choose_device("cpu", 0, "medium")
    assert torch.get_float32_matmul_precision() == "medium"
    choose_device("cpu", 0)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    open_run(tmp_path / "a", "aime", ARGS)
    open_run(tmp_path / "a", "aime", ARGS)
    other = (
        "import sys; from pathlib import Path; from fastrssm.run.start import open_run\n"
        "open_run(Path(sys.argv[1]), 'aime', {'seed': 1})"
    )

    def elsewhere(name):
        command = [sys.executable, "-c", other, str(tmp_path / name)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = elsewhere("a")
    assert refused.returncode
    assert f"another process runs in {tmp_path / 'a'}" in refused.stderr
    # the run that this process opens next gives the first folder free
    open_run(tmp_path / "b", "aime", ARGS)
    assert "another process" not in elsewhere("a").stderr
    assert "another process runs in" in elsewhere("b").stderr
