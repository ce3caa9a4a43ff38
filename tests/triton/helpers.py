# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Triton kernels share: running a call in the interpreter and judging its result."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.kernels.cases import Call

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3}
"""For `assert_close`. Sums have a few hundred terms; float16 rounds at 5e-4."""


def assert_close(result: Tensor, truth: Tensor, tolerance: float) -> None:
    """The norm of the error is below ``tolerance`` times that of the truth, or of ones where the truth is smaller.

    The terms of a result are near 1, and so is the rounding of each, however much they cancel.
    """
    assert result.shape == truth.shape
    assert torch.isfinite(result).all()
    error = (result.double() - truth.double()).norm()
    limit = tolerance * max(float(truth.double().norm()), truth.numel() ** 0.5)
    assert error <= limit, f"error {error:.2e}, limit {limit:.2e}"


def run(call: Call) -> Tensor:
    return call.run("triton")


def check(call: Call, dtype: torch.dtype = torch.float32, tolerance: float | None = None) -> None:
    """``call`` in ``dtype`` against the reference in float64 on the same rounded numbers."""
    rounded = call.to(dtype)
    result = run(rounded)
    truth = rounded.to(torch.float64).run("reference")
    assert result.dtype == dtype and result.is_contiguous()
    assert_close(result, truth, tolerance or TOLERANCE[dtype])
