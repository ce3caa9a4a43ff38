# SPDX-License-Identifier: Apache-2.0
"""Whether the Triton backend can run a call, and why not. The answer does not need Triton itself."""

from __future__ import annotations

import importlib.util
import os

import torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)
WIDEST_HEAD = 128


def interpreting() -> bool:
    """Whether Triton was told to run kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def missing(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int] | None = None, widest_head: int = 0
) -> str:
    """Why the backend cannot run a call, or the empty string if it can.

    Args:
        device: where the tensors are.
        dtype: of the activations.
        capability: compute capability to judge by; None for that of ``device``.
        widest_head: most channels that a head has.
    """
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if dtype not in DTYPES:
        return f"runs in float32, float16 and bfloat16; got {dtype}"
    if widest_head > WIDEST_HEAD:
        return f"takes heads of at most {WIDEST_HEAD} channels; got {widest_head}"
    if device.type == "cpu" and interpreting():
        # tests/triton/test_canary.py shows it.
        return "its interpreter multiplies bfloat16 wrong" if dtype == torch.bfloat16 else ""
    if device.type != "cuda":
        return (
            f"runs on NVIDIA and AMD GPUs, and on the CPU only with TRITON_INTERPRET=1; got a tensor on {device.type}"
        )
    if interpreting():
        return "is in its interpreter (TRITON_INTERPRET), which takes CPU tensors; got one on cuda"
    if capability is None:
        if not torch.cuda.is_available():
            return "needs a GPU, and PyTorch finds none"
        if torch.version.hip:
            return ""
        capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        wanted, got = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
        return f"needs compute capability {wanted} or newer; the GPU has {got}"
    return ""
