# SPDX-License-Identifier: Apache-2.0
"""The one place that starts a kernel."""

from __future__ import annotations

from typing import Any

import torch


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


def dot_precision(dtype: torch.dtype) -> str:
    """How tensor cores multiply ``dtype``: float32 as tf32 where PyTorch is allowed to, else in full."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
