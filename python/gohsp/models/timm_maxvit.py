# SPDX-License-Identifier: Apache-2.0
"""timm's MaxxVit where it attends by partitions (MaxViT, MaxxViT): in each block a convolution, then attention within
windows, then attention along a grid.

What pruning calls a block is one such partition with its MLP. Windows and grids are both an order of the tokens. The
convolutions stand between them as what merges patches does between Swin's stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, cast

from timm.models.maxxvit import (
    AttentionCl,
    MaxxVit,
    MaxxVitBlock,
    MaxxVitConvCfg,
    MaxxVitTransformerCfg,
    ParallelMaxxVitBlock,
    PartitionAttentionCl,
    grid_partition,
    grid_reverse,
    window_partition,
    window_reverse,
)
from torch import Tensor, nn

from gohsp.files import check_keys, shown
from gohsp.layers import PrunedAttention, plain_linear
from gohsp.models.base import (
    MAX_DEPTH,
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    Geometry,
    OpenBlock,
    Projection,
    Windows,
)
from gohsp.models.registry import register
from gohsp.models.timm_named import OfOneSize
from gohsp.models.timm_parts import (
    HeadByHead,
    open_attention,
    open_mlp,
    placed,
    plain_mlp,
    plain_scale,
    then_select,
    unfilled,
    why_half_blocks,
)
from gohsp.models.timm_positions import bias_of, plain_positions, why_positions
from gohsp.models.timm_stages import Place, TimmStages, places_in
from gohsp.models.timm_windows import (
    FrozenWindowBlock,
    InWindows,
    PlainMapAttention,
    PrunedWindowBlock,
    places_in_windows,
)


class _InPartitions(InWindows):
    """What compact and frozen blocks have in common: how maps of tokens [B, height, width, D] are divided.

    Attributes:
        partition_block: Whether neighbours attend to each other, or tokens that are as far apart as a grid's are.
        partition_size: (height, width) of a window, or of a grid.
    """

    partition_block: bool
    partition_size: tuple[int, int]

    def split(self, x: Tensor) -> Tensor:
        divided: Tensor = (window_partition if self.partition_block else grid_partition)(x, list(self.partition_size))
        return divided.flatten(1, 2)

    def join(self, x: Tensor, size: Sequence[int]) -> Tensor:
        divided = x.unflatten(1, self.partition_size)
        joined: Tensor = (window_reverse if self.partition_block else grid_reverse)(
            divided, list(self.partition_size), list(size)
        )
        return joined


class PrunedPartitionBlock(_InPartitions, PrunedWindowBlock):
    """Block with compact parameters, called like timm's PartitionAttentionCl."""


class FrozenPartitionBlock(_InPartitions, FrozenWindowBlock):
    """Packed block, called like timm's PartitionAttentionCl."""


class PrunedMaxxVit(OfOneSize, CompressedModel, MaxxVit):
    """A timm MaxxVit whose partitions are compact blocks. Made by :func:`gohsp.compress`."""


class TimmMaxVit(TimmStages):
    """Adapter for timm's MaxxVit.

    Models whose partitions lie side by side are refused; CoAtNet, which is of the same class, is none of its own.
    """

    wanted = "a timm MaxxVit (not a subclass)"
    dense, compressed, frozen_block = MaxxVit, PrunedMaxxVit, FrozenPartitionBlock
    block = PartitionAttentionCl
    arguments = (
        *("img_size", "in_chans", "num_classes", "global_pool", "drop_rate", "drop_path_rate"),
        *("embed_dim", "depths", "stem_width", "stem_bias", "head_hidden_size"),
        *(f"transformer_{field.name}" for field in fields(MaxxVitTransformerCfg)),
        *(f"conv_{field.name}" for field in fields(MaxxVitConvCfg)),
    )

    def claims(self, model: nn.Module) -> bool:
        """Return whether a model is a MaxxVit that attends by partitions: CoAtNet is of the same class."""
        kinds = MaxxVitBlock, ParallelMaxxVitBlock
        return isinstance(model, MaxxVit) and any(isinstance(block, kinds) for block in _blocks(model))

    def stages(self, model: Any) -> list[list[Place]]:
        """Return the places of the partitions behind each convolution; what is no block of these is a place itself."""
        return [_partitions(place) for stage in model.stages for place in places_in(stage.blocks)]

    def between(self, model: Any, stage: int) -> Callable[[Tensor], Tensor] | None:
        if stage == 0:
            return None
        return partial(_convolved, _blocks(model)[stage].conv, _maps(model)[stage - 1])

    def why_unsupported(self, block: Any) -> str | None:
        if type(block.attn) is not AttentionCl:
            return f"attn is {type(block.attn).__name__}; wanted timm's AttentionCl"
        return why_positions(block.attn.rel_pos) or why_half_blocks(block)

    def why_not_there(self, block: Any, model: Any, stage: int) -> str | None:
        size, kind = _maps(model)[stage], "windows" if block.partition_block else "grids"
        if any(side % part for side, part in zip(size, block.partition_size, strict=True)):
            return f"{kind} of {tuple(block.partition_size)} do not divide its {size} tokens"
        return None

    def opened(self, block: Any, model: Any | None, stage: int) -> OpenBlock:
        attn = block.attn
        size = BlockGeometry(
            dim=attn.qkv.in_features,
            num_heads=attn.num_heads,
            head_dim=attn.dim_head,
            hidden=block.mlp.fc2.in_features,
        )
        read = HeadByHead(attn.qkv, attn.num_heads) if attn.head_first else Projection(attn.qkv)
        windows = None if model is None else Windows(_order(block, _maps(model)[stage]).to(attn.qkv.weight.device))
        more: dict[str, Any] = {"bias": bias_of(attn.rel_pos), "windows": windows}
        attention = open_attention(block, read, Projection(attn.proj), block.ls1, size, **more)
        return OpenBlock(block, attention, open_mlp(block, block.ls2, size))

    def dress(self, compact: CompactBlock, block: Any) -> CompactBlock:
        compact.__class__ = PrunedPartitionBlock
        _divide_alike(compact, block)
        return compact

    def plain_block(self, block: Any) -> nn.Module:
        attn, mlp = block.attn, block.mlp
        bare = MaxxVitTransformerCfg(dim_head=1, rel_pos_type="", window_size=(1, 1))
        plain = unfilled(PartitionAttentionCl, dim=2, cfg=bare)
        _divide_alike(plain, block)
        plain.norm1, plain.norm2 = then_select(block.norm1, attn.in_cols), then_select(block.norm2, mlp.in_cols)
        plain.attn, plain.mlp = _plain_attention(attn, block.partition_size), plain_mlp(mlp)
        plain.mlp.fc2 = placed(mlp.fc2, mlp.out_cols, mlp.dim)
        plain.ls1, plain.ls2 = plain_scale(block.ls1), plain_scale(block.ls2)
        plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
        return cast(nn.Module, plain.train(block.training))

    def freeze_block(self, frozen: Any, block: Any) -> None:
        frozen.__class__ = FrozenPartitionBlock
        _divide_alike(frozen, block)

    def classifier(self, model: Any) -> tuple[Any, str]:
        return model.head, "fc"

    def embed(self, model: Any, images: Tensor) -> Tensor:
        self.tokens(model, *images.shape[-2:])
        tokens: Tensor = _blocks(model)[0].conv(model.stem(images))
        return tokens.flatten(2).mT

    def features(self, model: Any, x: Tensor) -> Tensor:
        pooled: Tensor = model.forward_head(_map_behind(model, x), pre_logits=True)
        return pooled if pooled.dim() == 2 else pooled.flatten(2).mT

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        if model.num_classes == 0:
            return None
        logits: Tensor = model.forward_head(_map_behind(model, x))
        return logits if logits.dim() == 2 else None

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        """Return (partitions, tokens, features) of the residual stream; of the last two those of the last stage."""
        return len(self.blocks(model)), math.prod(_maps(model)[-1]), model.num_features

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        return model.in_chans, *model.img_size

    def tokens(self, model: Any, height: int, width: int) -> int:
        if (height, width) != tuple(model.img_size):
            raise ValueError(f"wanted {tuple(model.img_size)}, which the windows are made for, got {(height, width)}")
        return math.prod(_maps(model)[0])

    def attended(self, model: Any, height: int, width: int) -> list[tuple[int, int]]:
        return [
            (math.prod(size), math.prod(place.block.partition_size))
            for stage, size in zip(self.stages(model), _maps(model), strict=True)
            for place in stage
        ]

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        parts: list[tuple[nn.Module, tuple[int, ...]]] = [(model.stem, (1, model.in_chans, height, width))]
        channels, sizes = model.stem.out_chs, [(_halved(height), _halved(width)), *_maps(model)]
        for stage, told in zip(model.stages, model.feature_info[1:], strict=True):
            for block in stage.blocks:
                parts.append((block.conv, (1, channels, *sizes.pop(0))))
                channels = told["num_chs"]
        return [*parts, (model.head, (1, channels, *sizes[0]))]

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        own = {
            "num_classes": model.num_classes,
            "global_pool": model.global_pool,
            "img_size": list(model.img_size),
            "in_chans": model.in_chans,
            "depths": [len(stage.blocks) for stage in model.stages],
        }
        return self.described(model, own)

    def check_description(self, description: Mapping[str, Any], geometry: Geometry) -> None:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        depths = self.plain(description["arguments"]).get("depths")
        listed = depths if isinstance(depths, list) else []
        whole = all(type(depth) is int and 0 < depth <= MAX_DEPTH for depth in listed)
        # A grid behind each convolution, and of most models windows in front of it.
        if not whole or geometry.depth not in (sum(listed), 2 * sum(listed)):
            raise ValueError(f"mask: it is made for {geometry}, but plan.model.arguments.depths is {shown(depths)}")

    def patches(self, model: Any) -> int:
        return math.prod(_halved(side) for side in model.img_size)


register(TimmMaxVit())


def _blocks(model: Any) -> list[Any]:
    """Return what holds a convolution and the partitions behind it, in the order of the data."""
    return [block for stage in model.stages for block in stage.blocks]


def _partitions(place: Place) -> list[Place]:
    if type(place.block) is not MaxxVitBlock:
        return [place]
    names = [name for name in ("attn_block", "attn_grid") if getattr(place.block, name) is not None]
    return [Place(place.block, name) for name in names]


def _halved(side: int) -> int:
    """Return the side of a map that a convolution or a pooling of stride 2 has gone over."""
    return (side + 1) // 2


def _maps(model: Any) -> list[tuple[int, int]]:
    """Return (height, width) of the map of tokens behind each convolution."""
    height, width = map(_halved, model.img_size)  # behind the stem
    sizes = []
    for stage in model.stages:
        height, width = _halved(height), _halved(width)
        sizes += [(height, width)] * len(stage.blocks)
    return sizes


def _order(block: Any, size: tuple[int, int]) -> Tensor:
    """Return the tokens that attend to each other, int64 [windows, n], in a map of so many."""
    if block.partition_block:
        return places_in_windows(size, block.partition_size)
    # Tokens of a grid are the ones at one place in windows of which there are as many as a grid has tokens.
    height, width = (side // part for side, part in zip(size, block.partition_size, strict=True))
    return places_in_windows(size, (height, width)).T.contiguous()


def _divide_alike(block: Any, other: Any) -> None:
    """Tell a block to divide maps as another one does."""
    block.partition_block, block.partition_size = other.partition_block, tuple(other.partition_size)


def _convolved(conv: nn.Module, size: tuple[int, int], x: Tensor) -> Tensor:
    """Return what the first partition behind a convolution reads [B, N, D], for what the last one in front gave.

    Args:
        conv: The convolution, of maps [B, D, height, width].
        size: (height, width) of the map in front of it.
        x: [B, N, D].
    """
    found: Tensor = conv(x.mT.unflatten(2, size))
    return found.flatten(2).mT


def _map_behind(model: Any, x: Tensor) -> Tensor:
    """Return what the head reads [B, D, height, width], for the residual stream behind the last partition."""
    normed: Tensor = model.norm(x.mT.unflatten(2, _maps(model)[-1]))
    return normed


def _plain_attention(attn: PrunedAttention, partition_size: tuple[int, int]) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    plain: Any = PlainMapAttention(attn)
    if len(widths) == 1 and 0 not in widths and math.isclose(attn.scale, min(widths) ** -0.5):
        plain = unfilled(AttentionCl, dim=2, dim_head=1, head_first=False)
        plain.num_heads, plain.dim_head, plain.scale = len(attn.heads), min(widths), attn.scale
        plain.rel_pos = plain_positions(attn, partition_size)
        plain.qkv, plain.attn_drop, plain.proj_drop = plain_linear(attn.qkv), attn.attn_drop, attn.proj_drop
    plain.proj = placed(attn.proj, attn.out_cols, attn.dim)
    return cast(nn.Module, plain)
