# SPDX-License-Identifier: Apache-2.0
"""The seconds that pruning takes, as rows of the results."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.cli import app
from bench.harness.results import read_table

from ..conftest import TINY


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a process cannot be pinned here")
def test_each_way_has_its_seconds_quiet_and_beside(tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    arguments = ["pruning", "--model", TINY, "--images", "4", "--rounds", "1"]
    done = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    rows = {(row["contender"], row["metric"]): row for row in read_table(out)}
    assert set(rows) == {(way, metric) for way in ("heads, hidden", "the default") for metric in ("quiet", "beside")}
    assert all(float(row["value"]) > 0 and row["unit"] == "s" and row["batch"] == "4" for row in rows.values())
