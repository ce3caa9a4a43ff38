# SPDX-License-Identifier: Apache-2.0
"""The sublayers of all contenders compute the same, and make a model."""

from __future__ import annotations

import pytest
import torch

import gohsp_kernels as gk
from bench.harness.cases import Workload
from bench.harness.compare import TOLERANCE, check
from bench.harness.environment import Settings
from bench.routines import sublayers

from ..conftest import printed

NATIVE = bool(gk.can_run("cpu"))


@pytest.mark.parametrize("part", sublayers.PARTS)
@pytest.mark.parametrize("kind", ["ragged_work", "uniform_work"])
def test_sublayers_of_all_contenders_agree(
    part: str, kind: str, settings: Settings, request: pytest.FixtureRequest
) -> None:
    work = request.getfixturevalue(kind)
    contenders = sublayers.contenders(work, part, sublayers.tokens(work, 2), settings)
    assert [contender.name for contender in contenders] == ["sliced", "gohsp-reference"] + ["gohsp"] * NATIVE
    assert max(check(contenders).values()) < TOLERANCE


def test_sublayers_of_all_blocks_make_a_model(ragged_work: Workload) -> None:
    """The two kinds, block by block, are what the blocks of the masked dense model are."""
    double = ragged_work.masked_in_double()
    x = sublayers.tokens(ragged_work, 2).double()
    steps = [sublayers.plain(block, part) for block in double.blocks for part in sublayers.PARTS]
    assert torch.equal(sublayers.chain(steps, x)(), double.blocks(x))


def test_sublayers_without_the_library_go_on_without_gohsp(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gk, "can_run", lambda backend: gk.Support(False, "was not built"))
    contenders = sublayers.contenders(ragged_work, "mlp", sublayers.tokens(ragged_work, 1), settings)
    assert [contender.name for contender in contenders] == ["sliced", "gohsp-reference"]
    assert "left out: gohsp: was not built" in printed(settings)
