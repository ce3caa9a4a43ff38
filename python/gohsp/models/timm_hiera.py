# SPDX-License-Identifier: Apache-2.0
"""timm's Hiera: tokens in the order of mask units, which are the windows of the first stages.

Blocks that pool their queries or change the width stay as they are, between two runs of blocks that may be pruned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import Tensor, nn

from gohsp.layers import PrunedAttention, RaggedAttention, plain_linear
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
from gohsp.models.timm_windows import FrozenWindowBlock, InWindows, PrunedWindowBlock


class _InUnits(InWindows):
    """What has its tokens [B, N, D] in the order of mask units: the first of each unit, then the second of each.

    Attributes:
        unit: Tokens of a unit that attend to each other; 0 where all of an image do.
    """

    unit: int

    def split(self, x: Tensor) -> Tensor:
        return x if not self.unit else x.unflatten(1, (self.unit, -1)).transpose(1, 2).flatten(0, 1)

    def join(self, x: Tensor, size: Sequence[int]) -> Tensor:
        return x if not self.unit else x.unflatten(0, (-1, size[0] // self.unit)).transpose(1, 2).flatten(1, 2)


class PrunedHieraBlock(_InUnits, PrunedWindowBlock):
    """Block with compact parameters, called like timm's HieraBlock."""


class FrozenHieraBlock(_InUnits, FrozenWindowBlock):
    """Packed block, called like timm's HieraBlock."""


class PlainUnitAttention(_InUnits, RaggedAttention):
    """Attention of heads of any width in plain PyTorch, called like timm's MaskUnitAttention."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the attention output [B, N, D] for x of that shape."""
        return self.join(super().forward(self.split(x)), x.shape[1:-1])


class PrunedHiera(CompressedModel, Hiera):
    """A timm Hiera whose blocks are compact, but for those that stay. Made by :func:`gohsp.compress`."""


class TimmHiera(TimmRuns):
    """Adapter for timm's Hiera of images.

    The first block of each stage but the first pools its queries and changes the width: it stays as it is. Masks
    do not tell of it; their summary does. Masks of units may be given to a compressed model as to the dense one.
    """

    wanted = "a timm Hiera (not a subclass)"
    dense, compressed, frozen_block = Hiera, PrunedHiera, FrozenHieraBlock
    block = HieraBlock
    arguments = (
        *("img_size", "in_chans", "embed_dim", "num_heads", "num_classes", "global_pool", "stages", "q_pool"),
        *("q_stride", "mask_unit_size", "mask_unit_attn", "use_expand_proj", "dim_mul", "head_mul", "patch_kernel"),
        *("patch_stride", "patch_padding", "mlp_ratio", "drop_path_rate", "init_values", "fix_init", "weight_init"),
        *("norm_layer", "drop_rate", "patch_drop_rate", "head_init_scale", "sep_pos_embed", "abs_win_pos_embed"),
        "global_pos_size",
    )

    def why_it_stays(self, block: Any) -> str | None:
        return _why_it_stays(block) if isinstance(block, HieraBlock) else None

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if isinstance(model, Hiera) and len(model.tokens_spatial_shape) != 2:
            raise ValueError(f"model: wanted one of images, got one of {len(model.tokens_spatial_shape)} dimensions")
        return super().open_blocks(model)

    def between(self, model: Any, stage: int) -> Callable[[Tensor], Tensor] | None:
        staying = self.in_front(model, stage)
        return partial(_through, staying) if staying and stage else None

    def why_unsupported(self, block: Any) -> str | None:
        if type(block.attn) is not MaskUnitAttention:
            return f"attn is {type(block.attn).__name__}; wanted timm's MaskUnitAttention"
        return _why_it_stays(block) or why_half_blocks(block)

    def opened(self, block: Any, model: Any | None, stage: int) -> OpenBlock:
        attn = block.attn
        size = BlockGeometry(
            dim=attn.qkv.in_features,
            num_heads=attn.heads,
            head_dim=attn.head_dim,
            hidden=block.mlp.fc2.in_features,
        )
        windows = None
        if model is not None and attn.use_mask_unit_attn:
            tokens = torch.arange(self._tokens(model)[stage], device="cpu").view(attn.window_size, -1)
            windows = Windows(tokens.T.contiguous().to(attn.qkv.weight.device))
        attention = open_attention(block, Projection(attn.qkv), Projection(attn.proj), block.ls1, size, windows=windows)
        return OpenBlock(block, attention, open_mlp(block, block.ls2, size))

    def dress(self, compact: CompactBlock, block: Any) -> CompactBlock:
        dressed: Any = compact
        dressed.__class__ = PrunedHieraBlock
        dressed.unit = block.attn.window_size if block.attn.use_mask_unit_attn else 0
        return compact

    def plain_block(self, block: Any) -> nn.Module:
        attn, mlp = block.attn, block.mlp
        plain = unfilled(HieraBlock, dim=2, dim_out=2, heads=1)
        plain.dim = plain.dim_out = attn.dim
        plain.norm1, plain.norm2 = then_select(block.norm1, attn.in_cols), then_select(block.norm2, mlp.in_cols)
        plain.attn, plain.mlp = _plain_attention(attn, block.unit), plain_mlp(mlp)
        plain.mlp.fc2 = placed(mlp.fc2, mlp.out_cols, mlp.dim)
        plain.ls1, plain.ls2 = plain_scale(block.ls1), plain_scale(block.ls2)
        plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
        return cast(nn.Module, plain.train(block.training))

    def freeze_block(self, frozen: Any, block: Any) -> None:
        frozen.__class__, frozen.unit = FrozenHieraBlock, block.unit

    def classifier(self, model: Any) -> tuple[Any, str]:
        return model.head, "fc"

    def embed(self, model: Any, images: Tensor) -> Tensor:
        x = model.unroll(model._pos_embed(model.patch_embed(images)))
        return _through(self.in_front(model, 0), x)

    def features(self, model: Any, x: Tensor) -> Tensor:
        read: Tensor = model.forward_head(_through(self.behind(model), x), pre_logits=True)
        return read

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        if model.num_classes == 0:
            return None
        logits: Tensor = model.forward_head(_through(self.behind(model), x))
        return logits if logits.dim() == 2 else None

    def stream_places(self, model: Any) -> list[nn.Module]:
        """Return the blocks: the norm stands behind the pooling."""
        return self.blocks(model)

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        """Return (blocks, tokens, features) of the residual stream; of the last two those of the last run."""
        width = self.blocks(model)[-1].norm2.weight.numel()
        return len(self.blocks(model)), self._tokens(model)[-1], width

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        height, width = (
            tokens * stride for tokens, stride in zip(model.tokens_spatial_shape, model.patch_stride, strict=True)
        )
        return model.in_chans, height, width

    def tokens(self, model: Any, height: int, width: int) -> int:
        own = self.image_shape(model)[1:]
        if (height, width) != own:
            raise ValueError(f"wanted {own}, which the positions are made for, got {(height, width)}")
        return self._tokens(model)[0]

    def attended(self, model: Any, height: int, width: int) -> list[tuple[int, int]]:
        return [
            (tokens, _unit(place.block) or tokens)
            for run, tokens in zip(self.stages(model), self._tokens(model), strict=True)
            for place in run
        ]

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        parts: list[tuple[nn.Module, tuple[int, ...]]] = [(model.patch_embed, (1, model.in_chans, height, width))]
        tokens = math.prod(model.tokens_spatial_shape)
        for block in filter(self.stays, model.blocks):
            parts.append((block, (1, tokens, block.dim)))
            tokens //= block.attn.q_stride
        return [*parts, (model.head, (1, tokens, model.num_features))]

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        ends = [-1, *model.stage_ends]
        own = {
            "num_classes": model.num_classes,
            "global_pool": model.head.pool_type,
            "img_size": list(self.image_shape(model)[1:]),
            "in_chans": model.in_chans,
            "stages": [end - before for before, end in pairwise(ends)],
        }
        return self.described(model, own)

    def patches(self, model: Any) -> int:
        return math.prod(model.tokens_spatial_shape)

    def _tokens(self, model: Any) -> list[int]:
        """Return how many tokens the blocks of each run see."""
        tokens, found = math.prod(model.tokens_spatial_shape), []
        for stage in range(len(self.stages(model))):
            for block in self.in_front(model, stage):
                tokens //= block.attn.q_stride
            found.append(tokens)
        return found


register(TimmHiera())


def _why_it_stays(block: Any) -> str | None:
    """Return why a block is none that kernels compute, though another one could be, or None if it may be pruned."""
    if block.attn.q_stride > 1:
        return "its queries are pooled"
    return f"it changes the width from {block.dim} to {block.dim_out}" if block.do_expand else None


def _unit(block: Any) -> int:
    """Return the tokens of a unit of a block, dense or compressed; 0 where all tokens attend to each other."""
    if isinstance(block, _InUnits):
        return block.unit
    return int(block.attn.window_size) if block.attn.use_mask_unit_attn else 0


def _through(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Return what some blocks that stay make of tokens, one after another."""
    for block in blocks:
        x = block(x)
    return x


def _plain_attention(attn: PrunedAttention, unit: int) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    plain: Any
    if len(widths) == 1 and 0 not in widths and math.isclose(attn.scale, min(widths) ** -0.5):
        plain = unfilled(MaskUnitAttention, dim=2, dim_out=2, heads=1, window_size=unit, use_mask_unit_attn=unit > 0)
        plain.heads, plain.head_dim, plain.scale = len(attn.heads), min(widths), attn.scale
        plain.dim, plain.dim_out = attn.dim, sum(attn.v_widths)  # by which it puts heads side by side
        plain.qkv = plain_linear(attn.qkv)
    else:
        plain = PlainUnitAttention(attn)
        plain.unit = unit
    plain.proj = placed(attn.proj, attn.out_cols, attn.dim)
    return cast(nn.Module, plain)
