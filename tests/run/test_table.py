"""The grid of cells: what is run, what a kill and a failure leave, and the table they make."""

import fcntl
import json
import signal
import subprocess
import sys
import time

import pytest

from fastrssm.cli import main
from fastrssm.data.recipes import RECIPES
from fastrssm.run import grid, table
from fastrssm.run.grid import Record, Stage, run_grid
from fastrssm.run.table_report import markdown, published

# a child that works for a while, and writes how often it began
WORK = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "begun").open("a") as file:
    file.write("x")
time.sleep(float(sys.argv[2]))
if sys.argv[3:]:
    sys.exit("error: " + sys.argv[3])
(folder / "end").touch()
"""
# a child that stops the grid if it is the second one: one signal, as two would stop the tests, too
KILL = """
import os, signal, sys, time
time.sleep(0.2)
if sys.argv[1].endswith("b"):
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
GRID = f"""
import pathlib, sys
from fastrssm.run import grid
grid._PROGRAM = (sys.executable, "-c", {WORK!r})
out = grid.OUT
stages = [
    grid.Stage("quick", "work", (f"{{out}}/quick", "0")),
    grid.Stage("slow", "work", (f"{{out}}/slow", "1.5"), ("quick",)),
]
grid.run_grid(stages, pathlib.Path(sys.argv[1]), 1, lambda *_: None)
"""


def work(name, seconds="0", *error, needs=()):
    return Stage(name, "work", (f"{grid.OUT}/{name}", seconds, *error), needs)


@pytest.fixture
def works(monkeypatch):
    """Let stages run WORK instead of the command line."""
    monkeypatch.setattr(grid, "_PROGRAM", (sys.executable, "-c", WORK))


def begun(out, name):
    path = out / name / "begun"
    return len(path.read_text()) if path.exists() else 0


def test_a_killed_grid_goes_on_without_repeating_what_is_done(works, tmp_path):
    out = tmp_path / "out"
    child = subprocess.Popen([sys.executable, "-c", GRID, str(out)])
    while not begun(out, "slow"):
        assert child.poll() is None
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    # the stage outlives its grid, and nothing else may work in the folder as long as it does
    assert not (out / "slow" / "end").exists()
    reports = []
    stages = [work("quick"), work("slow", "1.5", needs=("quick",)), work("last")]
    before = time.time()
    ended = run_grid(stages, out, 1, lambda stage, *_: reports.append(stage.name))
    assert time.time() - before > 1.5
    assert reports == ["slow", "last"]
    assert {record.status for record in ended.values()} == {"done"}
    assert [begun(out, name) for name in ("quick", "slow", "last")] == [1, 2, 1]
    run_grid(stages, out, 1, lambda stage, *_: reports.append(stage.name))
    assert reports == ["slow", "last"]


def test_sigterm_ends_the_stages_too(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "_PROGRAM", (sys.executable, "-c", KILL))
    start = time.time()
    with pytest.raises(KeyboardInterrupt):
        run_grid([work("a"), work("b")], tmp_path, 2, lambda *_: None)
    assert time.time() - start < 30
    # no child is left that would keep the folder
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_failure_stops_what_needs_it_and_nothing_else(works, tmp_path):
    stages = [
        work("data"),
        work("bad", "0", "loss is nan\n  at update 7", needs=("data",)),
        work("policy", needs=("bad",)),
        work("cell", needs=("policy",)),
        work("other", needs=("data",)),
    ]
    ended = run_grid(stages, tmp_path, 2, lambda *_: None)
    done = {name for name, record in ended.items() if record.status == "done"}
    assert done == {"data", "other"}
    assert ended["bad"].message == "exit code 1: loss is nan at update 7"
    assert "needs bad, which failed: exit code 1: loss is nan" in ended["policy"].message
    assert begun(tmp_path, "policy") == begun(tmp_path, "cell") == 0
    # what failed is tried again, and what needs it follows
    mended = [work("bad", needs=("data",)) if s.name == "bad" else s for s in stages]
    ended = run_grid(mended, tmp_path, 2, lambda *_: None)
    assert {record.status for record in ended.values()} == {"done"}
    assert [begun(tmp_path, name) for name in ("data", "bad", "other")] == [1, 2, 1]


def test_jobs_run_side_by_side_and_the_time_left_is_known(works, tmp_path):
    stages = [work(str(n), "0.4") for n in range(4)]
    lefts = []
    start = time.time()
    run_grid(stages, tmp_path, 4, lambda _, ended, left: lefts.append((len(ended), left)))
    # one after the other they would sleep that long; each starts an interpreter, too
    assert time.time() - start < 4 * 0.4
    assert lefts[-1] == (4, 0.0)
    count, left = lefts[0]
    assert count == 1
    assert 3 * 0.4 / 4 < left < 10


def test_a_dataset_whose_record_came_too_late_is_whole(works, tmp_path):
    stage = work("data/walker-random")._replace(kind="data")
    (tmp_path / stage.name).mkdir(parents=True)
    grid._write_record(tmp_path, stage, Record(stage.command, "started", time.time(), 0.0))
    assert run_grid([stage], tmp_path, 1, lambda *_: None)[stage.name].status == "done"
    assert begun(tmp_path, stage.name) == 0


def test_the_plan_shares_models_and_data():
    args = table.Args(datasets=("walker-random", "cheetah-random"), seeds=(0, 1), scale="cpu",
                      tasks=("walker-walk", "walker-run", "cheetah-run"), out="x")  # fmt: skip
    stages, cells = table.plan(args)
    names = [stage.name for stage in stages]
    assert len(set(names)) == len(names)
    # (2 walker tasks + 1 of cheetah) x 2 setups x 2 methods x 2 seeds
    assert len(cells) == 24
    kinds = [stage.kind for stage in stages]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "data": 5, "pretrain": 8, "aime": 12, "bco": 12,
    }  # fmt: skip
    for at, stage in enumerate(stages):
        assert set(stage.needs) <= set(names[:at]), stage
    model = next(s for s in stages if s.name == "models/cheetah-random.lpomdp.seed1")
    assert "--preset rssmo --setup lpomdp --seed 1 --threads 1" in model.command
    assert model.command.startswith("fastrssm pretrain --data $OUT/data/cheetah-random --env")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A table of one pair at a tiny scale, made twice: its folder, the exit codes and tables."""
    folder = tmp_path_factory.mktemp("grid")
    sizes = ("--rssm.deter", "8", "--rssm.stoch", "2", "--rssm.hidden", "8")
    few = ("--updates", "2", "--batch-size", "4", "--horizon", "8", "--eval-every", "0")
    scale = {
        "random": ("--episodes", "2", "--steps", "20"),
        "expert": ("--episodes", "2", "--steps", "20"),
        "pretrain": (*few, *sizes),
        "aime": few,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(table.SCALES, "cpu", scale)
        words = ["table", "--scale", "cpu", "--datasets", "walker-random", "--tasks", "walker-walk"]
        words += ["--setups", "mdp", "--methods", "aime", "--episodes", "3", "--out", "runs/tiny"]
        codes, tables = [], []
        for _ in range(2):
            codes.append(main(words))
            tables.append((folder / "results/tiny.md").read_text())
    return folder, codes, tables


def test_a_table_from_nothing(tiny):
    folder, codes, tables = tiny
    assert codes == [0, 0]
    found = json.loads((folder / "results/tiny.json").read_text())
    (aime,) = found["cells"]
    assert (aime["method"], aime["status"]) == ("aime", "done")
    assert len(aime["scores"]) == 3
    low, high = aime["interval"]
    assert low <= aime["score"] <= high
    assert aime["score"] == pytest.approx(sum(aime["scores"]) / 3, abs=1e-3)
    assert [words.split()[1] for words in aime["commands"]] == ["data", "pretrain", "data", "aime"]
    assert aime["commands"][0].endswith("--out $OUT/data/walker-random --episodes 2 --steps 20")
    assert (folder / "results/tiny.png").read_bytes().startswith(b"\x89PNG")
    # the paper's 17.62 stands beside ours
    row = next(line for line in tables[0].splitlines() if line.startswith("| walker-random"))
    assert f"| {aime['score']:.1f} [{low:.1f}, {high:.1f}]" in row
    assert row.endswith("| 17.6 |")
    # a second time nothing is trained, and the table is the same
    assert tables[0] == tables[1]
    assert json.loads((folder / "results/tiny.json").read_text()) == found
    logs = folder / "runs/tiny/logs"
    assert (logs / "models.walker-random.mdp.seed0.log").read_text().count("from update") == 1


def test_a_table_with_failures_ends_with_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fail = "import sys; sys.exit('error: loss is nan at update 7')"
    monkeypatch.setattr(grid, "_PROGRAM", (sys.executable, "-c", fail))
    assert main(["table", "--quick", "--out", "runs/broken"]) == 1
    out = capsys.readouterr().out
    assert "5/5 cells/walker-run-buffer.walker-walk.mdp." in out
    assert out.count("loss is nan at update 7") == 5
    found = json.loads((tmp_path / "results/broken.json").read_text())
    assert [cell["status"] for cell in found["cells"]] == ["failed", "failed"]


def test_published_means_are_those_of_the_paper():
    scores = published()
    for body, setup, method, cells, mean in (
        ("walker", "mdp", "aime", 18, 72.53),
        ("walker", "mdp", "bco", 18, 63.45),
        ("walker", "lpomdp", "aime", 18, 72.21),
        ("walker", "lpomdp", "bco", 18, 41.39),
        ("cheetah", "mdp", "aime", 24, 39.08),
        ("cheetah", "lpomdp", "bco", 24, 33.71),
    ):
        found = [
            score.score
            for (dataset, _, s, m), score in scores.items()
            if (dataset.split("-")[0], s, m) == (body, setup, method)
        ]
        assert len(found) == cells
        # means of rounded numbers
        assert sum(found) / cells == pytest.approx(mean, abs=0.01)
    recipes = {f"{task}-expert" for _, task, _, _ in scores} | {place[0] for place in scores}
    assert recipes <= set(RECIPES)


def row(task, method, scores, seed=0):
    place = {"dataset": "walker-run-buffer", "task": task, "setup": "lpomdp", "method": method}
    return {**place, "seed": seed, "status": "done", "scores": scores}


def test_the_table_counts_where_aime_is_above_and_marks_what_falls_short():
    rows = [
        row("walker-stand", "aime", [95.0, 97.0]),
        row("walker-stand", "bco", [70.0, 70.0]),
        row("walker-walk", "aime", [40.0, 42.0]),
        row("walker-walk", "aime", [60.0, 62.0], seed=1),
        row("walker-walk", "bco", [55.0, 65.0]),
        row("walker-run", "bco", []) | {"status": "failed", "message": "loss is nan at update 7"},
        row("walker-run", "aime", [80.0]),
    ]
    text = markdown("x", {"command": "fastrssm table", "episodes": 2}, rows)
    lines = text.splitlines()
    assert "| 96.0 [95.0, 97.0] | 96.0 | 95.7 | 70.0 [70.0, 70.0] | 70.0 | 66.3 |" in text
    # the seeds together; published 88.4 and 40.3
    assert any("walker-walk | 51.0 [" in line and " ▼ | 51.0 | 88.4 | 60.0 [" in line
               for line in lines)  # fmt: skip
    assert "| walker-run-buffer | walker-run | 80.0 [80.0, 80.0] ▼ | 80.0 | 84.6 | | | 55.8 |" in (
        text.replace("  ", " ")
    )
    assert "| mean of 2 cells | | 73.5 |  | 92.1 | 65.0 |  | 53.3 |" in text
    assert "AIME is above BCO(0) in 1 of 2 cells; published: 2 of these." in text
    why = "walker-run-buffer → walker-run, LPOMDP, BCO(0), seed 0: loss is nan at update 7"
    assert lines[-3:] == ["## Failed", "", f"- {why}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--datasets", "walker-fly"], "--datasets names 'walker-fly', expected some of walker-ra"),
        (["--datasets", "walker-run-expert"], "--datasets names 'walker-run-expert'"),
        (["--tasks", "walker-fly"], "--tasks names 'walker-fly', expected some of walker-stand"),
        (["--tasks", "cheetah-run"], "one without the other for cheetah, walker"),
        (["--seeds", "1", "1"], "--seeds is (1, 1), expected at least one, each once"),
        (["--seeds", "-1"], "--seeds is (-1,), expected numbers 0 or above"),
        (["--episodes", "0"], "--episodes is 0, expected at least 1"),
        (["--quick", "--jobs", "-1"], "--jobs is -1, expected at least 0"),
    ],
)
def test_a_mistake_is_named_before_any_work(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["table", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
