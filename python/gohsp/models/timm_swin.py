# SPDX-License-Identifier: Apache-2.0
"""timm's SwinTransformer: stages of growing width, whose blocks attend within windows that are shifted in every second.

Windows are an order of the tokens: shift and partition are one read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, cast

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import (
    SwinTransformer,
    SwinTransformerBlock,
    WindowAttention,
    get_relative_position_index,
)
from torch import Tensor, nn

from gohsp.files import check_keys, shown
from gohsp.layers import (
    PrunedAttention,
    RaggedAttention,
    SelectColumns,
    plain_linear,
)
from gohsp.models.base import (
    MAX_DEPTH,
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
from gohsp.models.timm_parts import open_attention, open_mlp, placed, plain_mlp, then_select, unfilled, why_half_blocks
from gohsp.models.timm_stages import Place, TimmStages, places_in
from gohsp.models.timm_windows import FrozenWindowBlock, InWindows, PrunedWindowBlock, places_in_windows


class _InOrder(InWindows):
    """What compact and frozen blocks have in common: the order of their tokens.

    Attributes:
        order, inverse: int64 [N], which token comes where in the windows, and the way back.
        windows: How many there are in an image.
        grid: (height, width) of the map of tokens.
    """

    order: Tensor
    inverse: Tensor
    windows: int
    grid: tuple[int, int]

    def split(self, x: Tensor) -> Tensor:
        if tuple(x.shape[1:3]) != self.grid:
            raise ValueError(f"x: wanted a map of {self.grid} tokens, which the windows are for; got {list(x.shape)}")
        return x.flatten(1, 2).index_select(1, self.order).unflatten(1, (self.windows, -1)).flatten(0, 1)

    def join(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return x.unflatten(0, (-1, self.windows)).flatten(1, 2).index_select(1, self.inverse).unflatten(1, self.grid)


class PrunedSwinBlock(_InOrder, PrunedWindowBlock):
    """Block with compact parameters, called like timm's SwinTransformerBlock.

    Attributes:
        window_size, shift_size: (height, width) each, as timm's block has them.
    """

    window_size: tuple[int, int]
    shift_size: tuple[int, int]


class FrozenSwinBlock(_InOrder, FrozenWindowBlock):
    """Packed block, called like timm's SwinTransformerBlock."""


class PlainWindowAttention(RaggedAttention):
    """Attention of heads of any width in plain PyTorch, called like timm's WindowAttention; the mask is its own."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class PrunedSwinTransformer(OfOneSize, CompressedModel, SwinTransformer):
    """A timm SwinTransformer whose blocks are compact. Made by :func:`gohsp.compress`."""


class TimmSwin(TimmStages):
    """Adapter for timm's SwinTransformer."""

    wanted = "a timm SwinTransformer (not a subclass)"
    dense: ClassVar[type[nn.Module]] = SwinTransformer
    compressed = PrunedSwinTransformer
    frozen_block: ClassVar[type[FrozenSwinBlock]] = FrozenSwinBlock
    compact_block: ClassVar[type[PrunedSwinBlock]] = PrunedSwinBlock
    block: ClassVar[type[nn.Module]] = SwinTransformerBlock
    attention: ClassVar[type[nn.Module]] = WindowAttention
    arguments = (
        *(name for name in COMMON_ARGUMENTS if name not in ("depth", "init_values")),
        *("depths", "head_dim", "window_size", "always_partition"),
    )

    def stages(self, model: Any) -> list[list[Place]]:
        return [places_in(stage.blocks) for stage in model.layers]

    def between(self, model: Any, stage: int) -> Callable[[Tensor], Tensor] | None:
        own = model.layers[stage]
        return None if isinstance(own.downsample, nn.Identity) else partial(_merged, own)

    def why_unsupported(self, block: Any) -> str | None:
        if block.dynamic_mask:
            return "windows for images of any size; wanted strict_img_size"
        if any(side % window for side, window in zip(self.grid(block), block.window_size, strict=True)):
            return f"windows of {tuple(block.window_size)} do not divide its {self.grid(block)} tokens"
        if type(block.attn) is not self.attention:
            return f"attn is {type(block.attn).__name__}; wanted timm's {self.attention.__name__}"
        return why_half_blocks(block)

    def grid(self, block: Any) -> tuple[int, int]:
        """Return (height, width) of the map of tokens that a dense block reads."""
        height, width = block.input_resolution
        return height, width

    def order(self, block: Any) -> Tensor:
        """Return the tokens of each window of a dense block, int64 [windows, n], shifted as the block shifts them."""
        return places_in_windows(self.grid(block), block.window_size, block.shift_size)

    def opened(self, block: Any, model: Any | None, stage: int) -> OpenBlock:
        attn = block.attn
        read = Projection(attn.qkv)
        size = BlockGeometry(
            dim=read.in_features,
            num_heads=attn.num_heads,
            head_dim=read.out_features // 3 // attn.num_heads,
            hidden=block.mlp.fc2.in_features,
        )
        more: dict[str, Any] = {"bias": _bias(block), "windows": Windows(self.order(block).to(attn.qkv.weight.device))}
        attention = open_attention(block, read, Projection(attn.proj), nn.Identity(), size, **more)
        return OpenBlock(block, attention, open_mlp(block, nn.Identity(), size))

    def plain_block(self, block: Any) -> nn.Module:
        return _plain_block(block)

    def freeze_block(self, frozen: Any, block: Any) -> None:
        frozen.__class__ = self.frozen_block
        _put_in_order(frozen, block.order.view(block.windows, -1), block.grid)

    def classifier(self, model: Any) -> tuple[Any, str]:
        return model.head, "fc"

    def dress(self, compact: CompactBlock, block: Any) -> CompactBlock:
        dressed: Any = compact
        dressed.__class__ = self.compact_block
        dressed.window_size, dressed.shift_size = tuple(block.window_size), tuple(block.shift_size)
        _put_in_order(dressed, self.order(block), self.grid(block))
        return compact

    def embed(self, model: Any, images: Tensor) -> Tensor:
        tokens: Tensor = model.patch_embed(images)
        return tokens.flatten(1, 2)

    def features(self, model: Any, x: Tensor) -> Tensor:
        pooled: Tensor = model.forward_head(self.head_reads(model, x), pre_logits=True)
        return pooled if pooled.dim() == 2 else pooled.flatten(1, -2)

    def head_reads(self, model: Any, x: Tensor) -> Tensor:
        """Return the map of features that the head reads, for the residual stream [B, N, D] behind the last block."""
        normed: Tensor = model.norm(x.unflatten(1, model.layers[-1].output_resolution))
        return normed

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        if model.num_classes == 0:
            return None
        logits: Tensor = model.forward_head(self.head_reads(model, x))
        return logits if logits.dim() == 2 else None

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        """Return (blocks, tokens, features) of the residual stream; of tokens and features those of the last stage."""
        return len(self.blocks(model)), math.prod(model.layers[-1].output_resolution), model.num_features

    def tokens(self, model: Any, height: int, width: int) -> int:
        embed: PatchEmbed = model.patch_embed
        if embed.img_size is None or (height, width) != tuple(embed.img_size):
            raise ValueError(f"wanted {embed.img_size}, which the windows are made for, got {(height, width)}")
        return int(embed.num_patches)

    def attended(self, model: Any, height: int, width: int) -> list[tuple[int, int]]:
        return [
            (math.prod(stage.output_resolution), math.prod(block.window_size))
            for stage in model.layers
            for block in stage.blocks
        ]

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        channels = model.patch_embed.proj.in_channels
        parts: list[tuple[nn.Module, tuple[int, ...]]] = [(model.patch_embed, (1, channels, height, width))]
        parts += [
            (stage.downsample, (1, *stage.input_resolution, stage.dim))
            for stage in model.layers
            if not isinstance(stage.downsample, nn.Identity)
        ]
        return [*parts, (model.head, (1, *model.layers[-1].output_resolution, model.num_features))]

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        return self.described(model, self.described_sizes(model, [len(stage.blocks) for stage in model.layers]))

    def described_sizes(self, model: Any, depths: list[int]) -> dict[str, Any]:
        """Return the arguments that the live model tells better than those that it was made with."""
        return {
            "num_classes": model.num_classes,
            "global_pool": model.head.global_pool.pool_type,
            "img_size": list(model.patch_embed.img_size),
            "in_chans": model.patch_embed.proj.in_channels,
            "depths": depths,
        }

    def check_description(self, description: Mapping[str, Any], geometry: Geometry) -> None:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        depths = self.plain(description["arguments"]).get("depths")
        listed = depths if isinstance(depths, list) else []
        whole = all(type(depth) is int and 0 < depth <= MAX_DEPTH for depth in listed)
        if not whole or sum(listed) != geometry.depth:
            raise ValueError(f"mask: it is made for {geometry}, but plan.model.arguments.depths is {shown(depths)}")


register(TimmSwin())


def _merged(stage: Any, x: Tensor) -> Tensor:
    """Return what the first block of a stage reads [B, N, D], for what the last one of the stage before gave."""
    tokens: Tensor = stage.downsample(x.unflatten(1, stage.input_resolution))
    return tokens.flatten(1, 2)


def _put_in_order(block: Any, order: Tensor, grid: Sequence[int]) -> None:
    """Tell a compact or frozen block which tokens [windows, n] stand together in a map of so many."""
    block.windows, block.grid = len(order), tuple(grid)
    block.register_buffer("order", order.flatten(), persistent=False)
    block.register_buffer("inverse", order.flatten().argsort(), persistent=False)


def _bias(block: Any) -> ScoreBias:
    """Return what the attention of a block adds to its scores; no file holds index and mask."""
    attn, mask = block.attn, block.attn_mask
    table, index = attn.relative_position_bias_table, attn.relative_position_index
    if index.is_meta:
        index = get_relative_position_index(*attn.window_size)
        mask = block.get_attn_mask(device=torch.device("cpu"), dtype=table.dtype)
    return ScoreBias(partial(getattr, attn, "relative_position_bias_table"), index, table.requires_grad, mask)


def _plain_block(block: PrunedSwinBlock) -> nn.Module:
    attn, mlp = block.attn, block.mlp
    bias: Any = attn.position_bias
    sizes = {"input_resolution": block.grid, "window_size": block.window_size, "shift_size": block.shift_size}
    plain = unfilled(SwinTransformerBlock, dim=2, num_heads=1, **sizes)
    plain.dim, plain.attn_mask = attn.dim, bias.mask
    plain.norm1, plain.attn = block.norm1, _plain_attention(attn, block.window_size)
    plain.norm2, plain.mlp = then_select(block.norm2, mlp.in_cols), plain_mlp(mlp)
    plain.mlp.fc2 = placed(mlp.fc2, mlp.out_cols, mlp.dim)
    plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
    return cast(nn.Module, plain.train(block.training))


def _plain_attention(attn: PrunedAttention, window_size: tuple[int, int]) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    whole = len(widths) == 1 and 0 not in widths and math.isclose(attn.scale, min(widths) ** -0.5)
    bias: Any = attn.position_bias
    plain: Any = PlainWindowAttention(attn)
    if whole:
        plain = unfilled(WindowAttention, dim=2, num_heads=1, window_size=window_size)
        plain.num_heads, plain.scale = len(attn.heads), attn.scale
        plain.relative_position_bias_table = bias.table
        plain.relative_position_index = bias.index
        plain.attn_drop, plain.proj_drop = attn.attn_drop, attn.proj_drop
    qkv = plain_linear(attn.qkv)
    # timm's block takes the number of features from what its norm gives.
    plain.qkv = qkv if attn.in_cols is None else nn.Sequential(SelectColumns(attn.in_cols), qkv)
    plain.proj = placed(attn.proj, attn.out_cols, attn.dim)
    return cast(nn.Module, plain)
