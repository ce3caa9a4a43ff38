# SPDX-License-Identifier: Apache-2.0
"""The attention sublayer in three launches: LayerNorm with the qkv product, attention, proj with scale and residual."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._packing import round_up
from ..descriptors import AttentionSublayer
from .attention import HeadLayout, attention
from .linear import PackedLinear
from .packing import fold_norm, pack_linear
from .rows import as_rows, as_vector


def aligned_channels(widths: Sequence[int], keep: Sequence[bool], align: int) -> tuple[list[int], list[int], list[int]]:
    """Heads moved to channels that are multiples of ``align``, those that are not in ``keep`` left out.

    Returns:
        The padded widths; the channels that are kept; the channels that they move to.
    """
    padded: list[int] = []
    source: list[int] = []
    target: list[int] = []
    start = new_start = 0
    for width, kept in zip(widths, keep, strict=True):
        if kept:
            source += range(start, start + width)
            target += range(new_start, new_start + width)
            padded.append(round_up(width, align))
            new_start += padded[-1]
        start += width
    return padded, source, target


@dataclass(frozen=True)
class Alignment:
    """Where the channels of compact weights go so that every head begins at a multiple of 8 channels."""

    layout: HeadLayout
    qkv: tuple[Tensor, Tensor]  # int64: rows of the compact qkv weight, rows of the aligned one
    out: tuple[Tensor, Tensor]  # the same for the columns of proj
    qkv_channels: int  # of the layout, rounded up so that rows in memory begin at a multiple of 16

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(qk_widths: tuple[int, ...], v_widths: tuple[int, ...], qk_align: int, device: torch.device) -> Alignment:
        """Heads without V channels add nothing and are left out, their q and k with them."""
        keep = [width > 0 for width in v_widths]
        qk_padded, qk_source, qk_target = aligned_channels(qk_widths, keep, qk_align)
        v_padded, v_source, v_target = aligned_channels(v_widths, keep, 8)
        old, new = sum(qk_widths), sum(qk_padded)
        source = [*qk_source, *(old + c for c in qk_source), *(2 * old + c for c in v_source)]
        target = [*qk_target, *(new + c for c in qk_target), *(2 * new + c for c in v_target)]

        def index(channels: list[int]) -> Tensor:
            return torch.tensor(channels, dtype=torch.int64, device=device)

        layout = HeadLayout.of(tuple(qk_padded), tuple(v_padded), device)
        channels = round_up(layout.qkv_channels, 16)
        return Alignment(layout, (index(source), index(target)), (index(v_source), index(v_target)), channels)


def move(tensor: Tensor, dim: int, channels: tuple[Tensor, Tensor], size: int) -> Tensor:
    """Entries ``channels[0]`` of ``tensor`` along ``dim`` at ``channels[1]`` of ``size``, zeros elsewhere."""
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.new_zeros(shape).index_copy(dim, channels[1], tensor.index_select(dim, channels[0]))


@dataclass(frozen=True)
class AlignedAttention:
    """Weights with LayerNorm folded in and heads at aligned channels. Differentiable in what they were made of."""

    layout: HeadLayout
    qkv_weight: Tensor
    qkv_bias: Tensor | None
    proj_weight: Tensor


def align_attention(sublayer: AttentionSublayer, dtype: torch.dtype) -> AlignedAttention:
    """Fold and align a sublayer's weights; the qkv weight in ``dtype``, proj in its own."""
    # A norm on q and k divides by the width, so there the width must be the true one.
    align = 8 if sublayer.q_norm_weight is None else 1
    alignment = Alignment.of(sublayer.qk_widths, sublayer.v_widths, align, sublayer.qkv_weight.device)
    norm = sublayer.norm_weight, sublayer.norm_bias
    weight, bias = fold_norm(sublayer.qkv_weight.to(dtype), sublayer.qkv_bias, *norm, sublayer.in_cols)
    return AlignedAttention(
        alignment.layout,
        move(weight, 0, alignment.qkv, alignment.qkv_channels),
        None if bias is None else move(bias, 0, alignment.qkv, alignment.qkv_channels),
        move(sublayer.proj_weight, 1, alignment.out, alignment.layout.out_channels),
    )


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
        rows = as_rows(x)
        # All tokens' queries are computed even where few are asked for: they are a third of this product in one block.
        qkv = self.qkv(rows).view(batch, tokens, self.qkv.out_features)
        heads = new_heads(qkv, num_queries, self.layout)
        attention(qkv, self.layout, self.scale, num_queries, norms=self.norms, eps=self.qk_eps, out=heads)
        residual = rows if num_queries == tokens else as_rows(rows.view(x.shape)[:, :num_queries])
        return self.proj(heads.flatten(0, 1), residual).view(batch, num_queries, features)


def new_heads(qkv: Tensor, num_queries: int, layout: HeadLayout) -> Tensor:
    """Room for the heads' outputs, each row beginning at a multiple of 16 channels."""
    stride = round_up(layout.out_channels, 16)
    return qkv.new_empty(qkv.shape[0], num_queries, stride)[..., : layout.out_channels]


def pack_attention(sublayer: AttentionSublayer, x: Tensor) -> PackedAttention:
    """Prepare a sublayer for activations like ``x`` [..., features]."""
    with torch.no_grad():
        aligned = align_attention(sublayer, torch.float64)
    channels, out_channels = aligned.qkv_weight.shape[0], aligned.layout.out_channels
    features = x.shape[-1]
    return PackedAttention(
        pack_linear(
            aligned.qkv_weight,
            aligned.qkv_bias,
            x.dtype,
            features=features,
            out_features=channels,
            in_cols=sublayer.in_cols,
            norm_eps=sublayer.eps,
        ),
        aligned.layout,
        pack_linear(
            aligned.proj_weight,
            sublayer.proj_bias,
            x.dtype,
            features=out_channels,
            out_features=features,
            out_cols=sublayer.out_cols,
            layer_scale=sublayer.layer_scale,
        ),
        tuple(map(as_vector, sublayer.norms)),
        sublayer.scale,
        sublayer.qk_eps,
    )
