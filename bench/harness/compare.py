# SPDX-License-Identifier: Apache-2.0
"""The core of every routine: refuse whoever computes something else, time the others in turns, store, print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from rich import box
from rich.table import Table
from torch import Tensor

from bench.harness import environment, results
from bench.harness.environment import Settings
from bench.harness.results import Row
from bench.harness.timing import time_in_turns
from gohsp.timing import Timing

BASELINE = "gohsp"
"""Ratios say how many times as long as this contender the others take."""

TOLERANCE = 1e-5
"""Largest relative norm of the difference to the float64 result that is still the same result in fp32."""


@dataclass(frozen=True)
class ReadyContender:
    """A contender, ready to run one input.

    Attributes:
        name: Its name, as printed and stored.
        run: Computes the result; returns when it is there.
        expected: What the result has to be, float64.
        version: Version of the library that computes it.
        setup_seconds: What compilation or export took; not part of any timing.
        dtype: Type of weights and activations, as stored.
        tolerance: Largest relative error of a result that may be timed.
    """

    name: str
    run: Callable[[], Tensor]
    expected: Tensor
    version: str
    setup_seconds: float = 0.0
    dtype: str = "float32"
    tolerance: float = TOLERANCE


@dataclass(frozen=True)
class Place:
    """Where in the results a comparison stands; see :class:`bench.harness.results.Row`."""

    routine: str
    case: str
    part: str
    batch: int
    tokens: int


@dataclass(frozen=True)
class Comparison:
    """Outcome of one comparison.

    Attributes:
        timings: Seconds, by contender, of those that agree.
        errors: Relative norm of the difference to float64, by contender.
        refused: Names of those that compute something else.
    """

    timings: Mapping[str, Timing]
    errors: Mapping[str, float]
    refused: Sequence[str]


def relative_error(result: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``, in float64; infinite for a wrong shape or NaN."""
    if result.shape != expected.shape:
        return float("inf")
    error = torch.linalg.vector_norm(result.to(torch.float64) - expected)
    relative = float(error / torch.linalg.vector_norm(expected).clamp_min(1e-300))
    return relative if np.isfinite(relative) else float("inf")


def check(contenders: Sequence[ReadyContender]) -> dict[str, float]:
    """Return the relative error of each contender."""
    return {contender.name: relative_error(contender.run(), contender.expected) for contender in contenders}


def agreeing(contenders: Sequence[ReadyContender], errors: Mapping[str, float]) -> list[ReadyContender]:
    """Return the contenders that may be timed."""
    return [contender for contender in contenders if errors[contender.name] <= contender.tolerance]


def compare(place: Place, contenders: Sequence[ReadyContender], settings: Settings, title: str = "") -> Comparison:
    """Check all contenders, time those that agree, append the numbers to the CSV file and print a table.

    Args:
        place: Where the numbers belong.
        contenders: Those that are compared.
        settings: Rounds, threads, file and console.
        title: Title of the table.

    Raises:
        ValueError: No contender computes the right result.
    """
    errors = check(contenders)
    allowed = agreeing(contenders, errors)
    if not allowed:
        raise ValueError(f"{place}: no contender agrees with float64 within its tolerance: {errors}")
    heading = title or f"{place.case} {place.part}, batch {place.batch}"
    timings = time_in_turns({e.name: e.run for e in allowed}, settings.rounds, settings.console, heading)
    refused = [contender.name for contender in contenders if contender not in allowed]
    result = Comparison(timings, errors, refused)
    results.append(settings.out, _rows(place, allowed, result, settings))
    settings.console.print(_table(heading, contenders, result))
    return result


def row(
    place: Place, contender: str, metric: str, values: Sequence[float], unit: str, settings: Settings, **changes: Any
) -> Row:
    """Return the row of one metric: median and percentiles of ``values``, with all that the environment tells.

    Args:
        place: Where the number belongs.
        contender: Name of the contender that it belongs to.
        metric: What it is.
        values: One a round, in ``unit``.
        unit: Unit of the values.
        settings: Settings of the run.
        changes: Other values of columns, such as ``version``.
    """
    p20, median, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
    columns: dict[str, Any] = {
        "routine": place.routine,
        "case": place.case,
        "part": place.part,
        "batch": place.batch,
        "tokens": place.tokens,
        "contender": contender,
        "metric": metric,
        "dtype": "float32",
        "threads": settings.threads,
        "cpu": environment.cpu_name(),
        "isa": environment.instruction_set(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "version": torch.__version__,
        "commit": environment.commit(),
        "value": median,
        "p20": p20,
        "p80": p80,
        "unit": unit,
        "rounds": len(values),
        "run": settings.run,
    }
    return Row(**{**columns, **changes})


def ratios(timing: Timing, baseline: Timing) -> list[float]:
    """Round by round, how many times as long as the baseline a contender took."""
    return [float(ratio) for ratio in np.divide(timing.seconds, baseline.seconds)]


def milliseconds(timing: Timing) -> list[float]:
    return [1e3 * seconds for seconds in timing.seconds]


def _rows(place: Place, contenders: Sequence[ReadyContender], result: Comparison, settings: Settings) -> list[Row]:
    rows = []
    baseline = result.timings.get(BASELINE)
    for contender in contenders:
        timing, own = result.timings[contender.name], {"version": contender.version, "dtype": contender.dtype}
        rows.append(row(place, contender.name, "time", milliseconds(timing), "ms", settings, **own))
        rows.append(row(place, contender.name, "error", [result.errors[contender.name]], "x", settings, **own))
        if baseline is not None:
            rows.append(row(place, contender.name, "ratio", ratios(timing, baseline), "x", settings, **own))
    return rows


def numbers_table(title: str, first: str, columns: Sequence[str]) -> Table:
    """Return an empty table of a column of names and of columns of numbers, narrow enough for 80 characters."""
    table = Table(title=title, box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _table(title: str, contenders: Sequence[ReadyContender], result: Comparison) -> Table:
    table = numbers_table(title, "contender", ("ms", "p20", "p80", f"/{BASELINE}", "error", "set-up s"))
    fastest = min(result.timings, key=lambda name: result.timings[name].median)
    for contender in contenders:
        style = "bold green" if contender.name == fastest else "red" if contender.name in result.refused else ""
        measured = _measured(contender.name, result)
        error, set_up = f"{result.errors[contender.name]:.1e}", f"{contender.setup_seconds:.1f}"
        table.add_row(contender.name, *measured, error, set_up, style=style)
    return table


def _measured(name: str, result: Comparison) -> tuple[str, str, str, str]:
    timing, baseline = result.timings.get(name), result.timings.get(BASELINE)
    if timing is None:
        return "wrong", "", "", ""
    ratio = "" if baseline is None else f"{np.median(ratios(timing, baseline)):.2f}"
    return f"{1e3 * timing.median:.4g}", f"{1e3 * timing.p20:.4g}", f"{1e3 * timing.p80:.4g}", ratio
