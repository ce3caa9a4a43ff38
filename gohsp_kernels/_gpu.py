# SPDX-License-Identifier: Apache-2.0
"""What the backends for GPUs have in common: which numbers, heads and devices they take."""

from __future__ import annotations

import torch

from .registry import Request

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)
WIDEST_HEAD = 128

ON_CPU = "on the CPU it is for tests, which name it"
"""Why "auto" takes none of them for tensors on the CPU."""


def missing_numbers(request: Request) -> str:
    """Why the kernels cannot take such activations and heads, wherever they are; empty where they can."""
    if request.dtype not in DTYPES:
        return f"runs in float32, float16 and bfloat16; got {request.dtype}"
    if request.widest_head > WIDEST_HEAD:
        return f"takes heads of at most {WIDEST_HEAD} channels; got {request.widest_head}"
    return ""


def missing_device(request: Request) -> str:
    """Why the GPU of a request will not do; empty where it will. AMD's have no compute capability that counts."""
    capability = request.capability
    if capability is None:
        if not torch.cuda.is_available():
            return "needs a GPU, and PyTorch finds none"
        if torch.version.hip:
            return ""
        capability = torch.cuda.get_device_capability(request.device)
    if capability < OLDEST_CAPABILITY:
        wanted, got = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
        return f"needs compute capability {wanted} or newer; the GPU has {got}"
    return ""
