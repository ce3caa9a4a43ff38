# SPDX-License-Identifier: Apache-2.0
"""Steps of training that are timed compute what they should and change no weight."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bench.cli import app
from bench.harness import results
from bench.harness.cases import Workload
from bench.harness.compare import TOLERANCE, check
from bench.routines import training_step

from ..conftest import TINY

NAMES = ["dense", "masked dense", "sliced", "gohsp"]


@pytest.mark.parametrize("kind", ["ragged_work", "uniform_work"])
def test_steps_agree_with_float64_and_again_after_a_step(kind: str, request: pytest.FixtureRequest) -> None:
    work = request.getfixturevalue(kind)
    contenders = training_step.contenders(work, work.images(2))
    assert [contender.name for contender in contenders] == NAMES
    for _ in range(2):
        assert max(check(contenders).values()) < TOLERANCE


def test_a_step_reaches_every_parameter(uniform_work: Workload) -> None:
    model = copy.deepcopy(uniform_work.compressed)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    training_step.step(model, uniform_work.images(2))()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_the_masked_model_stays_masked(ragged_work: Workload) -> None:
    images = ragged_work.images(2)
    step = training_step.masked_step(ragged_work, images)
    torch.testing.assert_close(step(), step(), rtol=0, atol=0)


def test_the_command_writes_times_and_ratios(tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    arguments = ["training", "--model", TINY, "--preset", "2x300", "--batch", "2", "--threads", "1", "--rounds", "2"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    rows = results.read(out)
    assert {row.contender for row in rows if row.metric == "ratio"} == set(NAMES)
    assert {row.routine for row in rows} == {"training"}
