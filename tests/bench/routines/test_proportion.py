# SPDX-License-Identifier: Apache-2.0
"""The straight line that times are held against."""

from __future__ import annotations

import pytest

import gohsp_kernels as gk
from bench.harness import results
from bench.harness.environment import Settings
from bench.routines import proportion
from gohsp.timing import Timing

from ..conftest import TINY, printed

NATIVE = bool(gk.can_run("cpu"))


@pytest.mark.skipif(not NATIVE, reason="the CPU backend is not built")
def test_proportion_times_every_cut_against_the_line(settings: Settings) -> None:
    assert proportion.run(TINY, ["2x300", "ragged:0.5"], [2], settings) == []
    rows = results.read(settings.out)
    assert [row.case for row in rows if row.metric == "off-line"] == [
        f"{TINY}/{p}" for p in ("dense", "2x300", "ragged:0.5")
    ]
    assert rows[1].value == 0.0  # the whole model is where the line starts
    assert "off by" in printed(settings)


def test_a_model_on_the_line_is_off_by_nothing() -> None:
    """A product of 2048 cubed in 2 s: half of its multiply-accumulates less are a second less."""
    timings = {"dense": Timing((5.0, 6.0)), "gemm": Timing((2.0, 4.0)), "cut": Timing((4.0, 6.0))}
    assert proportion.deviations(timings, "cut", 2048**3 / 2) == [0.0, 0.5]
