# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Tensors of a caller as the kernels read them: the numbers of a row, or of a vector, side by side in memory.

Whatever comes from outside (activations, parameters, gradients of results) passes one of these on its way to a launch.
None of them copies what already lies right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """``x`` [..., features] as [rows, features] whose features lie side by side; rows may be apart, or the same."""
    # Without -1, which no shape with zero features would determine.
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def as_tokens(x: Tensor) -> Tensor:
    """``x`` [batch, tokens, channels], contiguous, with the strides that say so.

    PyTorch calls a tensor contiguous whatever the stride of a dimension of size 1, but the kernels go from image to
    image by the stride of a token, also where each image has one token.
    """
    return as_rows(x.contiguous()).view(x.shape)


def as_vector(x: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """``x`` [n] as the kernels read biases, scales and norms: detached, in ``dtype`` or its own; None stays None."""
    return None if x is None else x.detach().to(dtype or x.dtype).contiguous()


@triton.jit
def load_again(pointers, mask):
    """What a product of the same step takes as its operand, loaded a second time for whatever else wants to read it.

    Triton (3.6 to 3.8 at least, issue 6691) gives an operand of a pipelined product on Hopper one slot of shared memory
    too few if anything but products uses it: the copy for a later step overwrites it while the tensor core still reads.
    An operand with no other use gets the slot. The other eviction policy keeps the compiler from making one load of
    the two; tests/gohsp_kernels/triton/test_aot.py counts the slots.
    """
    return tl.load(pointers, mask, 0.0, eviction_policy="evict_last")
