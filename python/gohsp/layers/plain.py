# SPDX-License-Identifier: Apache-2.0
"""Compact layers as plain PyTorch, for exporters and other runtimes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.layers.attention import attend, head_masks
from gohsp.layers.compact import CompactLinear, PrunedAttention


class SelectColumns(nn.Module):
    """Read some features of the residual stream: [..., D] to [..., n]."""

    cols: Tensor

    def __init__(self, cols: Tensor) -> None:
        super().__init__()
        self.register_buffer("cols", cols, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(-1, self.cols)


class PlaceColumns(nn.Module):
    """Write some features of the residual stream, zero in the others: [..., n] to [..., D]."""

    source: Tensor

    def __init__(self, cols: Tensor, features: int) -> None:
        super().__init__()
        # A read from the values with one zero behind them: exporters know index_select better than scatter.
        source = cols.new_full((features,), cols.numel())
        source[cols] = torch.arange(cols.numel(), device=cols.device)
        self.register_buffer("source", source, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 1)).index_select(-1, self.source)


class RaggedAttention(nn.Module):
    """Self-attention of heads of any width, in plain PyTorch; called like timm's Attention.

    Args:
        attn: The compact module to take the parameters from. They are shared, not copied.
    """

    def __init__(self, attn: PrunedAttention) -> None:
        super().__init__()
        self.num_heads, self.heads = attn.num_heads, attn.heads
        self.qk_widths, self.v_widths, self.scale = attn.qk_widths, attn.v_widths, attn.scale
        self.qkv, self.proj = plain_linear(attn.qkv), plain_linear(attn.proj)
        self.q_norm, self.k_norm, self.inner_norm = attn.q_norm, attn.k_norm, attn.inner_norm
        self.rope_pairs, self.position_bias = attn.rope_pairs, attn.position_bias
        self.logit_scale = attn.logit_scale
        self.register_buffer("rope", attn.rope, persistent=False)
        self.attn_drop, self.proj_drop = attn.attn_drop, attn.proj_drop

    rope: Tensor | None

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """Return [B, N, outputs] for x [B, N, inputs].

        Args:
            x: [B, N, inputs].
            attn_mask, is_causal, rope: As in :meth:`gohsp.layers.PrunedAttention.attend`.
        """
        masks = head_masks(attn_mask, is_causal, self.heads, (x.shape[0], self.num_heads, x.shape[1]), x.dtype)
        rope = self.rope if rope is None else rope
        heads = attend(self, self.qkv(x), masks, is_causal, self.attn_drop.p if self.training else 0.0, rope)
        return self.proj_drop(self.proj(self.inner_norm(heads)))


def plain_linear(layer: CompactLinear) -> nn.Linear:
    """Return an ``nn.Linear`` with the parameters of a compact layer, which are shared."""
    # Made small, because torch warns about a layer without rows or columns, and on meta, where nothing is drawn.
    plain = nn.Linear(1, 1, bias=layer.bias is not None, device="meta")
    plain.weight = layer.weight
    if layer.bias is not None:
        plain.bias = layer.bias
    plain.out_features, plain.in_features = layer.weight.shape
    return plain
