"""The logger: means, truncation on resume, both faces of the console, wandb on request."""

import io
import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastrssm.run.log import Logger, progress_bar


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=100), stream


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_means_reach_every_file(tmp_path):
    plain, stream = console(terminal=False)
    with Logger(tmp_path, 4, console=plain) as logger:
        for value in (1.0, 3.0):
            logger.add({"loss": torch.tensor(value)})
        assert logger.write(2) == {"loss": 2.0}
        logger.record(2, {"eval/return": 5.0})
        logger.add({"loss": torch.tensor(7.0)})
        assert logger.write(4) == {"loss": 7.0}
    first, second, third = records(tmp_path)
    assert (first["update"], first["loss"]) == (2, 2.0)
    assert first["updates_per_second"] > 0
    assert (second["update"], second["eval/return"]) == (2, 5.0)
    assert (third["update"], third["loss"]) == (4, 7.0)
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(2, 2.0), (4, 7.0)]
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "update 2 / 4" in lines[0]
    assert "loss 2" in lines[0]


def test_a_resumed_run_forgets_what_comes_again(tmp_path):
    plain, _ = console(terminal=False)
    with Logger(tmp_path, 4, console=plain) as logger:
        for step in (1, 2, 3):
            logger.add({"loss": torch.tensor(float(step))})
            logger.write(step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"update": 3, "lo')  # a line torn by a kill
    with Logger(tmp_path, 4, start=2, console=plain) as logger:
        logger.add({"loss": torch.tensor(30.0)})
        logger.write(3)
    assert [(r["update"], r["loss"]) for r in records(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_terminal_gets_a_table(tmp_path):
    terminal, stream = console(terminal=True)
    with Logger(tmp_path, 10, console=terminal) as logger:
        logger.add({"loss": torch.tensor(0.25)})
        logger.write(5)
        logger.say("saved")
    for text in ("5 / 10", "time left", "loss", "0.25", "saved", "│"):
        assert text in stream.getvalue()


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    plain, _ = console(terminal=False)
    with Logger(tmp_path, 10, console=plain) as logger:
        logger.add({"loss": torch.tensor(float("nan"))})
        with pytest.raises(ValueError, match="loss is nan at update 5, expected a finite number"):
            logger.write(5)
    assert records(tmp_path)[0]["update"] == 5


def test_the_first_value_that_is_not_finite_is_named(tmp_path):
    folder = tmp_path / "checkpoints" / "step-000000002"
    folder.mkdir(parents=True)
    (tmp_path / "checkpoints" / "latest").symlink_to(folder.name)
    plain, _ = console(terminal=False)
    with Logger(tmp_path, 10, start=2, console=plain) as logger:
        for kl, grad in ((1.0, 1.0), (float("inf"), 1.0), (float("nan"), float("nan"))):
            logger.add({"grad": torch.tensor(grad), "kl": torch.tensor(kl)})
        message = r"kl is inf at update 4, .* the last good checkpoint is .*/step-000000002"
        with pytest.raises(ValueError, match=message):
            logger.write(5)


def test_each_mean_is_over_the_steps_that_have_it(tmp_path):
    plain, _ = console(terminal=False)
    with Logger(tmp_path, 4, console=plain) as logger:
        logger.add({"model": torch.tensor(1.0)})
        logger.add({"model": torch.tensor(2.0), "actor": torch.tensor(4.0)})
        assert logger.write(2) == {"model": 1.5, "actor": 4.0}


def test_wandb_is_used_only_when_asked(tmp_path, monkeypatch):
    sent = []
    run = SimpleNamespace(
        log=lambda values, step: sent.append((step, values)), finish=lambda: sent.append("end")
    )
    fake = SimpleNamespace(init=lambda **options: sent.append(options["config"]) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    plain, _ = console(terminal=False)
    with Logger(tmp_path / "without", 1, console=plain) as logger:
        logger.record(1, {"loss": 1.0})
    assert sent == []
    with Logger(tmp_path / "with", 1, console=plain, wandb=True, config={"seed": 1}) as logger:
        logger.record(1, {"loss": 1.0})
    assert sent == [{"seed": 1}, (1, {"loss": 1.0}), "end"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RuntimeError, match="needs the package wandb"):
        Logger(tmp_path / "absent", 1, wandb=True)


def test_a_pause_does_not_count_as_slow(tmp_path):
    plain, _ = console(terminal=False)
    with Logger(tmp_path, 2, console=plain) as logger:
        with logger.paused():
            time.sleep(0.2)
        logger.add({"loss": torch.tensor(1.0)})
        logger.write(1)
    assert records(tmp_path)[0]["updates_per_second"] > 1 / 0.2


def test_the_progress_bar_is_silent_without_a_terminal(capsys):
    with progress_bar("episodes") as advance:
        for done in (1, 2, 3):
            advance(done, 3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == ""
