# SPDX-License-Identifier: Apache-2.0
"""``torch.autocast`` and calls that run on kernels, which PyTorch's own rules do not reach into.

The reference is made of PyTorch's operations, and autocast gives each of them its dtype. Kernels take ``x`` in the
dtype of autocast instead. Parameters stay as they are: a backend packs them in the dtype of ``x``, once, and a gradient
arrives at them in their own dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CAST = (torch.float32, torch.float16, torch.bfloat16)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast multiplies ``x``; None where it is off, and for float64, which it leaves alone."""
    kind = x.device.type
    if kind not in ("cpu", "cuda") or x.dtype not in _CAST or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def run_in(
    dtype: torch.dtype | None, function: Callable[..., Tensor], x: Tensor, *rest: Any, residual: bool = False
) -> Tensor:
    """``function(x, *rest)``, or where ``dtype`` is given, with ``x`` in that dtype and autocast off inside.

    Args:
        dtype: what :func:`autocast_dtype` gave.
        function: called with tensors.
        x: float.
        rest: other arguments, left as they are.
        residual: whether the result is ``x`` and something added to it. It then has the dtype that PyTorch gives to
            such a sum, which for a float32 ``x`` is float32.
    """
    if dtype is None:
        return function(x, *rest)
    with torch.autocast(x.device.type, enabled=False):  # packing and backward passes have float32 products of their own
        result = function(x.to(dtype), *rest)
    return result.to(torch.promote_types(x.dtype, dtype)) if residual else result
