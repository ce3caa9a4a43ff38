# SPDX-License-Identifier: Apache-2.0
"""The Triton backend as the others see it. Asking whether it can run a call does not need Triton itself."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _gpu
from ..descriptors import Descriptor, Sublayer
from ..registry import PackedChain, Request, register

UNPROVEN_BACKWARD = "its backward kernels have not been run on a GPU yet; it trains where it is named"
"""Why "auto" leaves calls that need gradients to the reference."""


def interpreting() -> bool:
    """Whether Triton was told to run kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


class TritonBackend:
    """The Triton kernels on NVIDIA and AMD GPUs, and on CPU tensors under TRITON_INTERPRET=1."""

    name = "triton"
    operators = ("packed_linear", "ragged_attention", "attention_sublayer", "mlp_sublayer")
    parts: frozenset[str] = frozenset()

    def missing(self, request: Request) -> str:
        if importlib.util.find_spec("triton") is None:
            return "needs Triton, which is not installed"
        if reason := _gpu.missing_numbers(request):
            return reason
        kind = request.device.type
        if kind == "cpu" and interpreting():
            # tests/gohsp_kernels/triton/test_canary.py shows it.
            return "its interpreter multiplies bfloat16 wrong" if request.dtype == torch.bfloat16 else ""
        if kind != "cuda":
            return f"runs on NVIDIA and AMD GPUs, and on the CPU only with TRITON_INTERPRET=1; got a tensor on {kind}"
        if interpreting():
            return "is in its interpreter (TRITON_INTERPRET), which takes CPU tensors; got one on cuda"
        return _gpu.missing_device(request)

    def only_named(self, request: Request) -> str:
        if request.device.type == "cpu":
            return _gpu.ON_CPU
        return UNPROVEN_BACKWARD if request.needs_grad else ""

    def priority(self, request: Request) -> int:
        return 10

    def run(self, operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
        from . import operators  # imports Triton, which a machine without a GPU need not have

        return operators.run(operator, x, num_queries)

    def chain(self, x: Tensor, sublayers: Sequence[Sublayer]) -> PackedChain:
        from . import operators

        return operators.chain(x, sublayers)


register(TritonBackend())
