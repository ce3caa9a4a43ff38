# SPDX-License-Identifier: Apache-2.0
"""timm's SwinTransformerV2 and SwinTransformerV2Cr: windows as in Swin, scores that are cosines, and norms behind both
halves of a block.

A dense block computes its biases of relative positions by an MLP; a compressed one has a table of them, a column for
each head that is left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from timm.models.swin_transformer import get_relative_position_index
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as CosineAttention
from timm.models.swin_transformer_v2_cr import (
    SwinTransformerV2Cr,
    SwinTransformerV2CrBlock,
    WindowMultiHeadAttention,
)
from torch import Tensor, nn

from gohsp.models.base import (
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    Geometry,
    OpenBlock,
    Projection,
    ScoreBias,
    Windows,
)
from gohsp.models.registry import register
from gohsp.models.timm_named import COMMON_ARGUMENTS, OfOneSize
from gohsp.models.timm_parts import (
    SplitBiases,
    let_read,
    open_attention,
    open_mlp,
    plain_mlp,
    unfilled,
)
from gohsp.models.timm_stages import Place, places_in
from gohsp.models.timm_swin import (
    FrozenSwinBlock,
    PlainWindowAttention,
    PrunedSwinBlock,
    TimmSwin,
)


class PrunedSwinV2CrBlock(PrunedSwinBlock):
    """Block with compact parameters, called like timm's SwinTransformerV2CrBlock.

    Attributes:
        norm3: A norm of the residual stream behind the block, or ``nn.Identity``.
    """

    norm3: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the block's output [B, height, width, D] for x of that shape."""
        return cast(Tensor, self.norm3(PrunedSwinBlock.forward(self, x)))


class FrozenSwinV2CrBlock(FrozenSwinBlock):
    """Packed block, called like timm's SwinTransformerV2CrBlock.

    Attributes:
        norm3: See :class:`PrunedSwinV2CrBlock`.
    """

    norm3: nn.Module

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the block's output [B, height, width, D] for x of that shape; no gradient flows through it."""
        return cast(Tensor, self.norm3(FrozenSwinBlock.forward(self, x)))


class PrunedSwinTransformerV2(OfOneSize, CompressedModel, SwinTransformerV2):
    """A timm SwinTransformerV2 whose blocks are compact. Made by :func:`gohsp.compress`."""


class PrunedSwinTransformerV2Cr(OfOneSize, CompressedModel, SwinTransformerV2Cr):
    """A timm SwinTransformerV2Cr whose blocks are compact. Made by :func:`gohsp.compress`."""


class TimmSwinV2(TimmSwin):
    """Adapter for timm's SwinTransformerV2."""

    wanted = "a timm SwinTransformerV2 (not a subclass)"
    dense, compressed = SwinTransformerV2, PrunedSwinTransformerV2
    block, attention = SwinTransformerV2Block, CosineAttention
    arguments = (
        *(name for name in COMMON_ARGUMENTS if name not in ("depth", "init_values")),
        *("depths", "window_size", "always_partition", "pretrained_window_sizes"),
    )

    def why_unsupported(self, block: Any) -> str | None:
        if getattr(block.attn, "qkv_bias_separate", False):
            return "a bias of q, k and v that is added after the product"
        return super().why_unsupported(block)

    def bias(self, block: Any) -> ScoreBias:
        """Return what the attention of a block adds to its scores; no file holds index and mask."""
        attn = block.attn
        index, coords = attn.relative_position_index, attn.relative_coords_table
        if index.is_meta:
            _, index = attn._make_pair_wise_relative_positions(device=torch.device("cpu"), dtype=coords.dtype)
        trains = any(parameter.requires_grad for parameter in attn.cpb_mlp.parameters())
        return ScoreBias(partial(_computed, attn), index, trains, _mask(block))

    def opened(self, block: Any, model: Any | None, stage: int) -> OpenBlock:
        attn = block.attn
        read = SplitBiases(attn) if getattr(attn, "q_bias", None) is not None else Projection(attn.qkv)
        size = BlockGeometry(
            dim=read.in_features,
            num_heads=attn.num_heads,
            head_dim=read.out_features // 3 // attn.num_heads,
            hidden=block.mlp.fc2.in_features,
            cosine=True,
            post_norm=True,
        )
        windows = Windows(self.order(block).to(attn.qkv.weight.device))
        more = {"bias": self.bias(block), "windows": windows, "logit_scale": attn.logit_scale.flatten(), "factor": 1.0}
        attention = open_attention(block, read, Projection(attn.proj), nn.Identity(), size, **more)
        return OpenBlock(block, attention, open_mlp(block, nn.Identity(), size))

    def plain_block(self, block: Any) -> nn.Module:
        sizes = {"input_resolution": block.grid, "window_size": block.window_size, "shift_size": block.shift_size}
        return _plain(unfilled(SwinTransformerV2Block, dim=2, num_heads=1, **sizes), block)


class TimmSwinV2Cr(TimmSwinV2):
    """Adapter for timm's SwinTransformerV2Cr."""

    wanted = "a timm SwinTransformerV2Cr (not a subclass)"
    dense, compressed, frozen_block = SwinTransformerV2Cr, PrunedSwinTransformerV2Cr, FrozenSwinV2CrBlock
    block, compact_block = SwinTransformerV2CrBlock, PrunedSwinV2CrBlock
    attention = WindowMultiHeadAttention
    arguments = (
        *(name for name in COMMON_ARGUMENTS if name not in ("depth", "qkv_bias")),
        *("depths", "window_size", "window_ratio", "always_partition", "extra_norm_period", "extra_norm_stage"),
        *("sequential_attn", "weight_init"),
    )

    def stages(self, model: Any) -> list[list[Place]]:
        return [places_in(stage.blocks) for stage in model.stages]

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        found = list(super().open_blocks(model))
        for index, block in enumerate(self.blocks(model)[:-1]):
            if not isinstance(block.norm3, nn.Identity):
                after = found[index + 1].attention
                transition = partial(_normed, block.norm3, after.transition)
                found[index + 1] = replace(found[index + 1], attention=replace(after, transition=transition))
        return tuple(found)

    def between(self, model: Any, stage: int) -> Callable[[Tensor], Tensor] | None:
        if stage == 0:
            return None
        return partial(_merged, model.stages[stage].downsample, model.stages[stage - 1].feat_size)

    def grid(self, block: Any) -> tuple[int, int]:
        height, width = block.feat_size
        return height, width

    def bias(self, block: Any) -> ScoreBias:
        attn, coords = block.attn, block.attn.relative_coordinates_log
        index = get_relative_position_index(*attn.window_size)
        if not coords.is_meta:
            index = index.to(coords.device)
        # timm asks its MLP for every query and key; here once for all of them that are as far apart.
        pairs = torch.arange(index.numel(), device=index.device)
        pairs = index.new_empty(int(index.max()) + 1).scatter(0, index.flatten(), pairs).to(coords.device)
        trains = any(parameter.requires_grad for parameter in attn.meta_mlp.parameters())
        return ScoreBias(partial(_computed_cr, attn, pairs), index, trains, _mask(block))

    def dress(self, compact: CompactBlock, block: Any) -> CompactBlock:
        dressed: Any = super().dress(compact, block)
        dressed.norm3 = copy.deepcopy(block.norm3)
        return compact

    def freeze_block(self, frozen: Any, block: Any) -> None:
        super().freeze_block(frozen, block)
        frozen.norm3 = copy.deepcopy(block.norm3)

    def plain_block(self, block: Any) -> nn.Module:
        sizes = {"feat_size": block.grid, "window_size": block.window_size, "shift_size": block.shift_size}
        plain: Any = _plain(unfilled(SwinTransformerV2CrBlock, dim=2, num_heads=1, **sizes), block)
        plain.norm3 = block.norm3
        return cast(nn.Module, plain)

    def stream_places(self, model: Any) -> list[nn.Module]:
        blocks = self.blocks(model)
        return [*blocks, blocks[-1].norm3]

    def embed(self, model: Any, images: Tensor) -> Tensor:
        tokens: Tensor = model.patch_embed(images)
        return tokens.flatten(2).mT

    def head_reads(self, model: Any, x: Tensor) -> Tensor:
        normed: Tensor = self.blocks(model)[-1].norm3(x)
        return normed.mT.unflatten(2, model.stages[-1].feat_size)

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        """Return (blocks, tokens, features) of the residual stream; of tokens and features those of the last stage."""
        return len(self.blocks(model)), math.prod(model.stages[-1].feat_size), model.num_features

    def attended(self, model: Any, height: int, width: int) -> list[tuple[int, int]]:
        return [
            (math.prod(stage.feat_size), math.prod(block.window_size))
            for stage in model.stages
            for block in stage.blocks
        ]

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        channels = model.patch_embed.proj.in_channels
        parts: list[tuple[nn.Module, tuple[int, ...]]] = [(model.patch_embed, (1, channels, height, width))]
        for before, stage in pairwise(model.stages):
            features = stage.downsample.reduction.in_features // 4
            parts.append((stage.downsample, (1, *before.feat_size, features)))
        return [*parts, (model.head, (1, model.num_features, *model.stages[-1].feat_size))]

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        return self.described(model, self.described_sizes(model, [len(stage.blocks) for stage in model.stages]))


register(TimmSwinV2())
register(TimmSwinV2Cr())


def _merged(downsample: nn.Module, grid: tuple[int, int], x: Tensor) -> Tensor:
    """Return what the first block of a stage reads [B, N, D], for what the last one of the stage before gave."""
    tokens: Tensor = downsample(x.unflatten(1, grid))
    return tokens.flatten(1, 2)


def _normed(norm: nn.Module, then: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    """Return what a block reads behind a norm of the residual stream, and what may be behind that."""
    normed: Tensor = norm(x)
    return normed if then is None else then(normed)


def _computed(attn: CosineAttention) -> Tensor:
    """Return the table that the MLP of positions of a Swin v2 attention gives."""
    return 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).flatten(0, 2))


def _computed_cr(attn: WindowMultiHeadAttention, pairs: Tensor) -> Tensor:
    """Return the table of another one, whose MLP sees what stands for these pairs of a query and a key."""
    mlp = attn.meta_mlp
    # Step by step, because a call in training would drop some of its neurons.
    table: Tensor = mlp.fc2(mlp.act(mlp.fc1(attn.relative_coordinates_log[pairs])))
    return table


def _mask(block: Any) -> Tensor | None:
    """Return what keeps tokens of a shifted window apart, [windows, n, n]; real where the block is on meta."""
    mask: Tensor | None = block.attn_mask
    if mask is not None and mask.is_meta:
        mask = block.get_attn_mask(device=torch.device("cpu"), dtype=mask.dtype)
    return mask


def _plain(plain: Any, block: PrunedSwinBlock) -> nn.Module:
    """Fill a block of timm's with the parts of a compact one."""
    plain.dim, plain.attn_mask = block.attn.dim, None  # its attention has the mask
    plain.attn, plain.mlp = PlainWindowAttention(block.attn), plain_mlp(block.mlp)
    let_read(plain.attn, plain.mlp, block)
    plain.norm1, plain.norm2 = block.norm1, block.norm2
    plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
    return cast(nn.Module, plain.train(block.training))
