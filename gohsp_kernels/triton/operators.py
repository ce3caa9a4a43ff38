# SPDX-License-Identifier: Apache-2.0
"""The public operators on the Triton backend.

Each operator takes its arguments in the order of its schema (:mod:`gohsp_kernels._schemas`). Inference packs
parameters once and then only launches; a call that needs gradients goes through :mod:`.training`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .. import cuda
from .._cache import PackedCache
from ..dispatch import needs_grad
from . import training
from .attention import HeadLayout, attention
from .attention_sublayer import PackedAttention, pack_attention
from .linear import PackedLinear
from .mlp import PackedMlp, pack_mlp
from .packing import pack_linear
from .rows import as_rows, as_tokens, as_vector

_cache = PackedCache()


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    if needs_grad((x, weight, bias)):
        return training.packed_linear(x, weight, bias, in_cols, out_cols, out_features, activation)
    rows = as_rows(x)

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
    if needs_grad((qkv, *norms)):
        return training.ragged_attention(qkv, *norms, qk_widths, v_widths, scale, eps, num_queries)
    layout = HeadLayout.of(qk_widths, v_widths, qkv.device)
    return attention(as_tokens(qkv), layout, scale, num_queries, norms=[as_vector(t) for t in norms], eps=eps)


_PACK: dict[str, Callable[..., PackedAttention | PackedMlp]] = {
    "attention_sublayer": pack_attention,
    "mlp_sublayer": pack_mlp,
}


def packed_sublayer(
    name: str, x: Tensor, tensors: Sequence[Tensor | None], constants: tuple[Any, ...]
) -> PackedAttention | PackedMlp:
    """The packed form of a sublayer for activations like ``x``, from the cache or made now.

    Args:
        name: "attention_sublayer" or "mlp_sublayer".
        x: [..., features].
        tensors: the tensor arguments of that operator but for x, in the order of its schema.
        constants: its other arguments in that order, but for num_queries.
    """
    key = tensors[2]  # qkv_weight or fc1_weight: of all the tensors the one that is never None
    assert key is not None
    dtype, features = x.dtype, x.shape[-1]
    return _cache.get(
        key, tensors, (dtype, features, *constants), lambda: _PACK[name](dtype, features, *tensors, *constants)
    )


def attention_sublayer(x: Tensor, *arguments: Any) -> Tensor:
    """Arguments in the order of the schema: 13 tensors, then qk_widths, v_widths, scale, eps, qk_eps, num_queries."""
    if needs_grad((x, *arguments)):
        return training.attention_sublayer(x, *arguments)
    packed: Any = packed_sublayer("attention_sublayer", x, arguments[:13], arguments[13:18])
    result: Tensor = packed(x, arguments[18])
    return result


def mlp_sublayer(x: Tensor, *arguments: Any) -> Tensor:
    """Arguments in the order of the schema: 9 tensors, then activation and eps."""
    if needs_grad((x, *arguments)):
        return training.mlp_sublayer(x, *arguments)
    packed: Any = packed_sublayer("mlp_sublayer", x, arguments[:9], arguments[9:])
    result: Tensor = packed(x)
    return result


@dataclass(frozen=True)
class _Sublayer(cuda.SublayerLike):
    """A sublayer of a chain, packed for Triton."""

    def packed(self) -> Any:
        self.check()
        return packed_sublayer(self.name, self.like, self.tensors, self.constants)


class PackedChain(cuda.PackedChain):
    """Packed sublayers of a chain. Whether their tensors have changed is asked once for all of them, since on a GPU the
    answer waits for what was launched before."""

    member = _Sublayer

    def __call__(self, x: Tensor, num_queries: int) -> Tensor:
        packed: list[Any] = list(self.current())
        attentions = [i for i, sublayer in enumerate(packed) if isinstance(sublayer, PackedAttention)]
        for i, sublayer in enumerate(packed):
            if isinstance(sublayer, PackedAttention):
                x = sublayer(x, num_queries if i == attentions[-1] else x.shape[1])
            else:
                x = sublayer(x)
        return x[:, :num_queries]
