# SPDX-License-Identifier: Apache-2.0
"""What benchmarks add to gohsp's timer: short functions repeated, a progress bar, and models beside a dense one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from gohsp.timing import Timing, interleave

SHORTEST_SPAN = 2e-3
"""Seconds that a timed span lasts at least: a function that is faster is called several times in it."""

TIMES = ("ms", "dense_ms", "speedup")
"""Columns that :func:`time_against` gives a study's table."""


def time_in_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, console: Console, title: str
) -> dict[str, Timing]:
    """Time functions side by side; see :func:`gohsp.timing.interleave`.

    An untimed span comes before each timed one: the call before belonged to another contender, whose weights are in the
    caches and whose idle threads may still spin for some milliseconds. A user who runs one model meets neither.

    Args:
        functions: What to time, by name. They return when their work is done.
        rounds: Timed spans of each function.
        console: Where the progress bar is shown.
        title: Title of the progress bar.

    Returns:
        Seconds of one call, by name; the rounds correspond.

    Raises:
        ValueError: There is nothing to time, or no round.
    """
    calls = {name: _calls_to_fill_a_span(function) for name, function in functions.items()}
    spans = {name: _repeat(function, calls[name]) for name, function in functions.items()}
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(title, total=rounds)
        timings = interleave(spans, rounds, warmup=0, settle=1, after_round=lambda: bar.advance(task))
    return {name: Timing(tuple(s / calls[name] for s in timing.seconds)) for name, timing in timings.items()}


def time_against(
    dense: nn.Module, models: Mapping[Any, nn.Module], image: Tensor, rounds: int
) -> dict[Any, dict[str, str]]:
    """Time models in turns with the dense one; returns the columns :data:`TIMES` of each.

    ``ms`` is the median for the image, ``dense_ms`` that of the dense model in the same rounds, and ``speedup`` the
    median over the rounds of their ratio.
    """
    runners = {name: _one_pass(model, image) for name, model in models.items()}
    times = interleave({**runners, "dense": _one_pass(dense, image)}, rounds=rounds)
    base = times.pop("dense")
    values = {name: (1e3 * own.median, 1e3 * base.median, base.ratio_to(own)) for name, own in times.items()}
    return {name: dict(zip(TIMES, (f"{v:.4g}" for v in row), strict=True)) for name, row in values.items()}


def _calls_to_fill_a_span(function: Callable[[], object]) -> int:
    function()
    start = time.perf_counter()
    function()
    return max(1, math.ceil(SHORTEST_SPAN / max(time.perf_counter() - start, 1e-7)))


def _repeat(function: Callable[[], object], calls: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(calls):
            function()

    return run


def _one_pass(model: nn.Module, image: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            model(image)

    return run
