"""The results of a grid of cells beside the paper's: JSON, Markdown and a plot."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

import fastrssm.data
from fastrssm.run.checkpoint import write_atomic
from fastrssm.run.evaluate import bootstrap_interval
from fastrssm.run.grid import Record, Stage, digest
from fastrssm.run.report import Bar, draw_scores

TITLES = {"aime": "AIME", "bco": "BCO(0)", "iidm": "IIDM"}
_SETUPS = {"mdp": "MDP", "lpomdp": "LPOMDP"}


@dataclass(frozen=True)
class Cell:
    """One training of one policy: the unit of the table."""

    dataset: str
    task: str
    setup: str
    method: str
    seed: int

    @property
    def stage(self) -> str:
        """Name of its stage, which is the folder of its run."""
        return f"cells/{self.dataset}.{self.task}.{self.setup}.{self.method}.seed{self.seed}"


class Published(NamedTuple):
    """A score of the paper: mean of 100 episodes of one policy, and its standard error."""

    score: float
    error: float


class Summary(NamedTuple):
    """Scores of all episodes of the cells that differ by the seed only."""

    score: float
    low: float
    high: float
    median: float


# dataset, task, setup, method
Place = tuple[str, str, str, str]


def published() -> dict[Place, Published]:
    """Give the paper's scores by dataset, task, setup and method.

    Source: the file, data/published.json, names it.
    """
    content = json.loads((Path(fastrssm.data.__file__).parent / "published.json").read_text())
    return {(d, t, s, m): Published(score, error) for d, t, s, m, score, error in content["rows"]}


def describe(
    cells: Iterable[Cell], stages: Mapping[str, Stage], ended: Mapping[str, Record], out: Path
) -> list[dict[str, Any]]:
    """Collect what is known of every cell, as plain values for JSON.

    Args:
        cells: of the grid.
        stages: of the grid, by name.
        ended: records of the stages that have ended.
        out: folder of the grid.

    Returns:
        Per cell its place in the table, status ("done", "failed" or "open"), scores of all
        episodes with mean, median and 95 % bootstrap interval, the commands that make it with their
        digest, the wall time of its own stage in seconds, and why it failed.
    """
    rows: list[dict[str, Any]] = []
    for cell in cells:
        record, stage = ended.get(cell.stage), stages[cell.stage]
        row: dict[str, Any] = asdict(cell)
        row["status"] = "open" if record is None else record.status
        if record is not None and record.status == "done":
            result = json.loads((out / cell.stage / "eval.json").read_text())
            row["score"], row["interval"] = result["score"], result["score_interval"]
            row["median"] = 100 * result["median"] / result["expert_return"]
            row["scores"] = [
                round(100 * value / result["expert_return"], 3) for value in result["returns"]
            ]
        if record is not None:
            row["seconds"] = round(record.seconds, 1)
            row |= {"message": record.message} if record.message else {}
        row["commands"] = [s.command for s in _chain(stage, stages)]
        row["digest"] = digest(stage, stages)
        rows.append(row)
    return rows


def write_report(
    folder: Path, name: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]
) -> list[Path]:
    """Write <name>.json, <name>.md and <name>.png.

    Args:
        folder: where; made if it is absent.
        name: of the files.
        about: command, scale and episodes of the grid.
        rows: of `describe`.

    Returns:
        The paths of the files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    versions = {package: version(package) for package in ("fastrssm", "torch", "mujoco")}
    # a cell per line
    lines = ",\n".join(json.dumps(row) for row in rows)
    head = json.dumps({**about, "versions": versions})
    write_atomic(paths[0], f'{head[:-1]}, "cells": [\n{lines}\n]}}\n'.encode())
    write_atomic(paths[1], markdown(name, about, rows).encode())
    draw_scores(paths[2], f"{name}, {about['episodes']} episodes a cell", _panels(rows))
    return paths


def markdown(name: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """Set our scores beside the paper's, a section per setup."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    paper, groups = published(), _groups(rows)
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        f"# {name}",
        "",
        f"Made by `{about['command']}`.",
        "",
        f"Score: 100 is the expert's return. Ours: mean of {about['episodes']} episodes with its "
        "95 % bootstrap interval, and the median;",
        f"seeds {', '.join(map(str, seeds))}; an interval knows the spread of episodes, not that "
        "of trainings. Published: mean of 100 episodes",
        "of one training. ▼: our interval ends more than two of their standard errors below it.",
    ]
    for setup in dict.fromkeys(row["setup"] for row in rows):
        lines += ["", f"## {_SETUPS[setup]}", "", *_table(setup, methods, groups, paper)]
    failed = [row for row in rows if row["status"] == "failed"]
    lines += ["", "## Failed", ""] if failed else []
    lines += [f"- {_label(row)}, seed {row['seed']}: {row['message']}" for row in failed]
    return "\n".join(lines) + "\n"


def _table(
    setup: str,
    methods: Sequence[str],
    ours: Mapping[Place, Summary | None],
    paper: Mapping[Place, Published],
) -> Iterator[str]:
    """Give the lines of one setup: a table, and how often AIME is above BCO(0)."""
    heads = [head for m in methods for head in (TITLES[m], "median", "published")]
    yield f"| embodiment data | demonstrations | {' | '.join(heads)} |"
    yield "|---|---|" + "---:|" * len(heads)
    pairs = list(dict.fromkeys(place[:2] for place in ours if place[2] == setup))
    for dataset, task in pairs:
        places = [(dataset, task, setup, m) for m in methods]
        entries = [text for p in places for text in _entries(ours.get(p), paper.get(p))]
        yield f"| {dataset} | {task} | {' | '.join(entries)} |"
    whole = [p for p in pairs if all(ours.get((*p, setup, m)) for m in methods)]
    known = [p for p in whole if all((*p, setup, m) in paper for m in methods)]
    if not known:
        return
    means: list[str] = []
    for m in methods:
        places = [(*p, setup, m) for p in known]
        mean = fmean(found.score for p in places if (found := ours[p]))
        means += [f"{mean:.1f}", "", f"{fmean(paper[p].score for p in places):.1f}"]
    yield f"| mean of {len(known)} cells | | {' | '.join(means)} |"
    if {"aime", "bco"} <= set(methods):
        places = [((*p, setup, "aime"), (*p, setup, "bco")) for p in known]
        better = sum(_score(ours[a]) > _score(ours[b]) for a, b in places)
        theirs = sum(paper[a].score > paper[b].score for a, b in places)
        yield ""
        yield (
            f"AIME is above BCO(0) in {better} of {len(known)} cells; published: {theirs} of these."
        )


def _entries(ours: Summary | None, paper: Published | None) -> tuple[str, str, str]:
    """Give the three entries of a method in a line of the table."""
    theirs = "" if paper is None else f"{paper.score:.1f}"
    if ours is None:
        return "", "", theirs
    short = paper is not None and ours.high < paper.score - 2 * paper.error
    text = f"{ours.score:.1f} [{ours.low:.1f}, {ours.high:.1f}]{' ▼' if short else ''}"
    return text, f"{ours.median:.1f}", theirs


def _score(ours: Summary | None) -> float:
    assert ours is not None
    return ours.score


def _groups(rows: Iterable[Mapping[str, Any]]) -> dict[Place, Summary | None]:
    """Summarise the cells of all seeds together. None: none is done yet."""
    scores: dict[Place, list[float]] = {}
    for row in rows:
        place = (row["dataset"], row["task"], row["setup"], row["method"])
        scores.setdefault(place, []).extend(row.get("scores", ()))
    return {place: _summarise(np.array(values)) for place, values in scores.items()}


def _summarise(values: np.ndarray[Any, np.dtype[np.float64]]) -> Summary | None:
    if not values.size:
        return None
    low, high = bootstrap_interval(values)
    return Summary(float(values.mean()), low, high, float(np.median(values)))


def _panels(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[str, dict[str, Bar]]]]:
    """Arrange the scores for the plot: per setup, per pair of data and task, per method."""
    paper = published()
    panels: dict[str, dict[str, dict[str, Bar]]] = {}
    for place, ours in _groups(rows).items():
        dataset, task, setup, method = place
        theirs = paper.get(place)
        bar = Bar(
            None if ours is None else (ours.score, ours.low, ours.high),
            None if theirs is None else theirs.score,
        )
        pair = f"{dataset.removesuffix('-buffer')}\n{task}"
        panels.setdefault(_SETUPS[setup], {}).setdefault(pair, {})[TITLES[method]] = bar
    return {setup: list(pairs.items()) for setup, pairs in panels.items()}


def _chain(stage: Stage, stages: Mapping[str, Stage]) -> list[Stage]:
    """Give a stage after all that it needs, each once."""
    chain = [s for need in stage.needs for s in _chain(stages[need], stages)]
    return list(dict.fromkeys([*chain, stage]))


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['dataset']} → {row['task']}, {_SETUPS[row['setup']]}, {TITLES[row['method']]}"
