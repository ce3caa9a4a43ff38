# SPDX-License-Identifier: Apache-2.0
"""What looks into a call, or rewrites it, operation by operation, and so wants PyTorch's own and no kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import _FlopCounterMode


def is_rewritten() -> bool:
    """Whether something makes another program of a call, and knows PyTorch's own operations alone.

    These are ``torch.jit.trace`` and ONNX export, which write them down for other runtimes, and ``torch.func.vmap`` and
    forward-mode AD, which need a rule for each.
    """
    if torch.compiler.is_compiling():  # whose graphs have operators of ours, but for ONNX
        return torch.onnx.is_in_onnx_export()
    level = forward_ad._current_level  # a tangent may be on any tensor then, whatever requires_grad says
    return level >= 0 or torch.jit.is_tracing() or torch._C._functorch.maybe_current_level() is not None


@contextmanager
def unrecorded() -> Iterator[None]:
    """Keep what the block does out of the graph that torch.jit.trace is writing."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def is_counted() -> bool:
    """Whether torch's FlopCounterMode looks at each operation."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return False
    return any(isinstance(mode, _FlopCounterMode) for mode in _get_current_dispatch_mode_stack())
