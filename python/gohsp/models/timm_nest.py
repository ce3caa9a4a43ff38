# SPDX-License-Identifier: Apache-2.0
"""timm's Nest: levels of blocks of an image, each block attending within itself, aggregated by convolution in between.

What pruning calls a block is a transformer layer here; blocks of the image are its windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from timm.models.nest import Attention as NestAttention
from timm.models.nest import Nest, TransformerLayer, blockify, deblockify
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gohsp.files import check_keys, cut, shown
from gohsp.layers import PrunedAttention, RaggedAttention, SelectColumns, plain_linear
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
from gohsp.models.timm_parts import open_attention, open_mlp, placed, plain_mlp, then_select, unfilled, why_half_blocks
from gohsp.models.timm_stages import Place, TimmStages, places_in
from gohsp.models.timm_windows import FrozenWindowBlock, InWindows, PrunedWindowBlock


class InterleavedHeads(Projection):
    """A last matrix that reads the first channel of each head, then the second, and so on; seen head after head.

    Args:
        layer: The linear layer. It is what is read and written.
        num_heads: H.
    """

    def __init__(self, layer: nn.Linear, num_heads: int) -> None:
        super().__init__(layer)
        self._order = interleaved(layer.in_features, num_heads)

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.layers[0].weight
        return weight.index_select(1, self._order.to(weight.device))

    def __call__(self, x: Tensor) -> Tensor:
        return self.layers[0](x.index_select(-1, self._order.argsort().to(x.device)))

    @torch.no_grad()
    def write_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().write_(weight.index_select(1, self._order.argsort().to(weight.device)), bias)

    @torch.no_grad()
    def clear_(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        super().clear_(rows, None if columns is None else columns[self._order.argsort().to(columns.device)])

    def columns_by_head(self, weight: Tensor, num_heads: int) -> Tensor:
        return weight.view(len(weight), -1, num_heads).permute(2, 0, 1)

    def watch_inputs(self, function: Callable[[Tensor], Tensor]) -> RemovableHandle:
        order, inverse = self._order, self._order.argsort()
        return super().watch_inputs(lambda x: function(x[..., order.to(x.device)])[..., inverse.to(x.device)])


def interleaved(channels: int, num_heads: int) -> Tensor:
    """Return where the channels of heads, one head after the other, stand among those that take turns: int64 [n]."""
    return torch.arange(channels, device="cpu").view(-1, num_heads).T.flatten()


class _InBlocksOfTheImage(InWindows):
    """What compact and frozen layers have in common: they are called with [B, blocks of the image, tokens, D]."""

    def split(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def join(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return x.unflatten(0, (-1, size[0]))


class PrunedNestLayer(_InBlocksOfTheImage, PrunedWindowBlock):
    """Transformer layer with compact parameters, called like timm's."""


class FrozenNestLayer(_InBlocksOfTheImage, FrozenWindowBlock):
    """Packed transformer layer, called like timm's."""


class PlainNestAttention(RaggedAttention):
    """Attention of heads of any width in plain PyTorch, called like timm's."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])


class PrunedNest(CompressedModel, Nest):
    """A timm Nest whose transformer layers are compact. Made by :func:`gohsp.compress`."""


class TimmNest(TimmStages):
    """Adapter for timm's Nest."""

    wanted = "a timm Nest (not a subclass)"
    dense, compressed, frozen_block = Nest, PrunedNest, FrozenNestLayer
    block = TransformerLayer
    arguments = (
        *("img_size", "in_chans", "patch_size", "num_levels", "embed_dims", "num_heads", "depths", "num_classes"),
        *("mlp_ratio", "qkv_bias", "drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate", "pad_type"),
        "global_pool",
    )

    def stages(self, model: Any) -> list[list[Place]]:
        return [places_in(level.transformer_encoder) for level in model.levels]

    def between(self, model: Any, stage: int) -> Callable[[Tensor], Tensor] | None:
        return None if stage == 0 else partial(_aggregated, model.levels[stage - 1], model.levels[stage])

    def why_unsupported(self, block: Any) -> str | None:
        if type(block.attn) is not NestAttention:
            return f"attn is {type(block.attn).__name__}; wanted timm's Attention of Nest"
        return why_half_blocks(block)

    def opened(self, block: Any, model: Any | None, stage: int) -> OpenBlock:
        attn = block.attn
        size = BlockGeometry(
            dim=attn.qkv.in_features,
            num_heads=attn.num_heads,
            head_dim=attn.proj.in_features // attn.num_heads,
            hidden=block.mlp.fc2.in_features,
        )
        windows = None if model is None else _windows(model.levels[stage])
        write = InterleavedHeads(attn.proj, attn.num_heads)
        attention = open_attention(block, Projection(attn.qkv), write, nn.Identity(), size, windows=windows)
        return OpenBlock(block, attention, open_mlp(block, nn.Identity(), size))

    def dress(self, compact: CompactBlock, block: nn.Module) -> CompactBlock:
        compact.__class__ = PrunedNestLayer
        return compact

    def plain_block(self, block: Any) -> nn.Module:
        attn, mlp = block.attn, block.mlp
        plain = unfilled(TransformerLayer, dim=2, num_heads=1)
        plain.norm1, plain.attn = block.norm1, _plain_attention(attn)
        plain.norm2, plain.mlp = then_select(block.norm2, mlp.in_cols), plain_mlp(mlp)
        plain.mlp.fc2 = placed(mlp.fc2, mlp.out_cols, mlp.dim)
        plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
        return cast(nn.Module, plain.train(block.training))

    def freeze_block(self, frozen: Any, block: Any) -> None:
        frozen.__class__ = FrozenNestLayer

    def embed(self, model: Any, images: Tensor) -> Tensor:
        first = model.levels[0]
        return _entered(first, first.pool(model.patch_embed(images)))

    def features(self, model: Any, x: Tensor) -> Tensor:
        pooled: Tensor = model.forward_head(_map_behind(model, x), pre_logits=True)
        return pooled if pooled.dim() == 2 else pooled.flatten(2).mT

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        if model.num_classes == 0:
            return None
        logits: Tensor = model.forward_head(_map_behind(model, x))
        return logits if logits.dim() == 2 else None

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        """Return (layers, tokens, features) of the residual stream; of tokens and features those of the last level."""
        last = model.levels[-1].pos_embed
        return len(self.blocks(model)), last.shape[1] * last.shape[2], last.shape[3]

    def tokens(self, model: Any, height: int, width: int) -> int:
        own = tuple(model.patch_embed.img_size)
        if (height, width) != own:
            raise ValueError(f"wanted {own}, which the blocks of an image are made for, got {(height, width)}")
        return int(model.num_patches)

    def attended(self, model: Any, height: int, width: int) -> list[tuple[int, int]]:
        shapes = [level.pos_embed.shape for level in model.levels for _ in level.transformer_encoder]
        return [(shape[1] * shape[2], shape[2]) for shape in shapes]

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        channels = model.patch_embed.proj.in_channels
        parts: list[tuple[nn.Module, tuple[int, ...]]] = [(model.patch_embed, (1, channels, height, width))]
        for before, level in zip(model.levels, model.levels[1:], strict=False):
            side = math.isqrt(before.pos_embed.shape[1]) * before.block_size
            parts.append((level.pool, (1, before.pos_embed.shape[3], side, side)))
        return [*parts, (model.head, (1, model.head_hidden_size))]

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        """Return the class of the dense model and the arguments that make it, read from the live model."""
        first, levels = self.blocks(model)[0], model.levels
        pools = [type(level.pool.pool).__name__ for level in levels[1:]]
        arguments = {
            "img_size": model.patch_embed.img_size[0],
            "in_chans": model.patch_embed.proj.in_channels,
            "patch_size": model.patch_size,
            "num_levels": len(levels),
            "embed_dims": [level.pos_embed.shape[3] for level in levels],
            "num_heads": [level.transformer_encoder[0].geometry.num_heads for level in levels],
            "depths": [len(level.transformer_encoder) for level in levels],
            "num_classes": model.num_classes,
            # timm rounds dim * ratio down, at every level; a little more makes that exact.
            "mlp_ratio": (first.geometry.hidden + 0.001) / first.geometry.dim,
            "qkv_bias": first.attn.qkv.bias is not None,
            "drop_rate": model.drop_rate,
            "proj_drop_rate": first.attn.proj_drop.p,
            "attn_drop_rate": first.attn.attn_drop.p,
            "drop_path_rate": getattr(self.blocks(model)[-1].drop_path1, "drop_prob", 0.0),
            "pad_type": "same" if "MaxPool2dSame" in pools else "",
            "global_pool": model.global_pool.pool_type,
        }
        return {"class": "Nest", "arguments": self.plain(arguments)}

    def check_description(self, description: Mapping[str, Any], geometry: Geometry) -> None:
        check_keys(description, ("class", "arguments"), "plan.model")
        depths = self.plain(description["arguments"]).get("depths")
        listed = depths if isinstance(depths, list) else []
        if not all(type(depth) is int and 0 < depth <= MAX_DEPTH for depth in listed) or sum(listed) != geometry.depth:
            raise ValueError(f"mask: it is made for {geometry}, but plan.model.arguments.depths is {shown(depths)}")

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        check_keys(description, ("class", "arguments"), "plan.model")
        arguments = self.plain(description["arguments"])
        try:
            with torch.device("meta"):
                dense: nn.Module = Nest(**arguments)
        except Exception as error:  # timm asserts, divides and indexes with what it is given
            raise ValueError(f"plan.model.arguments: they do not make a Nest: {cut(error)}") from error
        return dense


register(TimmNest())


def _windows(level: Any) -> Windows:
    """Return the tokens of each block of an image, which stand together already."""
    blocks, tokens = level.pos_embed.shape[1:3]
    order = torch.arange(blocks * tokens, device="cpu").view(blocks, tokens)
    return Windows(order.to(level.pos_embed.device))


def _entered(level: Any, x: Tensor) -> Tensor:
    """Return what the first layer of a level reads [B, N, D], for a map [B, D, height, width]."""
    tokens: Tensor = blockify(x.permute(0, 2, 3, 1), level.block_size) + level.pos_embed
    return tokens.flatten(1, 2)


def _left(level: Any, x: Tensor) -> Tensor:
    """Return what the last layer of a level gave [B, N, D], as a map [B, height, width, D]."""
    found: Tensor = deblockify(x.unflatten(1, level.pos_embed.shape[1:3]), level.block_size)
    return found


def _aggregated(before: Any, level: Any, x: Tensor) -> Tensor:
    """Return what the first layer of a level reads, for what the last one of the level before gave."""
    return _entered(level, level.pool(_left(before, x).permute(0, 3, 1, 2)))


def _map_behind(model: Any, x: Tensor) -> Tensor:
    """Return what the head reads [B, D, height, width], for the residual stream behind the last layer."""
    normed: Tensor = model.norm(_left(model.levels[-1], x)).permute(0, 3, 1, 2)
    return normed


def _plain_attention(attn: PrunedAttention) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    whole = len(widths) == 1 and sum(attn.v_widths) == attn.dim and math.isclose(attn.scale, min(widths) ** -0.5)
    plain: Any = PlainNestAttention(attn)
    proj = attn.proj
    if whole:
        plain = unfilled(NestAttention, dim=2, num_heads=1)
        plain.num_heads, plain.scale = len(attn.heads), attn.scale
        plain.attn_drop, plain.proj_drop = attn.attn_drop, attn.proj_drop
        inverse = interleaved(attn.dim, len(attn.heads)).argsort().to(proj.weight.device)
        weight = proj.weight.detach().index_select(1, inverse)
        proj = type(proj)(nn.Parameter(weight, requires_grad=proj.weight.requires_grad), proj.bias)
    qkv = plain_linear(attn.qkv)
    # timm's attention takes its number of channels from what the norm gives.
    plain.qkv = qkv if attn.in_cols is None else nn.Sequential(SelectColumns(attn.in_cols), qkv)
    plain.proj = placed(proj, attn.out_cols, attn.dim)
    return cast(nn.Module, plain)
