# SPDX-License-Identifier: Apache-2.0
"""The overhead of calls, on a clock of the test's own."""

from __future__ import annotations

import pytest

from bench.gpu import overhead
from tests.clock import Clock


def test_the_median_is_of_the_calls_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(overhead, "time", clock)
    seconds = iter([1.0] * overhead.WARM_UP + [2e-6] * 90 + [3e-6] * 110)
    assert overhead.median_us(lambda: clock.go_on(next(seconds))) == pytest.approx(3.0)


def test_both_ways_are_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gohsp_kernels._checks_cuda", reason="the checks module is not built")
    monkeypatch.setattr(overhead, "CALLS", 1)
    monkeypatch.setattr(overhead, "WARM_UP", 0)
    assert overhead.main() == 0
    chain, singles = capsys.readouterr().out.splitlines()
    assert chain.startswith("one call of a chain of 24 ") and singles.startswith("24 calls of one sublayer ")


def test_without_the_checks_module_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"{name} was not built")

    monkeypatch.setattr(overhead.importlib, "import_module", missing)
    assert overhead.main() == 1
    assert capsys.readouterr().out == "no figures: gohsp_kernels._checks_cuda was not built\n"
