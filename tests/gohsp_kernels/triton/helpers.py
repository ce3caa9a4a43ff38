# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Triton kernels share: judging a result."""

from __future__ import annotations

from torch import Tensor

from gohsp_kernels.testing import error


def assert_close(result: Tensor, truth: Tensor, limit: float) -> None:
    """The error is below ``limit`` times the norm of the truth, or of ones where the truth is smaller."""
    found = error(result, truth, floor=1.0)
    assert found <= limit, f"error {found:.2e}, limit {limit:.2e}"
