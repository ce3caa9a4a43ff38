# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: what is called how often, in which order, and what the figures mean."""

import pytest

from gohsp import timing
from gohsp.timing import Timing, interleave
from tests.clock import Clock


def test_every_function_runs_once_a_round_after_its_warmup():
    calls = []
    interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=5, warmup=2, settle=0)
    assert calls[:6] == ["a", "a", "b", "b", "c", "c"]
    rounds = [calls[i : i + 3] for i in range(6, len(calls), 3)]
    assert len(rounds) == 5
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)


def test_order_changes_between_rounds_and_repeats_with_the_seed():
    def order(seed):
        calls = []
        interleave(
            {name: lambda name=name: calls.append(name) for name in "abcd"}, rounds=20, warmup=0, settle=0, seed=seed
        )
        return calls

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert len({tuple(order(1)[i : i + 4]) for i in range(0, 80, 4)}) > 1


def test_functions_settle_before_they_are_timed():
    calls = []
    interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=3, warmup=0, settle=2)
    turns = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(turns) == 6 and all(len(set(turn)) == 1 for turn in turns)


def test_seconds_are_those_of_the_timed_calls_alone(monkeypatch):
    """Neither warm-up nor settling counts, nor what shows the progress, nor the other functions."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    # The third and the fifth call are timed: before them stand a warm-up, and a settling call each.
    takes = {"slow": iter([64.0, 32.0, 3.0, 16.0, 5.0]), "fast": iter([256.0, 512.0, 1.0, 1024.0, 2.0])}
    functions = {name: lambda name=name: clock.go_on(next(takes[name])) for name in takes}
    measured = interleave(functions, rounds=2, warmup=1, settle=1, after_round=lambda: clock.go_on(128.0))
    assert list(measured.items()) == [("slow", Timing((3.0, 5.0))), ("fast", Timing((1.0, 2.0)))]
    assert all(next(calls, None) is None for calls in takes.values())


def test_percentiles_and_ratio_are_taken_round_by_round():
    one, other = Timing((1.0, 2.0, 3.0, 4.0, 100.0)), Timing((1.0, 1.0, 1.0, 2.0, 50.0))
    assert one.median == 3.0
    assert one.p20 == pytest.approx(1.8)
    assert one.p80 == pytest.approx(23.2)
    assert one.ratio_to(other) == 2.0  # of 1, 2, 3, 2, 2; the medians alone would give 3


def test_progress_is_told_after_each_round():
    told = []
    interleave({"a": lambda: None}, rounds=4, after_round=lambda: told.append(1))
    assert len(told) == 4


@pytest.mark.parametrize(("functions", "rounds", "message"), [({}, 1, "functions"), ({"a": int}, 0, "rounds")])
def test_nothing_to_time_is_refused(functions, rounds, message):
    with pytest.raises(ValueError, match=message):
        interleave(functions, rounds=rounds)
