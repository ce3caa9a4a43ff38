# SPDX-License-Identifier: Apache-2.0
"""Attention of heads of different widths in plain PyTorch: where a mask or dropout is asked for, and for export."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gohsp_kernels.reference import logit_factors, turned


def attend(
    attn: Any,
    qkv: Tensor,
    masks: Sequence[Tensor | None],
    is_causal: bool,
    dropout: float,
    rope: Tensor | None = None,
) -> Tensor:
    """Return the outputs of ragged heads, side by side, in plain PyTorch: one call of SDPA a head.

    Args:
        attn: Module with ``qk_widths``, ``v_widths``, ``scale``, ``q_norm``, ``k_norm``, ``rope_pairs``,
            ``position_bias`` and ``logit_scale``.
        qkv: [B, N, 2 * sum(qk_widths) + sum(v_widths)].
        masks: One a head; see :func:`head_masks`.
        is_causal: Attend to earlier tokens only.
        dropout: Probability of dropping an attention weight.
        rope: Rotary positions [2, N, sum(qk_widths) / 2], or None.

    Returns:
        [B, N, sum(v_widths)].
    """
    batch, tokens, _ = qkv.shape
    if not attn.v_widths:
        return qkv.new_zeros(batch, tokens, 0)
    qk, v = sum(attn.qk_widths), sum(attn.v_widths)
    parts = [
        part.split(widths, dim=-1)
        for part, widths in zip(
            qkv.split((qk, qk, v), dim=-1), (attn.qk_widths, attn.qk_widths, attn.v_widths), strict=True
        )
    ]
    halves = [width // 2 for width in attn.qk_widths]
    turns: Sequence[Tensor | None] = [None] * len(halves) if rope is None else rope.split(halves, dim=-1)
    masks, is_causal = _with_biases(masks, is_causal, attn.position_bias, qkv)
    factors = [None] * len(halves) if attn.logit_scale is None else logit_factors(attn.logit_scale).split(1)
    outputs = []
    for q, k, value, mask, angles, factor in zip(*parts, masks, turns, factors, strict=True):
        if q.shape[-1] == 0:
            # SDPA needs a channel; one of zeros gives the equal scores that no channel means.
            q = k = qkv.new_zeros(batch, tokens, 1)
        # With an axis of one head, because exporters know SDPA in four dimensions only.
        q, k, value = attn.q_norm(q)[:, None], attn.k_norm(k)[:, None], value[:, None]
        if factor is not None:
            q, k = F.normalize(q, dim=-1) * factor, F.normalize(k, dim=-1)
        if angles is not None:
            q, k = turned(q, angles, attn.rope_pairs), turned(k, angles, attn.rope_pairs)
        out = F.scaled_dot_product_attention(q, k, value, mask, dropout, is_causal, scale=attn.scale)
        outputs.append(out[:, 0])
    return torch.cat(outputs, dim=-1)


def _with_biases(
    masks: Sequence[Tensor | None], is_causal: bool, position_bias: Any, qkv: Tensor
) -> tuple[Sequence[Tensor | None], bool]:
    """Attention masks of the heads with what is added for relative positions, and whether the call is still causal."""
    if position_bias is None:
        return masks, is_causal
    biases = position_bias(len(qkv)).to(qkv.dtype).split(1, dim=1)
    if is_causal:
        tokens = qkv.shape[1]
        masks = [torch.ones(tokens, tokens, dtype=torch.bool, device=qkv.device).tril()] * len(biases)
    return [_added(bias, mask) for bias, mask in zip(biases, masks, strict=True)], False


def _added(bias: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


def head_angles(rope: Tensor, num_heads: int, heads: Sequence[int]) -> Tensor:
    """Return rotary positions as the kernels take them, for the heads that are left.

    Args:
        rope: [2, H or 1, N, d / 2], see :class:`gohsp.models.base.Attention`.
        num_heads: H, of the dense module.
        heads: Indices of the kept heads in it.

    Returns:
        [2, N, sum of d / 2 of the kept heads].
    """
    by_head = rope.expand(-1, num_heads, -1, -1)[:, list(heads)]
    return by_head.transpose(1, 2).flatten(2)


def head_masks(
    attn_mask: Tensor | None, is_causal: bool, heads: Sequence[int], shape: tuple[int, int, int], dtype: torch.dtype
) -> list[Tensor | None]:
    """Return the attention mask of each kept head, broadcastable to [B, 1, N, N].

    Args:
        attn_mask: Mask for all heads of the dense module, or None.
        is_causal: Whether the call is causal as well.
        heads: Indices of the kept heads in the dense module.
        shape: (B, heads of the dense module, N).
        dtype: Of the activations.

    Raises:
        ValueError: The mask is neither bool nor of that dtype, does not broadcast, or comes with ``is_causal``.
    """
    if attn_mask is None:
        return [None] * len(heads)
    if is_causal:
        raise ValueError("attn_mask: wanted None together with is_causal=True, got a mask")
    if attn_mask.dtype not in (torch.bool, dtype):
        raise ValueError(f"attn_mask: wanted dtype torch.bool or {dtype}, got {attn_mask.dtype}")
    wanted = (*shape, shape[-1])
    given = tuple(attn_mask.shape)
    padded = (1,) * (4 - len(given)) + given
    if len(padded) != 4 or any(size not in (1, full) for size, full in zip(padded, wanted, strict=True)):
        raise ValueError(f"attn_mask: wanted a shape that broadcasts to {wanted}, got {given}")
    full_mask = attn_mask.expand(wanted)
    return [full_mask[:, head : head + 1] for head in heads]
