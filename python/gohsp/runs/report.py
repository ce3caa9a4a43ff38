# SPDX-License-Identifier: Apache-2.0
"""Runs side by side: size, top-1 and measured milliseconds, as a table, as Markdown and as a picture."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table
from rich.text import Text
from torch import nn

from gohsp import serialization
from gohsp.files import read_json, replacing, write_text
from gohsp.recipe import read_recipe
from gohsp.runs.datasets import image_shape
from gohsp.runs.directory import MODELS, RunDirectory, evaluation_of, open_model
from gohsp.timing import interleave

TITLES = ("run", "what", "parameters", "MACs", "top-1", "images")


@dataclass(frozen=True)
class Row:
    """One run: what evaluate found, and the median milliseconds for one image where they were measured."""

    name: str
    what: str
    params: int
    macs: int
    top1: float
    images: int
    milliseconds: float | None = None


class Evaluation(BaseModel):
    """What evaluate found: which model, its size, and how it did; the names of :class:`Row`, and the loss."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # It is also the name of a folder of the run.
    what: Literal["model", "pruned", "compressed", "dense"]
    params: Annotated[int, Field(gt=0)]
    macs: Annotated[int, Field(gt=0)]
    top1: Annotated[float, Field(ge=0, le=1)]
    loss: float
    images: Annotated[int, Field(gt=0)]


def collect(directories: Sequence[Path], rounds: int, after_round: Callable[[], object] | None = None) -> list[Row]:
    """Return a row for each run.

    Args:
        directories: Of runs that were evaluated.
        rounds: Timed calls of each model on one image, all models in turns; 0 for no times.
        after_round: Called after each round.

    Raises:
        FileNotFoundError: A directory holds no evaluation.
        ValueError: A file is damaged.
    """
    found = []
    for directory in directories:
        path = RunDirectory(directory).evaluation
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory}: wanted a run that was evaluated (gohsp evaluate), but it has no {path.name}"
            )
        values = _read(path)
        _check_current(RunDirectory(directory), values.what)
        found.append(values)
    times = _times(directories, [values.what for values in found], rounds, after_round)
    return [
        Row(d.name or str(d), **v.model_dump(exclude={"loss"}), milliseconds=t)
        for d, v, t in zip(directories, found, times, strict=True)
    ]


def _read(path: Path) -> Evaluation:
    try:
        return Evaluation.model_validate(read_json(path))
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise ValueError(f"{path}: wanted what gohsp evaluate writes, but {told}") from error


def _check_current(run: RunDirectory, what: str) -> None:
    """Refuse an evaluation of a model that was replaced since."""
    record, now = run.made.of(run.evaluation), evaluation_of(run, what)
    if record != now and not (record is None and not any(now["models"])):
        raise ValueError(
            f"{run.evaluation}: is of another {what} than is there now; evaluate again "
            f"(gohsp evaluate --out {run.directory})"
        )


def _times(
    directories: Sequence[Path], kinds: Sequence[str], rounds: int, after_round: Callable[[], object] | None
) -> list[float | None]:
    if rounds == 0:
        return [None] * len(directories)
    pairs = zip(map(RunDirectory, directories), kinds, strict=True)
    runs = {str(i): _timed(_model(run, kind)) for i, (run, kind) in enumerate(pairs)}
    return [1e3 * timing.median for timing in interleave(runs, rounds, after_round=after_round).values()]


def _model(run: RunDirectory, kind: str) -> Any:
    folder = run.directory / kind
    if kind in MODELS and (folder / serialization.PLAN).is_file():
        return serialization.load(folder)
    return open_model(read_recipe(run.recipe).model)


def _timed(model: Any) -> Callable[[], object]:
    image = torch.zeros(1, *image_shape(model), device="cpu")
    model.eval()

    def call(model: nn.Module = model) -> object:
        with torch.inference_mode():
            return model(image)

    return call


def cells(rows: Sequence[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return titles and texts of a table; ratios are to the first row."""
    timed = all(row.milliseconds is not None for row in rows)
    first = rows[0]
    texts: list[tuple[str, ...]] = []
    for row in rows:
        line: tuple[str, ...] = (
            row.name,
            row.what,
            f"{row.params / 1e6:.2f} M ({row.params / first.params:.0%})",
            f"{row.macs / 1e9:.3f} G ({row.macs / first.macs:.0%})",
            f"{row.top1:.2%}",
            str(row.images),
        )
        if timed and row.milliseconds is not None and first.milliseconds is not None:
            line += (f"{row.milliseconds:.2f}", f"{row.milliseconds / first.milliseconds:.2f}")
        texts.append(line)
    return (*TITLES, "ms, batch 1", "to the first") if timed else TITLES, texts


def table(rows: Sequence[Row]) -> Table:
    """Return a table for the terminal."""
    titles, texts = cells(rows)
    result = Table(*titles)
    for line in texts:
        result.add_row(*map(Text, line))
    return result


def markdown(rows: Sequence[Row]) -> str:
    """Return the same as a Markdown table, names as they are."""
    titles, texts = cells(rows)
    lines = [titles, ("---",) * len(titles), *(tuple(map(_plain, line)) for line in texts)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _plain(text: str) -> str:
    """Return Markdown that shows a text as it is, in one cell."""
    return re.sub(r"([\\`*_\[\]<>&|#$~])", r"\\\1", " ".join(text.split()))


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Write :func:`markdown`."""
    write_text(path, markdown(rows))


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw top-1 over milliseconds (over MACs where nothing was timed) into an SVG or PNG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs matplotlib; install it: pip install matplotlib") from error
    timed = all(row.milliseconds is not None for row in rows)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        x = row.milliseconds if timed and row.milliseconds is not None else row.macs / 1e9
        axes.plot(x, 100 * row.top1, "o")
        axes.annotate(row.name, (x, 100 * row.top1), xytext=(5, 4), textcoords="offset points", parse_math=False)
    axes.set_xlabel("ms for one image" if timed else "GMACs")
    axes.set_ylabel("top-1, %")
    with replacing(path) as temporary:
        figure.savefig(temporary)
