# SPDX-License-Identifier: Apache-2.0
"""The public operators on the Triton backend.

Inference packs parameters once and then only launches; a call that needs gradients goes through :mod:`.training`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._cache import PackedCache
from ..descriptors import Attention, AttentionSublayer, Descriptor, Linear, MlpSublayer, Sublayer
from ..registry import PackedChain, needs_grad
from . import training
from .attention import HeadLayout, attention
from .attention_sublayer import PackedAttention, pack_attention
from .linear import PackedLinear
from .mlp import PackedMlp, pack_mlp
from .packing import pack_linear
from .rows import as_rows, as_tokens, as_vector

_cache = PackedCache()


def _pack_linear(linear: Linear, x: Tensor) -> PackedLinear:
    return pack_linear(
        linear.weight,
        linear.bias,
        x.dtype,
        features=x.shape[-1],
        out_features=linear.out_features,
        in_cols=linear.in_cols,
        out_cols=linear.out_cols,
        activation=linear.activation,
    )


_PACK: dict[str, Callable[..., PackedLinear | PackedAttention | PackedMlp]] = {
    "packed_linear": _pack_linear,
    "attention_sublayer": pack_attention,
    "mlp_sublayer": pack_mlp,
}


def packed(operator: Linear | Sublayer, x: Tensor) -> Any:
    """The packed form for activations like ``x`` [..., features], from the cache or made now."""
    constants = (x.dtype, x.shape[-1], *operator.constants)
    return _cache.get(operator.key, operator.tensors, constants, lambda: _PACK[operator.name](operator, x))


def packed_linear(linear: Linear, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.packed_linear`."""
    result: Tensor = packed(linear, x)(as_rows(x))
    return result.view(*x.shape[:-1], linear.out_features)


def ragged_attention(heads: Attention, qkv: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.ragged_attention`."""
    layout = HeadLayout.of(heads.qk_widths, heads.v_widths, qkv.device)
    norms = [as_vector(norm) for norm in heads.norms]
    return attention(as_tokens(qkv), layout, heads.scale, num_queries, norms=norms, eps=heads.eps)


def attention_sublayer(sublayer: AttentionSublayer, x: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.attention_sublayer`."""
    result: Tensor = packed(sublayer, x)(x, num_queries)
    return result


def mlp_sublayer(sublayer: MlpSublayer, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.mlp_sublayer`."""
    result: Tensor = packed(sublayer, x)(x)
    return result


_RUN: dict[str, Callable[..., Tensor]] = {
    "packed_linear": packed_linear,
    "ragged_attention": ragged_attention,
    "attention_sublayer": attention_sublayer,
    "mlp_sublayer": mlp_sublayer,
}


def run(operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
    """Compute a call, differentiably where a gradient is needed."""
    if needs_grad((x, *operator.tensors)):
        return training.RUN[operator.name](operator, x, num_queries)
    return _RUN[operator.name](operator, x, num_queries)


def chain(x: Tensor, sublayers: Sequence[Sublayer]) -> PackedChain:
    """The chain for activations like ``x``. Whether its tensors have changed is asked once for all sublayers, since on
    a GPU the answer waits for what was launched before."""
    return PackedChain(x, sublayers, packed, _run_packed)


def _run_packed(x: Tensor, sublayers: list[Any], num_queries: int) -> Tensor:
    attentions = [i for i, sublayer in enumerate(sublayers) if isinstance(sublayer, PackedAttention)]
    for i, sublayer in enumerate(sublayers):
        if isinstance(sublayer, PackedAttention):
            x = sublayer(x, num_queries if i == attentions[-1] else x.shape[1])
        else:
            x = sublayer(x)
    return x[:, :num_queries]
