# SPDX-License-Identifier: Apache-2.0
"""The weight formats of the CPU backend: which numbers a matrix is kept in, and what that means for the results.

A format is an object here and a struct of the same name in csrc/cpu/formats. Dispatch, freezing, the benchmarks and the
demo ask these objects; none of them knows a format by name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, reference
from ._packing import fold_attention, fold_mlp
from .descriptors import NORMS, MlpSublayer, Sublayer


def _float32(weight: Tensor) -> tuple[Tensor, None]:
    return weight.to(torch.float32), None


def _bfloat16(weight: Tensor) -> tuple[Tensor, None]:
    return weight.to(torch.bfloat16), None


def _anywhere(capability: str) -> str:
    return ""


def _with_bfloat16_products(capability: str) -> str:
    if capability in ("amx", "avx512bf16", "neonbf16"):
        return ""
    reason = f"needs AMX, or AVX512_BF16 or Arm's BF16 at a gain, for bfloat16 weights; runs on {capability}"
    gain = _native.function("gohsp_cpu_bfloat16_gain", ctypes.c_double)()
    return f"{reason}; AVX512_BF16 here makes products {gain:.2f} times as fast as float32's" if gain else reason


@dataclass(frozen=True)
class WeightFormat:
    """Numbers that the matrices of a frozen chain are kept in.

    Attributes:
        name: "float32", "bfloat16" or "int8": that of the format in csrc/common/wire.h.
        short: the name in a table.
        about: what a frozen model of this format has in it, for a table.
        numbers: a matrix [n, k] of any dtype as the numbers that are packed, [n, k], and their scales, float32 [n] or
            None.
        missing: why an instruction set (its name) cannot run such weights, or the empty string.
        tolerance: relative error of 12 blocks, in the 2-norm, that rounding in this format does not reach and a mistake
            exceeds by far.
        ends: names of formats for the patch embedding and for the last block, whose errors no later block evens out;
            they have the first that can run.
        linear: x, weight, bias and the levels of an activation in 8 bits to what the kernels compute, in plain PyTorch.
    """

    name: str
    short: str
    about: str
    numbers: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    missing: Callable[[str], str]
    tolerance: float
    ends: tuple[str, ...]
    linear: Callable[..., Tensor]

    def reference(
        self,
        sublayer: Sublayer,
        x: Tensor,
        levels: int = 255,
        attention: Callable[..., Tensor] = reference.ragged_attention,
    ) -> Tensor:
        """What a sublayer that was packed in this format computes, in plain PyTorch.

        Args:
            sublayer: whose constants are folded as packing folds them.
            x: [batch, tokens, features].
            levels: largest integer that an activation becomes where it meets int8 weights; see
                :func:`gohsp_kernels.cpu.activation_levels`.
            attention: ragged attention as it is beside such weights; see
                :func:`gohsp_kernels.cpu.reference_attention`.
        """
        linear = partial(self.linear, levels=levels)
        outside = ("norm_weight", "norm_bias", "layer_scale")
        plain: dict[str, Any] = dict.fromkeys((*outside, "inner_norm_weight", "inner_norm_bias"))
        if sublayer.post_norm:  # these are not folded then
            parts = {name: getattr(sublayer, name) for name in outside}
            plain |= {name: None if part is None else part.to(x.dtype) for name, part in parts.items()}
        if isinstance(sublayer, MlpSublayer):
            mlp = fold_mlp(sublayer)
            plain |= {"fc1_weight": mlp.fc1, "fc1_bias": mlp.fc1_bias, "fc2_weight": mlp.fc2, "fc2_bias": mlp.fc2_bias}
            plain |= {"gate_weight": mlp.gate, "gate_bias": mlp.gate_bias}
            return reference.mlp_sublayer(replace(sublayer, **plain), x, None, linear)
        folded = fold_attention(sublayer)
        plain |= {"qkv_weight": folded.qkv, "qkv_bias": folded.qkv_bias, "scale": folded.scale}
        plain |= {"proj_weight": folded.proj, "proj_bias": folded.proj_bias}
        norms = zip(NORMS, sublayer.norms, strict=True)
        plain |= {name: None if norm is None else norm.to(x.dtype) for name, norm in norms}
        return reference.attention_sublayer(replace(sublayer, **plain), x, x.shape[1], linear, attention)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int) -> Tensor:
    return F.linear(x, weight, bias)


def _bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int) -> Tensor:
    return reference.bf16_linear(x, weight, bias)


FORMATS: dict[str, WeightFormat] = {
    f.name: f
    for f in (
        WeightFormat(
            name="float32",
            short="fp32",
            about="weights and their inputs in float32",
            numbers=_float32,
            missing=_anywhere,
            tolerance=1e-5,
            ends=("float32",),
            linear=_linear,
        ),
        WeightFormat(
            name="bfloat16",
            short="bf16",
            about="weights of the blocks and their inputs in bfloat16, for CPUs that gain by it",
            numbers=_bfloat16,
            missing=_with_bfloat16_products,
            tolerance=0.03,
            ends=("bfloat16",),
            linear=_bf16_linear,
        ),
        WeightFormat(
            name="int8",
            short="int8",
            about="all blocks but the last with weights and their inputs in 8 bits",
            numbers=reference.quantise_weight,
            missing=_anywhere,
            tolerance=0.05,
            ends=("bfloat16", "float32"),
            linear=reference.int8_linear,
        ),
    )
}
"""By name."""

ROUNDED = tuple(name for name in FORMATS if name != "float32")
"""Names of those whose results are not the model's own to the last digits."""
