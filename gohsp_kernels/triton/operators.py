# SPDX-License-Identifier: Apache-2.0
"""The public operators on the Triton backend.

Each operator takes its arguments in the order of its schema (:mod:`gohsp_kernels._schemas`). Inference packs
parameters once and then only launches; a call that needs gradients goes through :mod:`.training`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._cache import PackedCache
from . import training
from .attention import HeadLayout, attention
from .attention_sublayer import pack_attention
from .linear import PackedLinear
from .mlp import pack_mlp
from .packing import pack_linear

_cache = PackedCache()


def _needs_grad(*arguments: Any) -> bool:
    return torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    if _needs_grad(x, weight, bias):
        return training.packed_linear(x, weight, bias, in_cols, out_cols, out_features, activation)
    rows = x.reshape(-1, x.shape[-1])

    def pack() -> PackedLinear:
        return pack_linear(
            weight,
            bias,
            x.dtype,
            features=x.shape[-1],
            out_features=out_features,
            in_cols=in_cols,
            out_cols=out_cols,
            activation=activation,
        )

    constants = (x.dtype, x.shape[-1], out_features, activation)
    packed = _cache.get(weight, (weight, bias, in_cols, out_cols), constants, pack)
    return packed(rows).view(*x.shape[:-1], out_features)


def ragged_attention(
    qkv: Tensor,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    qk_widths: tuple[int, ...],
    v_widths: tuple[int, ...],
    scale: float,
    eps: float,
    num_queries: int,
) -> Tensor:
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    if _needs_grad(qkv, *norms):
        return training.ragged_attention(qkv, *norms, qk_widths, v_widths, scale, eps, num_queries)
    layout = HeadLayout.of(qk_widths, v_widths, qkv.device)
    return attention(qkv.contiguous(), layout, scale, num_queries, norms=norms, eps=eps)


def attention_sublayer(x: Tensor, *arguments: Any) -> Tensor:
    """Arguments in the order of the schema: 13 tensors, then qk_widths, v_widths, scale, eps, qk_eps, num_queries."""
    if _needs_grad(x, *arguments):
        return training.attention_sublayer(x, *arguments)
    tensors, constants, num_queries = arguments[:13], arguments[13:18], arguments[18]
    packed = _cache.get(
        tensors[2],
        tensors,
        (x.dtype, *constants),
        lambda: pack_attention(x.dtype, x.shape[-1], *tensors, *constants),
    )
    return packed(x, num_queries)


def mlp_sublayer(x: Tensor, *arguments: Any) -> Tensor:
    """Arguments in the order of the schema: 9 tensors, then activation and eps."""
    if _needs_grad(x, *arguments):
        return training.mlp_sublayer(x, *arguments)
    tensors, constants = arguments[:9], arguments[9:]
    packed = _cache.get(
        tensors[2], tensors, (x.dtype, *constants), lambda: pack_mlp(x.dtype, x.shape[-1], *tensors, *constants)
    )
    return packed(x)
