# SPDX-License-Identifier: Apache-2.0
"""Whole models under torch.autocast: compressed ones beside the dense timm model, frozen ones, packed weights after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask


def test_a_compressed_model_follows_autocast(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    model, x = make_model().float(), images().float()
    compact = gohsp.compress(model, ModelMask.full(model))
    with torch.no_grad():
        before = compact(x)
        with torch.autocast("cpu", torch.bfloat16):
            expected, got = model(x), compact(x)
        assert got.dtype == expected.dtype == torch.bfloat16
        assert relative_error(got, before) < 3e-2
        assert relative_error(got, expected) < 2e-2
        assert torch.equal(compact(x), before)  # what is packed for float32 is still that


@pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)
def test_a_frozen_model_keeps_the_precision_that_it_was_made_for(
    make_model: Callable[..., Any], images: Callable[..., Tensor]
) -> None:
    model, x = make_model().float(), images().float()
    frozen = gohsp.freeze(gohsp.compress(model, ModelMask.full(model)))
    with torch.no_grad():
        expected = frozen(x)
        with torch.autocast("cpu", torch.bfloat16):
            got = frozen(x)
        assert torch.equal(frozen(x), expected)
    assert got.dtype == torch.float32
    assert (got - expected).norm() < 2e-2 * expected.norm()
