"""Run a graph of commands in child processes, as long as it takes and however often it is killed.

    OUT/<stage>             the folder that a stage makes, for example a run
    OUT/stages/<stage>.json how it went
    OUT/logs/<stage>.log    all that it printed

A stage is done when its record says so. What was running when the grid was killed is run again, and
goes on by itself from its last checkpoint.
"""

import fcntl
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from fastrssm.run.checkpoint import write_atomic

# stands for the folder of the grid in the words of a stage
OUT = "$OUT"
_POLL_SECONDS = 0.1
_PROGRAM = (sys.executable, "-m", "fastrssm")


class Stage(NamedTuple):
    """One command of a grid.

    Attributes:
        name: unique; also the folder that it makes, below that of the grid.
        kind: stages of one kind take about as long as each other.
        words: of the command line, without the program; OUT stands for the grid's folder.
        needs: names of the stages whose folders it reads.
    """

    name: str
    kind: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The command as one types it."""
        words = [word if word.startswith(OUT) else shlex.quote(word) for word in self.words]
        return " ".join(["fastrssm", *words])


@dataclass(frozen=True)
class Record:
    """How a stage went.

    Attributes:
        command: with OUT for the grid's folder.
        status: "started" of a grid that was killed meanwhile, too.
        started: seconds since the epoch, of the last attempt.
        seconds: wall time of all attempts, as far as they left a trace.
        message: why it failed.
    """

    command: str
    status: Literal["started", "done", "failed"]
    started: float
    seconds: float
    message: str = ""


# the stage that ended, the records of all that have, and seconds until the end
Report = Callable[[Stage, Mapping[str, Record], float], None]


def run_grid(stages: Sequence[Stage], out: Path, jobs: int, report: Report) -> dict[str, Record]:
    """Run all stages that are not done yet, in order as far as their needs allow.

    A stage that fails takes those with it that need it, and no others.

    Args:
        stages: each after those it needs.
        out: folder of the grid.
        jobs: how many at a time; each gets one thread.
        report: called after each stage that ends now, or that cannot begin.

    Returns:
        The record of every stage.
    """
    with _claimed(out) as lock, _stoppable():
        records = {stage.name: _read_record(out, stage) for stage in stages}
        ended: dict[str, Record] = {
            name: record for name, record in records.items() if record and record.status == "done"
        }
        left = [stage for stage in stages if stage.name not in ended]
        running: dict[str, tuple[Stage, Record, subprocess.Popen[bytes]]] = {}

        def end(stage: Stage, record: Record) -> None:
            _write_record(out, stage, record)
            ended[stage.name] = record
            missing = [stage for stage in stages if stage.name not in ended]
            report(stage, ended, _seconds_left(missing, ended, stages) / jobs)

        try:
            while left or running:
                for stage in list(left):
                    broken = [n for n in stage.needs if n in ended and ended[n].status == "failed"]
                    if broken:
                        left.remove(stage)
                        why = f"needs {broken[0]}, which failed: {ended[broken[0]].message}"
                        end(stage, Record(stage.command, "failed", time.time(), 0.0, why))
                    elif len(running) < jobs and all(need in ended for need in stage.needs):
                        left.remove(stage)
                        record = _begin(out, stage, records[stage.name])
                        running[stage.name] = (stage, record, _start(out, stage, lock))
                time.sleep(_POLL_SECONDS)
                for stage, record, child in list(running.values()):
                    if child.poll() is not None:
                        del running[stage.name]
                        end(stage, _finish(out, stage, record, child.returncode))
        finally:
            # whatever stops the grid stops its children; they resume, so nothing is lost
            for _, _, child in running.values():
                child.terminate()
            for _, _, child in running.values():
                child.wait()
        return ended


def digest(stage: Stage, stages: Mapping[str, Stage]) -> str:
    """Summarise the commands of a stage and of all it needs in twelve characters."""
    content = stage.command + "".join(digest(stages[need], stages) for need in stage.needs)
    return hashlib.sha256(content.encode()).hexdigest()[:12]


@contextmanager
def _claimed(out: Path) -> Generator[IO[str]]:
    """Keep a second grid, and children that survived an earlier one, out of the folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{out} is in use by another grid or a stage that one left: waiting", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@contextmanager
def _stoppable() -> Generator[None]:
    """Let SIGTERM end the grid as Ctrl-C does, with its children."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _begin(out: Path, stage: Stage, before: Record | None) -> Record:
    """Write that a stage starts; keeps the time that earlier attempts took."""
    spent = 0.0
    if before is not None and before.command == stage.command:
        spent = before.seconds
        trace = out / stage.name / "metrics.jsonl"
        if before.status == "started" and trace.exists():
            spent += max(trace.stat().st_mtime - before.started, 0.0)
    record = Record(stage.command, "started", time.time(), spent)
    _write_record(out, stage, record)
    return record


def _start(out: Path, stage: Stage, lock: IO[str]) -> subprocess.Popen[bytes]:
    log = _path(out, "logs", stage, ".log")
    words = [word.replace(OUT, str(out), 1) for word in stage.words]
    with log.open("ab") as file:
        return subprocess.Popen(
            [*_PROGRAM, *words],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # as long as a child lives, the folder is claimed
            pass_fds=(lock.fileno(),),
        )  # fmt: skip


def _finish(out: Path, stage: Stage, record: Record, code: int) -> Record:
    seconds = record.seconds + time.time() - record.started
    if code == 0:
        return replace(record, status="done", seconds=seconds)
    lines = _path(out, "logs", stage, ".log").read_text(errors="replace").splitlines()
    lines = [line.strip() for line in lines if line.strip()] or ["it printed nothing"]
    # an error may list details in the lines that follow it
    errors = [at for at, line in enumerate(lines) if line.startswith("error: ")]
    said = " ".join(lines[errors[-1] :] if errors else lines[-1:])
    ending = f"signal {-code}" if code < 0 else f"exit code {code}"
    message = f"{ending}: {said.removeprefix('error: ')}"
    return replace(record, status="failed", seconds=seconds, message=message)


def _seconds_left(
    missing: Sequence[Stage], ended: Mapping[str, Record], stages: Sequence[Stage]
) -> float:
    """Estimate the time of some stages from those of their kind, else from all, that are done."""
    took: dict[str, list[float]] = {}
    for stage in stages:
        record = ended.get(stage.name)
        if record is not None and record.status == "done":
            took.setdefault(stage.kind, []).append(record.seconds)
    everything = [seconds for times in took.values() for seconds in times] or [0.0]
    means = [took.get(stage.kind, everything) for stage in missing]
    return sum(sum(times) / len(times) for times in means)


def _read_record(out: Path, stage: Stage) -> Record | None:
    """Read how an earlier attempt went. None: there was none, or with another command."""
    path = _path(out, "stages", stage, ".json")
    if not path.exists():
        return None
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        record = Record(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not the record of a stage: {error}") from error
    if record.command != stage.command:
        return None
    # a dataset appears when it is whole, so it was only the record that came too late
    if stage.kind == "data" and record.status == "started" and (out / stage.name).exists():
        return replace(record, status="done")
    return record


def _write_record(out: Path, stage: Stage, record: Record) -> None:
    content = json.dumps(asdict(record), indent=1) + "\n"
    write_atomic(_path(out, "stages", stage, ".json"), content.encode())


def _path(out: Path, folder: str, stage: Stage, suffix: str) -> Path:
    path = out / folder / f"{stage.name.replace('/', '.')}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
