# SPDX-License-Identifier: Apache-2.0
"""From a dense model and a mask to a compact model, and from a compact model to plain PyTorch modules."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, LayerScale, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from gohsp import vit
from gohsp.layers import (
    CompactLinear,
    PatchProjection,
    PrunedAttention,
    PrunedBlock,
    PrunedBlocks,
    PrunedMlp,
    attend,
    find_bare_blocks,
    head_masks,
    lies_side_by_side,
)
from gohsp.mask import ModelMask


def compress(model: nn.Module, mask: ModelMask) -> nn.Module:
    """Return a new model without the pruned groups.

    It computes what the masked dense model computes, is called the same way, is still a timm model, and can be trained:
    its parameters are compact and carry timm's names. The given model is not changed.

    Args:
        model: Dense timm vision transformer (see :func:`gohsp.vit.find_blocks` for what is supported).
        mask: What to keep of it.

    Raises:
        ValueError: The model is already compressed or holds something that cannot be pruned, a hook hangs on a module
            that is replaced, or the mask is not valid or does not fit it.
        TypeError: The model is not a timm VisionTransformer or VisionTransformerDistilled.
    """
    vit.refuse_hooks(vit.find_dense_blocks(model))
    mask.validate(model)
    result: Any = copy.deepcopy(model)
    for index, block_mask in enumerate(mask.blocks):
        result.blocks[index] = PrunedBlock(result.blocks[index], block_mask)
    # The classes change and the objects stay: everything that timm or the user hung on them is still there.
    result.blocks.__class__ = PrunedBlocks
    projection = _projection(result)
    if type(projection) is nn.Conv2d and lies_side_by_side(projection):
        result.patch_embed.proj.__class__ = PatchProjection
    result.__class__ = vit.COMPRESSED_CLASS[type(model)]
    return result


def densify(model: nn.Module) -> nn.Module:
    """Return a compressed model as plain PyTorch: timm's own classes, ``nn.Linear`` and torch functions only.

    For ONNX export and other runtimes. Where the heads of a block have one width its attention is timm's Attention,
    else :class:`RaggedAttention`. Pruned columns become an ``index_select`` after the norm and one after layer scale.
    Every token is computed in every block. The given model is not changed.

    Args:
        model: A model made by :func:`compress`.

    Raises:
        ValueError: The model is not compressed, or a hook, an adapter or a computed weight in one of its blocks would
            be lost.
    """
    for index, block in enumerate(find_bare_blocks(model)):
        if reason := vit.why_computed(block):
            raise ValueError(f"model: cannot make blocks.{index} plain: {reason}")
    result: Any = copy.deepcopy(model)
    for index, block in enumerate(result.blocks):
        result.blocks[index] = _plain_block(block)
    result.blocks.__class__ = nn.Sequential
    if type(_projection(result)) is PatchProjection:
        result.patch_embed.proj.__class__ = nn.Conv2d
    result.__class__ = vit.DENSE_CLASS[type(model)]
    return result


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
        self.qkv, self.proj = _plain_linear(attn.qkv), _plain_linear(attn.proj)
        self.q_norm, self.k_norm = attn.q_norm, attn.k_norm
        self.attn_drop, self.proj_drop = attn.attn_drop, attn.proj_drop

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return [B, N, outputs] for x [B, N, inputs]; masks as in :class:`gohsp.layers.PrunedAttention`."""
        masks = head_masks(attn_mask, is_causal, self.heads, (x.shape[0], self.num_heads, x.shape[1]), x.dtype)
        heads = attend(self, self.qkv(x), masks, is_causal, self.attn_drop.p if self.training else 0.0)
        return self.proj_drop(self.proj(heads))


def _projection(model: Any) -> nn.Module | None:
    """Return what projects the patches, or None: an ``embed_layer`` of the user's own need not have it."""
    return getattr(model.patch_embed, "proj", None)


def _plain_block(block: PrunedBlock) -> Block:
    attn, mlp = block.attn, block.mlp
    plain = Block(dim=1, num_heads=1)
    plain.norm1 = _then_select(block.norm1, attn.in_cols)
    plain.attn = _plain_attention(attn)
    plain.ls1 = _then_place(_plain_layer_scale(block.ls1), attn.out_cols, attn.dim)
    plain.drop_path1 = block.drop_path1
    plain.norm2 = _then_select(block.norm2, mlp.in_cols)
    plain.mlp = _plain_mlp(mlp)
    plain.ls2 = _then_place(_plain_layer_scale(block.ls2), mlp.out_cols, mlp.dim)
    plain.drop_path2 = block.drop_path2
    return plain.train(block.training)


def _then_select(norm: nn.Module, cols: Tensor | None) -> nn.Module:
    return norm if cols is None else nn.Sequential(norm, SelectColumns(cols))


def _then_place(scale: nn.Module, cols: Tensor | None, features: int) -> nn.Module:
    return scale if cols is None else nn.Sequential(scale, PlaceColumns(cols, features))


def _plain_attention(attn: PrunedAttention) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    if len(widths) != 1 or 0 in widths:
        return RaggedAttention(attn)
    (width,) = widths
    if not isinstance(attn.q_norm, nn.Identity) and attn.scale != width**-0.5:
        return RaggedAttention(attn)  # a factor in front of q_norm would be normalised away
    plain = Attention(dim=1, num_heads=1)
    plain.num_heads, plain.head_dim = len(attn.heads), width
    plain.attn_dim, plain.scale = len(attn.heads) * width, width**-0.5
    plain.qkv, plain.proj = _plain_linear(attn.qkv), _plain_linear(attn.proj)
    plain.q_norm, plain.k_norm = attn.q_norm, attn.k_norm
    plain.attn_drop, plain.proj_drop = attn.attn_drop, attn.proj_drop
    _rescale_queries(plain, attn.scale * math.sqrt(width))
    return plain


def _rescale_queries(attn: Attention, factor: float) -> None:
    # timm's fused path takes its scale from the width that it sees, not from the width that the head once had.
    if factor == 1.0:
        return
    with torch.no_grad():
        attn.qkv.weight[: attn.attn_dim] *= factor
        if attn.qkv.bias is not None:
            attn.qkv.bias[: attn.attn_dim] *= factor


def _plain_mlp(mlp: PrunedMlp) -> Mlp:
    plain = Mlp(in_features=1)
    plain.fc1, plain.fc2 = _plain_linear(mlp.fc1), _plain_linear(mlp.fc2)
    plain.act = vit.ACTIVATIONS[mlp.activation]()
    plain.drop1, plain.drop2 = mlp.drop1, mlp.drop2
    return plain


def _plain_layer_scale(scale: Any) -> nn.Module:
    if isinstance(scale, nn.Identity):
        return scale
    plain = LayerScale(1)
    plain.gamma = scale.gamma
    return plain


def _plain_linear(layer: CompactLinear) -> nn.Linear:
    # Made small and then given its parameters, because torch warns about initialising a layer without rows or columns.
    plain = nn.Linear(1, 1, bias=layer.bias is not None)
    plain.weight = layer.weight
    if layer.bias is not None:
        plain.bias = layer.bias
    plain.out_features, plain.in_features = layer.weight.shape
    return plain
