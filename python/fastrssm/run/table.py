"""The paper's table: embodiment dataset x demonstrations x setup x method x seed.

Every stage (dataset, world model, cell) is a folder below `out`, made by the command of the same
name in a child process of one thread; `fastrssm.run.grid` says how a grid is killed and resumed.
The cells of one (dataset, setup, seed) share one world model.

`--scale paper` runs the published sizes and schedules: whole datasets of a body, and 100 episodes
of an expert, 500 decision steps each; the models rssm for walker and rssmo for cheetah;
100,000 and 50,000 updates on batches of 50 windows of 50 frames; BCO(0) until its validation loss
stops falling, after 50 epochs at least.

`--scale cpu` is what two cores can do. It differs in:

- data: the first 100 decision steps of 1,500 random episodes and of 300 of an expert, of which
  getting up from the floor takes 30; whole episodes of the others, 500 of each part of a mix;
- model: deter 128, stoch 32 and hidden 128 for both bodies, without inverse dynamics model;
- training: 20,000 and 4,000 updates on batches of 32 windows of 50 frames; the model's by Muon with
  a learning rate of 1e-2 that falls to 0 from the first update on, and a weight decay of 0.3; the
  policy's by Adam with 5e-3 that falls to 0 over the second half; products of bfloat16.

The baselines keep their published schedule on these data. `--scale quick` is the same with 6,000
updates of the model.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

from fastrssm.data.recipes import RECIPES, parse
from fastrssm.run.grid import OUT, Record, Stage, run_grid
from fastrssm.run.log import duration
from fastrssm.run.table_report import Cell, describe, write_report

Method = Literal["aime", "bco", "iidm"]

# options of each kind of dataset, and of the command of each other stage
_TRAINING = (
    *("--eval-every", "0", "--batch-size", "32"),
    *("--matmul-precision", "medium", "--log-every", "500"),
)
_SIZES = ("--rssm.deter", "128", "--rssm.stoch", "32", "--rssm.hidden", "128")
_MODEL = (
    *("--no-idm", *_SIZES, "--optimizer", "muon", "--lr", "0.01", "--lr-decay", "1"),
    *("--weight-decay", "0.3", *_TRAINING),
)
_CPU: dict[str, tuple[str, ...]] = {
    "random": ("--episodes", "1500", "--steps", "100"),
    "mix": ("--episodes", "2000"),
    "expert": ("--episodes", "300", "--steps", "100"),
    "pretrain": ("--updates", "20000", *_MODEL),
    "aime": (
        *("--updates", "4000", "--lr", "0.005", "--lr-decay", "0.5", "--max-episodes", "300"),
        *_TRAINING,
    ),
    "bco": ("--max-episodes", "300"),
    "iidm": ("--max-episodes", "300"),
}
SCALES: dict[str, dict[str, tuple[str, ...]]] = {
    "paper": {},
    "cpu": _CPU,
    "quick": {**_CPU, "pretrain": ("--updates", "6000", *_MODEL)},
}
_PRESETS = {"walker": "rssm", "cheetah": "rssmo"}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Make the paper's table, or a part of it: train, evaluate, and set beside what is published.

    The same command goes on where it stopped, at whatever moment it was killed.
    """

    out: Path = Path("runs/table")
    """Folder of all datasets, models and cells; its last part names the results."""
    results: Path = Path("results")
    """Folder for <name>.json, <name>.md and <name>.png, written anew after each cell."""
    scale: Literal["paper", "cpu", "quick"] = "paper"
    """Published sizes and schedules, or those that two cores can do, in hours or in minutes."""
    quick: bool = False
    """One small corner of the table from nothing, on two cores in less than 15 minutes."""
    datasets: tuple[str, ...] = (
        "walker-random",
        "walker-plan2explore",
        "walker-stand-buffer",
        "walker-walk-buffer",
        "walker-run-buffer",
        "walker-mix",
    )
    """Recipes of the embodiment datasets."""
    tasks: tuple[str, ...] = ("walker-stand", "walker-walk", "walker-run")
    """Demonstrated tasks; each meets the datasets of its body."""
    setups: tuple[Literal["mdp", "lpomdp"], ...] = ("mdp", "lpomdp")
    """What the agent sees: all sensors, or positions only."""
    methods: tuple[Method, ...] = ("aime", "bco")
    """Commands that imitate without actions."""
    seeds: tuple[int, ...] = (0,)
    """Of models and cells; the datasets are the same for all."""
    jobs: int = 0
    """Stages at a time, one thread each; 0: one per core."""
    episodes: int = 100
    """Episodes of the evaluation of a cell."""


QUICK = Args(
    out=Path("runs/table-quick"),
    scale="quick",
    quick=True,
    datasets=("walker-run-buffer",),
    tasks=("walker-walk",),
    setups=("mdp",),
)


def make_table(args: Args) -> int:
    """Run the grid and write the table.

    Returns:
        How many cells failed.

    Raises:
        ValueError: an argument names what does not exist, or is out of its range.
    """
    stages, cells = plan(args)
    named = {stage.name: stage for stage in stages}
    runs = {cell.stage: cell for cell in cells}
    about = {"command": _command(args), "scale": args.scale, "episodes": args.episodes}
    jobs = args.jobs or len(os.sched_getaffinity(0))
    start = time.time()

    def write(ended: Mapping[str, Record]) -> list[Path]:
        rows = describe(cells, named, ended, args.out)
        return write_report(args.results, args.out.name, about, rows)

    def report(stage: Stage, ended: Mapping[str, Record], left: float) -> None:
        record = ended[stage.name]
        text = f"{record.status} in {duration(record.seconds)}"
        if record.status == "failed":
            text = f"failed: {record.message}"
        elif stage.name in runs:
            result = json.loads((args.out / stage.name / "eval.json").read_text())
            low, high = result["score_interval"]
            text += f", score {result['score']:.1f} [{low:.1f}, {high:.1f}]"
        print(
            f"[{duration(time.time() - start)}] {len(ended)}/{len(stages)} {stage.name}: {text}; "
            f"{duration(left)} left",
            flush=True,
        )
        if stage.name in runs:
            write(ended)

    ended = run_grid(stages, args.out, jobs, report)
    for path in write(ended):
        print(path)
    return sum(ended[name].status == "failed" for name in runs)


def plan(args: Args) -> tuple[list[Stage], list[Cell]]:
    """List the stages, each after those it needs, and the cells of the table.

    Raises:
        ValueError: an argument names what does not exist, or is out of its range.
    """
    _check(args)
    options = SCALES[args.scale]
    final = ("--final-episodes", str(args.episodes))
    stages: dict[str, Stage] = {}
    cells: list[Cell] = []

    def add(name: str, kind: str, words: Sequence[str], *needs: str) -> str:
        stages.setdefault(name, Stage(name, kind, tuple(words), needs))
        return f"{OUT}/{name}"

    for setup, dataset, seed in product(args.setups, args.datasets, args.seeds):
        body, recipe = f"data/{dataset}", parse(dataset)
        data = add(body, "data", _make(dataset, options.get(recipe.kind, ())))
        common = ("--setup", setup, "--seed", str(seed), "--threads", "1")
        model = f"models/{dataset}.{setup}.seed{seed}"
        if "aime" in args.methods:
            words = ("pretrain", "--data", data, "--env", recipe.env_id)
            words += ("--preset", _PRESETS[_body(dataset)], *common)
            out = ("--out", f"{OUT}/{model}")
            add(model, "pretrain", (*words, *out, *options.get("pretrain", ())), body)
        tasks = [task for task in args.tasks if _body(task) == _body(dataset)]
        for task, method in product(tasks, args.methods):
            cell = Cell(dataset, task, setup, method, seed)
            cells.append(cell)
            shown = f"data/{task}-expert"
            add(shown, "data", _make(f"{task}-expert", options.get("expert", ())))
            words = ["--data", f"{OUT}/{shown}", "--env", task, "--out", f"{OUT}/{cell.stage}"]
            words += [*final, *options.get(method, ())]
            if method == "aime":
                words = ["aime", "--model", f"{OUT}/{model}", *common[2:], *words]
                add(cell.stage, method, words, model, shown)
            else:
                words = [method, "--body", data, *common, *words]
                add(cell.stage, method, words, body, shown)
    return list(stages.values()), cells


def _make(recipe: str, options: Sequence[str]) -> tuple[str, ...]:
    return ("data", "make", recipe, "--out", f"{OUT}/data/{recipe}", *options)


def _body(name: str) -> str:
    return name.partition("-")[0]


def _check(args: Args) -> None:
    """Refuse what does not exist, or cannot meet."""
    for name in ("datasets", "tasks", "setups", "methods", "seeds"):
        values: tuple[object, ...] = getattr(args, name)
        if not values or len(set(values)) < len(values):
            raise ValueError(f"--{name} is {values}, expected at least one, each once")
    embodiment = [name for name, recipe in RECIPES.items() if recipe.kind != "expert"]
    shown = [name.removesuffix("-expert") for name in RECIPES if name.endswith("-expert")]
    for option, values, known in (
        ("datasets", args.datasets, embodiment),
        ("tasks", args.tasks, shown),
    ):
        for value in values:
            if value not in known:
                expected = ", ".join(known)
                raise ValueError(f"--{option} names {value!r}, expected some of {expected}")
    lone = {_body(name) for name in args.datasets} ^ {_body(name) for name in args.tasks}
    if lone:
        raise ValueError(
            f"--datasets and --tasks must be of the same bodies, got one without the other for "
            f"{', '.join(sorted(lone))}"
        )
    for name, low in (("jobs", 0), ("episodes", 1)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name} is {getattr(args, name)}, expected at least {low}")
    if min(args.seeds) < 0:
        raise ValueError(f"--seeds is {args.seeds}, expected numbers 0 or above")


def _command(args: Args) -> str:
    """Spell the command that makes the same table."""
    words = ["fastrssm", "table", "--scale", args.scale]
    for name in ("datasets", "tasks", "setups", "methods", "seeds"):
        words += [f"--{name}", *map(str, getattr(args, name))]
    return " ".join([*words, "--episodes", str(args.episodes)])
