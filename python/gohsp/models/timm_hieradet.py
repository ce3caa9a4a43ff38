# SPDX-License-Identifier: Apache-2.0
"""timm's HieraDet, the image encoder of SAM 2: maps of tokens in windows, in some blocks all of them together.

Blocks that pool their queries or change the width stay as they are, between two runs of blocks that may be pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch.nn.functional as F
from timm.models.hieradet_sam2 import (
    HieraDet,
    HieraPatchEmbed,
    MultiScaleAttention,
    MultiScaleBlock,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn

from gohsp.layers import PrunedAttention, plain_linear
from gohsp.models.base import (
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    Geometry,
    OpenBlock,
    Projection,
    Windows,
)
from gohsp.models.registry import register
from gohsp.models.timm_parts import (
    open_attention,
    open_mlp,
    placed,
    plain_mlp,
    plain_scale,
    then_select,
    unfilled,
    why_half_blocks,
)
from gohsp.models.timm_stages import TimmRuns
from gohsp.models.timm_windows import (
    FrozenWindowBlock,
    InWindows,
    PlainMapAttention,
    PrunedWindowBlock,
    places_in_windows,
)


class _InWindows(InWindows):
    """What compact and frozen blocks have in common: how maps of tokens [B, height, width, D] are divided.

    Attributes:
        window_size: (height, width) of a window; zeros where all tokens of a map attend to each other.
    """

    window_size: tuple[int, int]

    def split(self, x: Tensor) -> Tensor:
        if any(self.window_size):
            x = window_partition(x, self.window_size)
        return x.flatten(1, 2)

    def join(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if not any(self.window_size):
            return x.unflatten(1, size)
        joined: Tensor = window_unpartition(x.unflatten(1, self.window_size), self.window_size, (size[0], size[1]))
        return joined

    def beyond(self, size: Sequence[int]) -> list[int]:
        """Return by how many rows and columns windows go beyond a map of so many."""
        return [-side % window if window else 0 for side, window in zip(size, self.window_size, strict=True)]


class PrunedMultiScaleBlock(_InWindows, PrunedWindowBlock):
    """Block with compact parameters, called like timm's MultiScaleBlock."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the block's output [B, height, width, D] for x of that shape.

        Where windows go beyond the map, what timm pads with takes part in attention, behind the norm: modules are
        called one by one.
        """
        height, width = size = x.shape[1:-1]
        rows, columns = self.beyond(size)
        if not rows and not columns:
            return super().forward(x)
        seen = F.pad(self.norm1(x), (0, 0, 0, columns, 0, rows))
        attended = self.join(self.attn(self.split(seen)), seen.shape[1:-1])[:, :height, :width]
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class FrozenMultiScaleBlock(_InWindows, FrozenWindowBlock):
    """Packed block, called like timm's MultiScaleBlock."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the block's output [B, height, width, D] for x of that shape; no gradient flows through it.

        Raises:
            ValueError: Windows do not divide the map.
        """
        if any(self.beyond(x.shape[1:-1])):
            raise ValueError(
                f"x: wanted a map that windows of {self.window_size} divide, because the model is frozen; the model "
                f"that it was made from takes others; got {list(x.shape)}"
            )
        return super().forward(x)


class PrunedHieraDet(CompressedModel, HieraDet):
    """A timm HieraDet whose blocks are compact, but for those that stay. Made by :func:`gohsp.compress`."""


class TimmHieraDet(TimmRuns):
    """Adapter for timm's HieraDet.

    The first block of each stage but the first pools its queries or changes the width: it stays as it is. Masks
    do not tell of it; their summary does. The size of images that pruning and counting are for is what timm recorded
    of the model (``pretrained_cfg["input_size"]``); windows have to divide the maps of that size. A compressed model
    takes other sizes as the dense one does.
    """

    wanted = "a timm HieraDet (not a subclass)"
    dense, compressed, frozen_block = HieraDet, PrunedHieraDet, FrozenMultiScaleBlock
    block = MultiScaleBlock
    arguments = (
        *("in_chans", "num_classes", "global_pool", "embed_dim", "num_heads", "patch_kernel", "patch_stride"),
        *("patch_padding", "q_pool", "q_stride", "stages", "dim_mul", "head_mul", "global_pos_size", "window_spec"),
        *("global_att_blocks", "init_values", "weight_init", "fix_init", "head_init_scale", "drop_rate"),
        *("drop_path_rate", "norm_layer", "act_layer"),
    )

    def why_it_stays(self, block: Any) -> str | None:
        return _why_it_stays(block) if isinstance(block, MultiScaleBlock) else None

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if type(model) is self.dense and type(model.patch_embed) is not HieraPatchEmbed:
            raise ValueError(f"model: wanted timm's HieraPatchEmbed, got {type(model.patch_embed).__name__}")
        return super().open_blocks(model)

    def between(self, model: Any, stage: int) -> Callable[[Tensor], Tensor] | None:
        staying = self.in_front(model, stage)
        return partial(_through, staying, self._maps(model)[stage - 1]) if staying and stage else None

    def why_unsupported(self, block: Any) -> str | None:
        if type(block.attn) is not MultiScaleAttention:
            return f"attn is {type(block.attn).__name__}; wanted timm's MultiScaleAttention"
        return _why_it_stays(block) or why_half_blocks(block)

    def why_not_there(self, block: Any, model: Any, stage: int) -> str | None:
        size = self._maps(model)[stage]
        if any(window and side % window for side, window in zip(size, block.window_size, strict=True)):
            return f"windows of {tuple(block.window_size)} do not divide its {size} tokens"
        return None

    def opened(self, block: Any, model: Any | None, stage: int) -> OpenBlock:
        attn = block.attn
        size = BlockGeometry(
            dim=attn.qkv.in_features,
            num_heads=attn.num_heads,
            head_dim=attn.qkv.out_features // 3 // attn.num_heads,
            hidden=block.mlp.fc2.in_features,
        )
        windows = None
        if model is not None and block.is_windowed:
            order = places_in_windows(self._maps(model)[stage], block.window_size)
            windows = Windows(order.to(attn.qkv.weight.device))
        read, write = Projection(attn.qkv), Projection(attn.proj)
        attention = open_attention(block, read, write, block.ls1, size, windows=windows)
        return OpenBlock(block, attention, open_mlp(block, block.ls2, size))

    def dress(self, compact: CompactBlock, block: Any) -> CompactBlock:
        dressed: Any = compact
        dressed.__class__, dressed.window_size = PrunedMultiScaleBlock, tuple(block.window_size)
        return compact

    def plain_block(self, block: Any) -> nn.Module:
        attn, mlp = block.attn, block.mlp
        plain = unfilled(MultiScaleBlock, dim=2, dim_out=2, num_heads=1, window_size=block.window_size)
        plain.dim = plain.dim_out = attn.dim
        plain.norm1, plain.norm2 = then_select(block.norm1, attn.in_cols), then_select(block.norm2, mlp.in_cols)
        plain.attn, plain.mlp = _plain_attention(attn), plain_mlp(mlp)
        plain.mlp.fc2 = placed(mlp.fc2, mlp.out_cols, mlp.dim)
        plain.ls1, plain.ls2 = plain_scale(block.ls1), plain_scale(block.ls2)
        plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
        return cast(nn.Module, plain.train(block.training))

    def freeze_block(self, frozen: Any, block: Any) -> None:
        frozen.__class__, frozen.window_size = FrozenMultiScaleBlock, block.window_size

    def classifier(self, model: Any) -> tuple[Any, str]:
        return model.head, "fc"

    def embed(self, model: Any, images: Tensor) -> Tensor:
        self.tokens(model, *images.shape[-2:])
        x = model._pos_embed(model.patch_embed(images))
        return _through(self.in_front(model, 0), x.shape[1:-1], x.flatten(1, 2))

    def features(self, model: Any, x: Tensor) -> Tensor:
        pooled: Tensor = model.forward_head(self._map_behind(model, x), pre_logits=True)
        return pooled if pooled.dim() == 2 else pooled.flatten(1, -2)

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        if model.num_classes == 0:
            return None
        logits: Tensor = model.forward_head(self._map_behind(model, x))
        return logits if logits.dim() == 2 else None

    def stream_places(self, model: Any) -> list[nn.Module]:
        """Return the blocks: the norm stands behind the pooling."""
        return self.blocks(model)

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        """Return (blocks, tokens, features) of the residual stream; of the last two those of the last run."""
        blocks = self.blocks(model)
        return len(blocks), math.prod(self._maps(model)[-1]), blocks[-1].norm2.weight.numel()

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        recorded = (getattr(model, "pretrained_cfg", None) or {}).get("input_size")
        if recorded is None:
            raise ValueError("model: wanted a HieraDet made by timm.create_model, which records the size of its images")
        return model.in_chans, *recorded[1:]

    def tokens(self, model: Any, height: int, width: int) -> int:
        own = self.image_shape(model)[1:]
        if (height, width) != own:
            raise ValueError(f"wanted {own}, which timm recorded of the model, got {(height, width)}")
        return math.prod(self._maps(model)[0])

    def attended(self, model: Any, height: int, width: int) -> list[tuple[int, int]]:
        return [
            (math.prod(size), math.prod(place.block.window_size) or math.prod(size))
            for run, size in zip(self.stages(model), self._maps(model), strict=True)
            for place in run
        ]

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        parts: list[tuple[nn.Module, tuple[int, ...]]] = [(model.patch_embed, (1, model.in_chans, height, width))]
        size = self._first_map(model)
        for block in filter(self.stays, model.blocks):
            parts.append((block, (1, *size, block.dim)))
            size = _pooled(block, size)
        return [*parts, (model.head, (1, *size, model.num_features))]

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        own = {
            "num_classes": model.num_classes,
            "global_pool": model.head.pool_type,
            "in_chans": model.in_chans,
            "stages": [end - before for before, end in pairwise((-1, *model.stage_ends))],
        }
        return self.described(model, own)

    def patches(self, model: Any) -> int:
        return math.prod(self._first_map(model))

    def _first_map(self, model: Any) -> tuple[int, int]:
        """Return (height, width) of the map of tokens that the first block sees."""
        conv = model.patch_embed.proj
        _, *sides = self.image_shape(model)
        parts = zip(sides, conv.padding, conv.kernel_size, conv.stride, strict=True)
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side, padding, kernel, stride in parts)
        return height, width

    def _maps(self, model: Any) -> list[tuple[int, int]]:
        """Return (height, width) of the map of tokens that the blocks of each run see."""
        size, found = self._first_map(model), []
        for stage in range(len(self.stages(model))):
            for block in self.in_front(model, stage):
                size = _pooled(block, size)
            found.append(size)
        return found

    def _map_behind(self, model: Any, x: Tensor) -> Tensor:
        """Return what the head reads [B, height, width, D], for the residual stream behind the last run."""
        x = x.unflatten(1, self._maps(model)[-1])
        for block in self.behind(model):
            x = block(x)
        return x


register(TimmHieraDet())


def _why_it_stays(block: Any) -> str | None:
    """Return why a block is none that kernels compute, though another one could be, or None if it may be pruned."""
    if block.q_stride is not None:
        return "its queries are pooled"
    return None if block.dim == block.dim_out else f"it changes the width from {block.dim} to {block.dim_out}"


def _pooled(block: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of what a block that stays makes of a map of so many tokens."""
    rows, columns = block.q_stride or (1, 1)
    return size[0] // rows, size[1] // columns


def _through(blocks: Sequence[nn.Module], size: Sequence[int], x: Tensor) -> Tensor:
    """Return what some blocks that stay make of tokens [B, N, D], one after another.

    Args:
        blocks: They are called with maps.
        size: (height, width) of the map in front of them.
        x: [B, N, D].
    """
    x = x.unflatten(1, size)
    for block in blocks:
        x = block(x)
    return x.flatten(1, 2)


def _plain_attention(attn: PrunedAttention) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    plain: Any = PlainMapAttention(attn)
    if len(widths) == 1 and 0 not in widths and math.isclose(attn.scale, min(widths) ** -0.5):
        plain = unfilled(MultiScaleAttention, dim=2, dim_out=2, num_heads=1)
        plain.num_heads, plain.scale, plain.dim, plain.dim_out = len(attn.heads), attn.scale, attn.dim, attn.dim
        plain.qkv = plain_linear(attn.qkv)
    plain.proj = placed(attn.proj, attn.out_cols, attn.dim)
    return cast(nn.Module, plain)
