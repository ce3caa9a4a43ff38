# SPDX-License-Identifier: Apache-2.0
"""The one place that starts a kernel."""

from __future__ import annotations

from typing import Any

import torch

from .config import Target


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **meta: Any) -> None:
    """Start ``programs`` programs of ``kernel`` on the current stream of ``device``; none is no launch at all.

    A grid of one dimension has no limit that a tensor can reach; the others end at 65535.
    """
    if programs == 0:
        return
    if device.type == "cpu":
        kernel[(programs,)](*arguments, **meta)
        return
    with torch.cuda.device(device):
        kernel[(programs,)](*arguments, **meta)


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How ``dtype`` is multiplied on ``device``: what Triton calls the input precision of a product.

    float32 is rounded to tf32 where PyTorch is allowed to. Elsewhere NVIDIA's tensor cores multiply it as three
    products of tf32: each operand is the sum of its rounding and the rounding of the rest, and of the four products the
    one of both rests is left out. docs/triton.md says how exact that is. "ieee" is Triton's name for a product without
    tensor cores in float32, for AMD's GPUs, and means nothing in 16 bits.
    """
    if dtype != torch.float32:
        return "ieee"
    if torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "tf32x3" if Target.of(device).vendor == "cuda" else "ieee"
