# SPDX-License-Identifier: Apache-2.0
"""What the tests of the CUDA kernels share: running a call in emulation and judging its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gohsp_kernels import cuda
from tests.kernels.cases import Call
from tests.triton.helpers import assert_close

# Loading it registers the emulated kernels for tensors on the CPU.
checks: Any = pytest.importorskip("gohsp_kernels._checks_cuda", reason="the checks module is not built")

TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""For `assert_close`. Sums have a few hundred terms; float16 rounds at 5e-4, bfloat16 at 4e-3."""
DTYPES = list(TOLERANCE)


def run(call: Call) -> Tensor:
    """The call on the CUDA backend in emulation, past the choice of the backend, which wants a GPU."""
    with torch.no_grad():
        return getattr(cuda, call.operator)(*call.described())


def check(call: Call, dtype: torch.dtype = torch.float16, tolerance: float | None = None) -> None:
    """``call`` in ``dtype`` against the reference in float64 on the same rounded numbers."""
    rounded = call.to(dtype)
    result = run(rounded)
    truth = rounded.to(torch.float64).run("reference")
    assert result.dtype == dtype and result.is_contiguous()
    assert_close(result, truth, tolerance or TOLERANCE[dtype])
