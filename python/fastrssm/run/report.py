"""Draw what runs have recorded: learning curves, and scores side by side."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastrssm.run.evaluate import EvalResult


class Bar(NamedTuple):
    """What `draw_scores` shows of one method in one place.

    Attributes:
        ours: score and the two ends of its interval. None: not measured.
        published: a score to compare with. None: there is none.
    """

    ours: tuple[float, float, float] | None
    published: float | None


def read_curve(folder: Path, name: str) -> tuple[list[int], list[float]]:
    """Give the steps and values at which a run recorded the scalar `name`."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records: list[dict[str, Any]] = [json.loads(line) for line in lines]
    found = [record for record in records if name in record]
    return [record["update"] for record in found], [record[name] for record in found]


def draw_report(
    path: Path,
    title: str,
    curves: Sequence[tuple[str, Mapping[str, tuple[list[int], list[float]]]]],
    scores: Mapping[str, EvalResult],
) -> None:
    """Draw curves over updates and a bar per result, whole or not at all.

    Args:
        path: the .png to write.
        title: of the figure.
        curves: per panel its title, and per line its label, steps and values.
        scores: per bar its label and result; the whiskers are 95 % intervals.

    Raises:
        ValueError: a result has no normalised score.
    """
    figure = Figure(figsize=(4.2 * (len(curves) + 1), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, len(curves) + 1)
    for panel, (heading, lines) in zip(panels, curves, strict=False):
        for label, (steps, values) in lines.items():
            panel.plot(steps, values, label=label, marker="." if len(steps) < 30 else None)
        panel.set(title=heading, xlabel="update")
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    bars = panels[-1]
    for place, (label, result) in enumerate(scores.items()):
        if result.score is None or result.score_interval is None:
            raise ValueError(
                f"{label} has no normalised score: {result.env_id} has no expert return"
            )
        low, high = result.score_interval
        bars.bar(place, result.score, color=f"C{place}", width=0.7)
        bars.errorbar(place, result.score, [[result.score - low], [high - result.score]], c="k")
        bars.annotate(f"{result.score:.0f}", (place, high), ha="center", va="bottom")
    bars.axhline(100, color="k", lw=0.8, ls=":")
    bars.set_xticks(range(len(scores)), [label.replace(" ", "\n", 1) for label in scores])
    bars.set(
        title=f"score, {len(next(iter(scores.values())).returns)} episodes", ylabel="expert = 100"
    )
    unfinished = path.with_name(f".{path.name}.part")
    figure.savefig(unfinished, dpi=110, format="png")
    os.replace(unfinished, path)


def draw_scores(
    path: Path, title: str, panels: Mapping[str, Sequence[tuple[str, Mapping[str, Bar]]]]
) -> None:
    """Draw scores with their intervals beside published ones, whole or not at all.

    Args:
        path: the .png to write.
        title: of the figure.
        panels: per panel its title, and per place its label and a bar per method.
    """
    widest = max(len(places) for places in panels.values())
    figure = Figure(figsize=(2.5 + 0.9 * widest, 3.6 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for panel, (heading, places) in zip(axes, panels.items(), strict=True):
        methods = list(dict.fromkeys(method for _, bars in places for method in bars))
        width = 0.8 / len(methods)
        for k, method in enumerate(methods):
            for x, bars in enumerate(bars for _, bars in places):
                bar, at = bars.get(method), x + (k - (len(methods) - 1) / 2) * width
                if bar is not None and bar.ours is not None:
                    score, low, high = bar.ours
                    panel.bar(at, score, width, color=f"C{k}")
                    panel.errorbar(at, score, [[score - low], [high - score]], c="k", lw=1)
                if bar is not None and bar.published is not None:
                    panel.plot(at, bar.published, "D", mfc="w", mec="k", ms=6)
            panel.bar(0, 0, color=f"C{k}", label=method)
        panel.plot([], [], "D", mfc="w", mec="k", ls="", label="published")
        panel.axhline(100, color="k", lw=0.8, ls=":")
        panel.set_xticks(range(len(places)), [label for label, _ in places], fontsize=8)
        panel.set(title=heading, ylabel="score, expert = 100")
        panel.legend(frameon=False, ncols=len(methods) + 1)
    unfinished = path.with_name(f".{path.name}.part")
    figure.savefig(unfinished, dpi=110, format="png")
    os.replace(unfinished, path)
