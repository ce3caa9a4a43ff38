# SPDX-License-Identifier: Apache-2.0
"""The attention sublayer in three launches: LayerNorm with the qkv product, attention, proj with scale and residual."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import HeadLayout, attention
from .linear import PackedLinear
from .packing import fold_norm, pack_linear, round_up, spread, spread_channels


@dataclass(frozen=True)
class PackedAttention:
    """An attention sublayer ready to launch."""

    qkv: PackedLinear
    layout: HeadLayout
    proj: PackedLinear
    norms: tuple[Tensor | None, ...]  # weight and bias of LayerNorm on q, then on k
    scale: float
    qk_eps: float

    def __call__(self, x: Tensor, num_queries: int) -> Tensor:
        """``x`` [batch, tokens, features] to [batch, num_queries, features]."""
        batch, tokens, features = x.shape
        rows = x.reshape(-1, features)
        # All tokens' queries are computed even where few are asked for: they are a third of this product in one block.
        qkv = x.new_empty(batch, tokens, round_up(self.layout.qkv_channels, 16))
        self.qkv(rows, out=qkv.flatten(0, 1))
        heads = x.new_empty(batch, num_queries, round_up(self.layout.out_channels, 16))
        attention(qkv, self.layout, self.scale, num_queries, norms=self.norms, eps=self.qk_eps, out=heads)
        residual = rows if num_queries == tokens else x[:, :num_queries].reshape(-1, features)
        out = self.proj(heads.flatten(0, 1)[:, : self.layout.out_channels], residual)
        return out.view(batch, num_queries, features)


def pack_attention(
    dtype: torch.dtype,
    features: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    layer_scale: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    qk_widths: tuple[int, ...],
    v_widths: tuple[int, ...],
    scale: float,
    eps: float,
    qk_eps: float,
) -> PackedAttention:
    """Prepare a sublayer for activations [batch, tokens, features] of ``dtype``. Other arguments as attention_sublayer.

    Heads without V channels add nothing and are left out, their q and k with them.

    Raises:
        ValueError: for a head wider than the kernels take.
    """
    keep = [width > 0 for width in v_widths]
    # A norm on q and k divides by the width, so there the width must be the true one.
    qk_padded, qk_source, qk_target = spread_channels(qk_widths, keep, 8 if q_norm_weight is None else 1)
    v_padded, v_source, v_target = spread_channels(v_widths, keep, 8)
    old, new = sum(qk_widths), sum(qk_padded)
    source = [*qk_source, *(old + c for c in qk_source), *(2 * old + c for c in v_source)]
    target = [*qk_target, *(new + c for c in qk_target), *(2 * new + c for c in v_target)]

    weight, bias = fold_norm(qkv_weight.detach().double(), qkv_bias, norm_weight, norm_bias, in_cols)
    layout = HeadLayout.of(tuple(qk_padded), tuple(v_padded), qkv_weight.device)
    return PackedAttention(
        pack_linear(
            spread(weight[source], 0, target, layout.qkv_channels),
            None if bias is None else spread(bias[source], 0, target, layout.qkv_channels),
            dtype,
            features=features,
            out_features=layout.qkv_channels,
            in_cols=in_cols,
            norm_eps=eps,
        ),
        layout,
        pack_linear(
            spread(proj_weight.detach()[:, v_source], 1, v_target, layout.out_channels),
            proj_bias,
            dtype,
            features=layout.out_channels,
            out_features=features,
            out_cols=out_cols,
            layer_scale=layer_scale,
        ),
        (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias),
        scale,
        qk_eps,
    )
