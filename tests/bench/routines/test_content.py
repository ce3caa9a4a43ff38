# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
from pathlib import Path

import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.harness import results
from bench.harness.cases import Workload
from bench.harness.compare import TOLERANCE, check
from bench.routines import content

from ..conftest import TINY


def test_all_ways_compute_the_same_and_one_does_not_look(ragged_work: Workload) -> None:
    work = copy.deepcopy(ragged_work)
    contenders = content.contenders(work, work.images(2))
    assert max(check(contenders).values()) < TOLERANCE
    before = {contender.name: contender.run() for contender in contenders}
    for parameter in work.compressed.parameters():
        parameter.data.mul_(1.1)
    after = {contender.name: contender.run() for contender in reversed(contenders)}
    same = {name: torch.equal(before[name], after[name]) for name in before}
    # Where weights are not read, only what is no part of the blocks can have changed.
    assert same == {"gohsp": True, content.COMPRESSED: False, content.UNREAD: False}
    assert not torch.allclose(after[content.UNREAD], after[content.COMPRESSED], rtol=1e-3)


def test_the_command_writes_times_and_the_cost(tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    arguments = ["content", "--model", TINY, "--preset", "2x300", "--batch", "2", "--threads", "1", "--rounds", "2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert "reading the weights" in result.output
    costs = [row for row in results.read(out) if row.metric == "cost-of-reading"]
    assert [row.contender for row in costs] == [content.COMPRESSED]
