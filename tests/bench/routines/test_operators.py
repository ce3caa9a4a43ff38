# SPDX-License-Identifier: Apache-2.0
"""The operators over shapes: all contenders agree, and the shapes include awkward ones."""

from __future__ import annotations

import pytest
import torch

import gohsp_kernels as gk
from bench.harness.compare import TOLERANCE, check
from bench.routines import operators
from bench.routines.operators import Attention, Linear

NATIVE = bool(gk.can_run("cpu"))


@pytest.mark.parametrize("case", operators.CASES, ids=lambda case: f"{case.part} {case.label} {case.batch}")
def test_kernels_agree_with_float64_on_every_shape(case: Linear | Attention) -> None:
    assert max(check(operators.contenders(case, NATIVE)).values()) < TOLERANCE


def test_kernel_shapes_include_awkward_ones() -> None:
    linear = [case for case in operators.CASES if isinstance(case, Linear)]
    attention = [case for case in operators.CASES if isinstance(case, Attention)]
    assert any(case.inputs < case.features for case in linear) and any(case.outputs < case.results for case in linear)
    assert any(case.tokens == 1 for case in linear) and any(case.outputs % 16 for case in linear)
    assert any(0 in case.qk_widths for case in attention) and any(case.num_queries == 1 for case in attention)
    assert len({(case.part, case.label, case.batch, case.tokens) for case in operators.CASES}) == len(operators.CASES)


def test_plain_linear_leaves_unwritten_columns_zero() -> None:
    case = Linear(1, 2, 8, 5, 9, 4)
    call = case.call()
    result = case.plain(call)
    written = torch.zeros(9, dtype=torch.bool).index_fill(0, call.operator.out_cols, True)
    assert result.shape == (1, 2, 9)
    assert bool((result[..., ~written] == 0).all()) and bool((result[..., written] != 0).all())
