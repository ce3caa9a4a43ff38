# SPDX-License-Identifier: Apache-2.0
"""Why the interpreter is not trusted with bfloat16: it multiplies the bits of one as if they were integers.

When this test fails, Triton has been repaired: lift the refusal of gohsp_kernels/triton and test bfloat16 like float16.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.interpreter


@triton.jit
def multiply_kernel(a, b, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def product(dtype: torch.dtype) -> torch.Tensor:
    a, b, out = torch.eye(16, dtype=dtype), torch.full((16, 16), 0.5, dtype=dtype), torch.empty(16, 16)
    multiply_kernel[(1,)](a, b, out, N=16)
    return out


def test_float16_is_multiplied_right() -> None:
    assert torch.equal(product(torch.float16), torch.full((16, 16), 0.5))


def test_bfloat16_is_multiplied_wrong() -> None:
    assert not torch.allclose(product(torch.bfloat16), torch.full((16, 16), 0.5), rtol=0.1)
