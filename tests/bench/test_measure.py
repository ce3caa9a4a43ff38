# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
import time
from collections.abc import Callable
from itertools import groupby

import pytest
from rich.console import Console

from bench import measure
from bench.measure import time_in_turns


def _recording(name: str, calls: list[str], seconds: float = 0.0) -> Callable[[], None]:
    def function() -> None:
        calls.append(name)
        time.sleep(seconds)

    return function


def test_every_timed_span_follows_an_untimed_one_of_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SHORTEST_SPAN", 0.0)
    calls: list[str] = []
    functions = {name: _recording(name, calls) for name in "abc"}
    timings = time_in_turns(functions, 5, Console(quiet=True), "")
    turns = [(name, len(list(run))) for name, run in groupby(calls[6:])]  # six calls find out how long one takes
    assert sum(length for _, length in turns) == 3 * 5 * 2
    assert all(length % 2 == 0 for _, length in turns)
    assert all(len(timing.seconds) == 5 for timing in timings.values())


def test_short_functions_are_called_often_enough_to_be_timed_and_one_call_is_reported() -> None:
    calls: list[str] = []
    timing = time_in_turns({"short": _recording("short", calls, 1e-4)}, 3, Console(quiet=True), "")["short"]
    assert len(calls) > 3 * 2 * 3
    assert 1e-4 <= timing.median < measure.SHORTEST_SPAN


def test_a_slower_function_takes_longer() -> None:
    slow, fast = _recording("slow", [], 0.02), _recording("fast", [], 0.004)
    timings = time_in_turns({"slow": slow, "fast": fast}, 3, Console(quiet=True), "")
    assert list(timings) == ["slow", "fast"]
    assert timings["slow"].ratio_to(timings["fast"]) > 1


def test_the_progress_bar_goes_to_the_console_and_away_again() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    time_in_turns({"a": lambda: None}, 2, console, "a title")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a title" in text and "100%" in text
    assert text.endswith("\x1b[1A\x1b[2K")  # up a line, erase it


@pytest.mark.parametrize(("functions", "rounds"), [({}, 1), ({"a": int}, 0)])
def test_nothing_to_time_is_refused(functions: dict[str, Callable[[], object]], rounds: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        time_in_turns(functions, rounds, Console(quiet=True), "")
