"""Metrics of a run: JSON lines, TensorBoard, Weights & Biases when asked, and the console."""

import json
import math
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastrssm.run.checkpoint import write_atomic


class Logger:
    """Write metrics to `metrics.jsonl`, to TensorBoard and to the console.

    Use it as a context manager. A terminal shows one table that is updated in place; anything else
    gets a line per record.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        *,
        start: int = 0,
        unit: str = "update",
        config: Mapping[str, Any] | None = None,
        wandb: bool = False,
        console: Console | None = None,
    ) -> None:
        """Open the files; records of later steps than `start` are removed, they will come again.

        Args:
            folder: the run folder; created if absent.
            total: steps after which the run is done.
            start: step of the checkpoint the run resumes from.
            unit: name of a step.
            config: arguments shown by Weights & Biases.
            wandb: send the metrics to Weights & Biases as well.
            console: where to print; None: standard output.

        Raises:
            RuntimeError: wandb is asked for but not installed.
        """
        self.total, self.start, self.unit = total, start, unit
        self.folder = folder
        self._wandb = _start_wandb(folder, config or {}) if wandb else None
        folder.mkdir(parents=True, exist_ok=True)
        truncate(folder / "metrics.jsonl", unit, start)
        self._jsonl = (folder / "metrics.jsonl").open("a")
        self._board = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        self._console = console or Console(file=sys.stdout)
        self._live = Live(console=self._console, auto_refresh=False)
        self._rows: list[dict[str, Tensor]] = []
        self._opened = self._marked = time.perf_counter()
        self._mark = start

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()
        self._jsonl.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep the scalars of one step for the next means, without moving them off their device."""
        self._rows.append({name: value.detach() for name, value in metrics.items()})

    def write(self, step: int) -> dict[str, float]:
        """Record the means of what was added since the last call, and the speed.

        Returns:
            The recorded means.

        Raises:
            ValueError: a value is not finite; the means are recorded first. The message names the
                first such value, its step, and the last good checkpoint.
        """
        rows, self._rows = self._rows, []
        names = list(dict.fromkeys(name for row in rows for name in row))
        held = {name: [i for i, row in enumerate(rows) if name in row] for name in names}
        # one transfer for all of them
        flat = [rows[i][name].double() for name in names for i in held[name]]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        values = {name: [next(numbers) for _ in held[name]] for name in names}
        means = {
            name: math.fsum(v) / len(v) if all(map(math.isfinite, v)) else math.nan
            for name, v in values.items()
        }
        now = time.perf_counter()
        speed = (step - self._mark) / max(now - self._marked, 1e-9)
        # rows are steps, or parts of one
        each = len(rows) == step - self._mark
        self._mark, self._marked = step, now
        self.record(step, means | {f"{self.unit}s_per_second": speed})
        self._show(step, means, speed)
        bad = [
            (i, name, value)
            for name in names
            for i, value in zip(held[name], values[name], strict=True)
            if not math.isfinite(value)
        ]
        if bad:
            i, name, value = min(bad, key=lambda item: item[0])
            first = step - len(rows) + 1 + i if each else step
            latest = self.folder / "checkpoints" / "latest"
            kept = (
                f"the last good checkpoint is {latest.resolve()}"
                if latest.exists()
                else ("there is no checkpoint yet")
            )
            raise ValueError(
                f"{name} is {value} at {self.unit} {first}, expected a finite number: "
                f"training stops; {kept}"
            )
        return means

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars of a step to the files, without the console."""
        self._jsonl.write(json.dumps({self.unit: step, "time": time.time(), **values}) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def say(self, text: str) -> None:
        """Print a line; on a terminal it appears above the table."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def paused(self) -> Generator[None]:
        """Keep the time of this block, an evaluation for example, out of the speed."""
        before = time.perf_counter()
        yield
        self._marked += time.perf_counter() - before

    def _show(self, step: int, means: Mapping[str, float], speed: float) -> None:
        elapsed = time.perf_counter() - self._opened
        left = elapsed / max(step - self.start, 1) * (self.total - step)
        head = {
            self.unit: f"{step} / {self.total}",
            "speed": f"{speed:.3g} {self.unit}s/s",
            "time left": duration(left),
        }
        # totals come last in the metrics of a model; a small terminal shows the top of the table
        body = {name: f"{value:.5g}" for name, value in reversed(list(means.items()))}
        if not self._console.is_terminal:
            self.say("  ".join(f"{name} {text}" for name, text in (head | body).items()))
            return
        table = Table(title=str(self.folder), show_header=False)
        table.add_column(style="bold")
        table.add_column(justify="right")
        for name, text in head.items():
            table.add_row(name, text)
        table.add_section()
        for name, text in body.items():
            table.add_row(name, text)
        self._live.update(table, refresh=True)


@contextmanager
def progress_bar(text: str) -> Generator[Callable[[int, int], None]]:
    """Show how much of a slow task is done, on standard error and only on a terminal.

    Yields:
        A function that takes how much is done so far, and how much there is in all.
    """
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def truncate(path: Path, unit: str, last: int) -> None:
    """Drop the records of a JSON-lines file that lie after a step, and a torn last line."""
    if not path.exists():
        return
    kept: list[str] = []
    for line in path.read_text().splitlines():
        try:
            step = json.loads(line)[unit]
        except (ValueError, KeyError, TypeError):
            continue
        if step <= last:
            kept.append(line + "\n")
    write_atomic(path, "".join(kept).encode())


def _start_wandb(folder: Path, config: Mapping[str, Any]) -> Any:
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RuntimeError(
            "wandb=True needs the package wandb: pip install wandb, or leave the flag out"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    return wandb.init(project="fastrssm", name=folder.name, dir=str(folder), config=dict(config))


def duration(seconds: float) -> str:
    """Spell a time as hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
