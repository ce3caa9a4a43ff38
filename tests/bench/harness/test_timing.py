# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import io
from collections.abc import Callable
from itertools import groupby

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from bench.harness import timing
from bench.harness.timing import time_in_turns
from gohsp import timing as timer
from tests.clock import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (timing, timer):
        monkeypatch.setattr(module, "time", clock)
    return clock


def _recording(name: str, calls: list[str], clock: Clock, seconds: float = 0.0) -> Callable[[], None]:
    def function() -> None:
        calls.append(name)
        clock.go_on(seconds)

    return function


def test_every_timed_span_follows_an_untimed_one_of_the_same_function(clock: Clock) -> None:
    calls: list[str] = []
    functions = {name: _recording(name, calls, clock, timing.SHORTEST_SPAN) for name in "abc"}
    timings = time_in_turns(functions, 5, Console(quiet=True), "")
    turns = [(name, len(list(run))) for name, run in groupby(calls[6:])]  # six calls find out how long one takes
    assert sum(length for _, length in turns) == 3 * 5 * 2
    assert all(length % 2 == 0 for _, length in turns)
    assert all(len(found.seconds) == 5 for found in timings.values())


def test_short_functions_are_called_often_enough_to_be_timed_and_one_call_is_reported(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SPAN", 2.0**-9)
    calls: list[str] = []
    functions = {"short": _recording("short", calls, clock, 2.0**-12), "long": _recording("long", calls, clock, 0.75)}
    timings = time_in_turns(functions, 3, Console(quiet=True), "")
    assert calls.count("short") == 2 + 3 * 2 * 8  # the first two find out how long a call takes
    assert calls.count("long") == 2 + 3 * 2
    assert {name: found.seconds for name, found in timings.items()} == {"short": (2.0**-12,) * 3, "long": (0.75,) * 3}


def test_a_span_that_whole_calls_do_not_fill_is_longer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SHORTEST_SPAN", 1.0)
    calls: list[str] = []
    time_in_turns({"a": _recording("a", calls, clock, 0.75)}, 1, Console(quiet=True), "")
    assert len(calls) == 2 + 2 * 2


def test_the_progress_bar_goes_to_the_console_and_away_again(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    time_in_turns({"a": _recording("a", [], clock, 1.0)}, 2, console, "a title")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a title" in text and "100%" in text
    assert text.endswith("\x1b[1A\x1b[2K")  # up a line, erase it


@pytest.mark.parametrize(("functions", "rounds"), [({}, 1), ({"a": int}, 0)])
def test_nothing_to_time_is_refused(functions: dict[str, Callable[[], object]], rounds: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        time_in_turns(functions, rounds, Console(quiet=True), "")


def test_models_are_timed_against_the_dense_one_in_the_same_rounds(clock: Clock) -> None:
    class Slow(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self, x: Tensor) -> Tensor:
            clock.go_on(self.seconds)
            return x

    times = timing.time_against(Slow(0.5), {"half": Slow(0.25), 7: Slow(1.0)}, torch.zeros(1), rounds=3)
    assert times == {
        "half": {"ms": "250", "dense_ms": "500", "speedup": "2"},
        7: {"ms": "1000", "dense_ms": "500", "speedup": "0.5"},
    }
