# SPDX-License-Identifier: Apache-2.0
"""Charts, drawn from the CSV file alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench.harness.compare import BASELINE
from bench.harness.results import Row, read, read_table
from gohsp.files import replacing

OWN_COLOUR, OTHER_COLOUR = "#c1440e", "#8a9ba8"


@dataclass(frozen=True)
class Chart:
    """A chart of bars: one metric of one routine.

    Attributes:
        metric: Metric of the rows that are drawn.
        axis: What the bars show.
    """

    metric: str
    axis: str


CHARTS = {
    "end-to-end": Chart("time", "milliseconds a batch (less is better)"),
    "sublayers": Chart("time", "milliseconds for the sublayers of all blocks (less is better)"),
    "kernels": Chart("ratio", f"time as a multiple of {BASELINE}'s (more is slower)"),
    "contention": Chart("growth", "time beside a busy core, as a multiple of the time on a quiet machine"),
}


def draw_all(source: Path, directory: Path) -> list[Path]:
    """Draw a chart of every routine that the file has rows of.

    Args:
        source: The CSV file.
        directory: Where the SVG files go; made if it is not there.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: There is no such CSV file.
        ValueError: It is malformed, or holds nothing to draw.
    """
    rows = read(source)
    figures = {f"{routine}.svg": bars(latest(rows, routine, c.metric), c.axis) for routine, c in CHARTS.items()}
    figures["roofline.svg"] = roofline(latest(rows, "roofline"))
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    if not drawn:
        raise ValueError(f"{source}: wanted rows to draw, got none")
    directory.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        _save(figure, directory / name)
    return [directory / name for name in drawn]


def latest(rows: Sequence[Row], routine: str, metric: str | None = None) -> list[Row]:
    """Return the rows of a routine that the last run of each case measured.

    Only rows of one run took turns, so only those may stand side by side. Cases from another machine, or on another
    number of threads, than the routine's last row are left out.
    """
    mine = [row for row in rows if row.routine == routine and metric in (None, row.metric)]
    here = [row for row in mine if _machine(row) == _machine(mine[-1])]
    last_run = {_group(row): row.run for row in here}
    return [row for row in here if row.run == last_run[_group(row)]]


def bars(rows: Sequence[Row], axis: str) -> Figure | None:
    """Draw one panel a case and batch, one bar a contender, whiskers from the 20th to the 80th percentile."""
    groups = list(dict.fromkeys(_group(row) for row in rows))
    if not groups:
        return None
    heights = [sum(_group(row) == group for row in rows) for group in groups]
    figure = Figure(figsize=(8, 0.9 + 0.28 * sum(heights) + 0.45 * len(groups)), layout="constrained")
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, group in zip(panels, groups, strict=True):
        _bars_of_group(panel, [row for row in rows if _group(row) == group])
    panels[-1].set_xlabel(axis)
    figure.suptitle(_provenance(rows[-1]), fontsize=8, color="#555555")
    return figure


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Draw the rate of each part against its intensity, under the two rates that the machine was measured to have."""
    if not rows:
        return None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    values = {(_group(row), row.metric): row.value for row in rows}
    intensities = [row.value for row in rows if row.metric == "intensity"]
    gemm = max(row.value for row in rows if row.metric == "gemm rate")
    copy = max(row.value for row in rows if row.metric == "copy rate")
    line = [min(*intensities, gemm / copy) / 2, gemm / copy, 2 * max(*intensities, gemm / copy)]
    axes.loglog(line, [min(gemm, copy * intensity) for intensity in line], color="#333333")
    groups = list(dict.fromkeys(_group(row) for row in rows if row.metric == "intensity"))
    for case in dict.fromkeys(group[0] for group in groups):
        mine = [group for group in groups if group[0] == case]
        points = [(values[group, "intensity"], values[group, "rate"]) for group in mine]
        axes.plot(*zip(*points, strict=True), "o", label=case)
        for (_, part, batch, _), point in zip(mine, points, strict=True):
            axes.annotate(f"{part} x{batch}", point, fontsize=7, xytext=(5, -3), textcoords="offset points")
    axes.legend(fontsize=7, loc="lower left")
    axes.set_xlabel("FLOPs a byte of weights and activations")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(_provenance(rows[-1]), fontsize=8, color="#555555")
    return figure


def draw_accuracy(source: Path, target: Path) -> None:
    """Draw top-1 over the measured milliseconds of an image: a line a criterion, a panel an optimiser and head.

    Args:
        source: CSV file of ``python -m bench accuracy``, with times.
        target: SVG file.

    Raises:
        ValueError: No row has a time yet.
    """
    rows = [row for row in read_table(source) if row["ms"]]
    if not rows:
        raise ValueError(f"{source}: wanted rows with times; python -m bench accuracy {source.stem} --times adds them")
    optimisers = list(dict.fromkeys(row["optimiser"] for row in rows))
    figure = Figure(figsize=(9, 3.2 * len(optimisers) + 0.6), layout="constrained")
    panels = figure.subplots(len(optimisers), 2, squeeze=False, sharex=True)
    for line, optimiser in zip(panels, optimisers, strict=True):
        mine = [row for row in rows if row["optimiser"] == optimiser]
        for axes, column, head in zip(line, ("top1_kept", "top1_refitted"), ("kept", "fitted anew"), strict=True):
            _lines(axes, mine, column)
            axes.set_title(f"{optimiser}, head {head}", fontsize=9, loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("milliseconds an image on gohsp's kernels")
    for line in panels:
        line[0].set_ylabel("top-1 (%)")
    panels[0][1].legend(fontsize=7, loc="lower right")
    target.parent.mkdir(parents=True, exist_ok=True)
    _save(figure, target)


def _lines(axes: Any, rows: Sequence[dict[str, str]], column: str) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted((float(row["ms"]), 100 * float(row[column])) for row in rows if row["method"] == method)
        own = {"color": OWN_COLOUR, "lw": 2, "zorder": 3} if method == BASELINE else {"lw": 1}
        axes.plot(*zip(*points, strict=True), "o-", ms=4, label=method, **own)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _bars_of_group(axes: Any, rows: Sequence[Row]) -> None:
    rows = sorted(rows, key=lambda row: -row.value)
    names = [row.contender for row in rows]
    values = [row.value for row in rows]
    whiskers = [[row.value - row.p20 for row in rows], [row.p80 - row.value for row in rows]]
    colours = [OWN_COLOUR if name == BASELINE else OTHER_COLOUR for name in names]
    drawn = axes.barh(names, values, xerr=whiskers, color=colours, error_kw={"lw": 0.8, "ecolor": "#333333"})
    axes.bar_label(drawn, [f" {value:.0f}" if value >= 100 else f" {value:.3g}" for value in values], fontsize=7)
    axes.margins(x=0.12)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    row = rows[0]
    axes.set_title(f"{row.case} {row.part}, batch {row.batch}", fontsize=9, loc="left")


def _group(row: Row) -> tuple[str, str, int, int]:
    return row.case, row.part, row.batch, row.tokens


def _machine(row: Row) -> tuple[str, str, int]:
    return row.cpu, row.isa, row.threads


def _provenance(row: Row) -> str:
    return f"{row.cpu}, {row.isa}, {row.threads} threads, {row.dtype}, torch {row.torch}, commit {row.commit}"


def _save(figure: Figure, path: Path) -> None:
    """Write an SVG that is the same file for the same numbers; it appears whole or not at all."""
    with replacing(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "gohsp", "svg.fonttype": "none"}):
        figure.savefig(temporary, format="svg", metadata={"Date": None})
