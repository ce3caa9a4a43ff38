# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console
from torch import Tensor

from bench.harness import compare, results
from bench.harness.compare import TOLERANCE, Place, ReadyContender, relative_error
from bench.harness.environment import Settings
from gohsp.timing import Timing

from ..conftest import printed

EXPECTED = torch.linspace(1, 2, 12, dtype=torch.float64).reshape(3, 4)
PLACE = Place("end-to-end", "vit/4x960", "model", 3, 5)


def _ready(name: str, result: Tensor, calls: list[str] | None = None) -> ReadyContender:
    def run() -> Tensor:
        if calls is not None:
            calls.append(name)
        return result

    return ReadyContender(name, run, EXPECTED, "1.2.3", 4.5)


def test_relative_error_is_the_norm_of_the_difference_over_the_norm() -> None:
    assert relative_error(EXPECTED * 1.01, EXPECTED) == pytest.approx(0.01)
    assert relative_error(EXPECTED.float(), EXPECTED) < 1e-7
    assert relative_error(EXPECTED, EXPECTED) == 0


@pytest.mark.parametrize("wrong", [EXPECTED[:2], EXPECTED * torch.nan, EXPECTED / 0, EXPECTED[None]])
def test_wrong_shapes_and_non_finite_results_are_infinitely_wrong(wrong: Tensor) -> None:
    assert relative_error(wrong, EXPECTED) == float("inf")


@pytest.mark.parametrize("wrong", [EXPECTED.float() * (1 + 2 * TOLERANCE), EXPECTED.flip(0), EXPECTED * torch.nan])
def test_a_wrong_contender_is_refused_and_never_timed(wrong: Tensor, settings: Settings) -> None:
    calls: list[str] = []
    contenders = [_ready("gohsp", EXPECTED.float(), calls), _ready("cheat", wrong, calls)]
    result = compare.compare(PLACE, contenders, settings)
    assert result.refused == ["cheat"]
    assert list(result.timings) == ["gohsp"]
    assert calls.count("cheat") == 1  # the check
    assert {row.contender for row in results.read(settings.out)} == {"gohsp"}
    line = next(line for line in printed(settings).splitlines() if "cheat" in line)
    assert "wrong" in line


def test_a_contender_just_within_the_tolerance_is_timed(settings: Settings) -> None:
    contenders = [_ready("gohsp", EXPECTED), _ready("close", EXPECTED * (1 + 0.9 * TOLERANCE))]
    assert list(compare.compare(PLACE, contenders, settings).timings) == ["gohsp", "close"]


def test_where_nobody_is_right_nothing_is_timed(settings: Settings) -> None:
    with pytest.raises(ValueError, match="no contender agrees with float64"):
        compare.compare(PLACE, [_ready("cheat", -EXPECTED)], settings)
    assert not settings.out.exists()


def test_rows_hold_time_error_and_ratio_with_all_that_identifies_them(settings: Settings) -> None:
    compare.compare(PLACE, [_ready("gohsp", EXPECTED), _ready("sliced", EXPECTED)], settings)
    rows = {(row.contender, row.metric): row for row in results.read(settings.out)}
    assert {*rows} == {(name, metric) for name in ("gohsp", "sliced") for metric in ("time", "error", "ratio")}
    row = rows["sliced", "time"]
    assert (row.routine, row.case, row.part, row.batch, row.tokens) == ("end-to-end", "vit/4x960", "model", 3, 5)
    assert (row.dtype, row.threads, row.rounds, row.version) == ("float32", 1, 2, "1.2.3")
    assert row.torch == torch.__version__
    assert row.p20 <= row.value <= row.p80
    assert rows["gohsp", "ratio"].value == 1.0


def test_without_the_baseline_there_is_no_ratio(settings: Settings) -> None:
    compare.compare(PLACE, [_ready("sliced", EXPECTED)], settings)
    assert {row.metric for row in results.read(settings.out)} == {"time", "error"}


@pytest.mark.parametrize(
    ("first", "names"),
    [
        ("compile-freezing", ("ms", "p20", "p80", "/gohsp", "error", "set-up s")),
        ("attention", ("GFLOP", "MB", "FLOP/B", "bound by", "ms", "GFLOP/s", "of limit", "of GEMM")),
    ],
)
def test_tables_fit_80_characters_whole(first: str, names: tuple[str, ...]) -> None:
    console = Console(file=io.StringIO(), width=80)
    table = compare.numbers_table("a title", "name", names)
    table.add_row(first, *("123.4",) * len(names))
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in text for name in (*names, first))
    assert text.count("123.4") == len(names)


def test_the_fastest_is_bold_and_the_refused_red(settings: Settings) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    contenders = [_ready("gohsp", EXPECTED), _ready("cheat", -EXPECTED)]
    compare.compare(PLACE, contenders, dataclasses.replace(settings, console=console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("\x1b[1;32m" in line and "gohsp" in line for line in lines)
    assert any("\x1b[31m" in line and "cheat" in line for line in lines)


def test_ratios_pair_the_rounds() -> None:
    timing, baseline = Timing((2.0, 30.0, 8.0)), Timing((1.0, 10.0, 2.0))
    assert compare.ratios(timing, baseline) == [2.0, 3.0, 4.0]


def test_row_takes_median_and_percentiles(settings: Settings) -> None:
    row = compare.row(PLACE, "gohsp", "rate", list(range(11)), "GFLOP/s", settings, version="9")
    assert (row.p20, row.value, row.p80, row.rounds, row.unit, row.version) == (2.0, 5.0, 8.0, 11, "GFLOP/s", "9")


def test_the_table_shows_set_up_seconds_and_the_title(settings: Settings) -> None:
    compare.compare(PLACE, [_ready("gohsp", EXPECTED)], settings, "a title of its own")
    assert "a title of its own" in printed(settings)
    assert "4.5" in printed(settings)
