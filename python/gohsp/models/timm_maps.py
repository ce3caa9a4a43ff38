# SPDX-License-Identifier: Apache-2.0
"""Blocks of timm's that read maps of tokens, in models that are not taken as a whole.

VOLO, MaxxVit (MaxViT), GlobalContextVit and Twins: all tokens of a map attend to each other, or those of a window, or
those of a grid that is spread over the map.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from timm.models import volo
from timm.models.gcvit import GlobalContextVitBlock, WindowAttentionGlobal
from timm.models.maxxvit import AttentionCl, PartitionAttentionCl
from timm.models.twins import Block as TwinsBlock
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn

from gohsp.layers import PrunedBlock
from gohsp.models.base import BlockFamily, BlockGeometry, CompactBlock, OpenBlock, Projection, ScoreBias
from gohsp.models.refusals import why_altered, why_linear
from gohsp.models.registry import register_blocks
from gohsp.models.timm_parts import open_attention, open_mlp, why_mlp, why_norms
from gohsp.models.timm_positions import bias_of


class HeadByHead(Projection):
    """A linear layer that gives q, k and v of the first head, then of the second; seen as all q, all k and all v.

    Args:
        layer: The linear layer. It is what is read and written.
        num_heads: H.
    """

    def __init__(self, layer: nn.Linear, num_heads: int) -> None:
        super().__init__(layer)
        order = torch.arange(layer.out_features, device="cpu").view(num_heads, 3, -1).transpose(0, 1).flatten()
        self._order, self._inverse = order, order.argsort()

    @property
    def weight(self) -> Tensor:
        return self.layers[0].weight[self._order]

    @property
    def bias(self) -> Tensor | None:
        bias = self.layers[0].bias
        return None if bias is None else bias[self._order]

    def __call__(self, x: Tensor) -> Tensor:
        return self.layers[0](x)[..., self._order]

    @torch.no_grad()
    def write_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().write_(weight[self._inverse], None if bias is None else bias[self._inverse])

    @torch.no_grad()
    def clear_(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        super().clear_(None if rows is None else rows[self._inverse.to(rows.device)], columns)


class Partition(NamedTuple):
    """Which tokens of a map attend to each other.

    Attributes:
        size: (height, width) of a window; None where all tokens attend to each other.
        spread: Whether the tokens of a window are spread over the map, as far apart as they can be.
        pads: Whether maps that windows do not divide are padded with zeros, behind the norm.
    """

    size: tuple[int, int] | None
    spread: bool = False
    pads: bool = False

    def divides(self, x: Tensor) -> bool:
        """Return whether a map [B, height, width, D] is one of whole windows."""
        return self.size is None or not any(side % own for side, own in zip(x.shape[1:3], self.size, strict=True))

    def split(self, x: Tensor) -> Tensor:
        """Return the tokens window by window, [B * windows, n, D] from [B, height, width, D]."""
        if self.size is None:
            return x.flatten(1, 2)
        rows, columns = self.size
        if self.spread:
            return (
                x.unflatten(2, (columns, -1))
                .unflatten(1, (rows, -1))
                .permute(0, 2, 4, 1, 3, 5)
                .flatten(0, 2)
                .flatten(1, 2)
            )
        return (
            x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 1, 3, 2, 4, 5).flatten(0, 2).flatten(1, 2)
        )

    def join(self, x: Tensor, height: int, width: int) -> Tensor:
        """Undo :meth:`split` for a map of so many tokens."""
        if self.size is None:
            return x.unflatten(1, (height, width))
        rows, columns = self.size
        x = x.unflatten(1, self.size).unflatten(0, (-1, height // rows, width // columns))
        order = (0, 3, 1, 4, 2, 5) if self.spread else (0, 1, 3, 2, 4, 5)
        return x.permute(order).flatten(3, 4).flatten(1, 2)


class PrunedMapBlock(PrunedBlock):
    """Block with compact parameters, called like those of timm's that read maps.

    Attributes:
        partition: Which tokens attend to each other.
    """

    partition: Partition

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Return the block's output [B, height, width, D] for x of that shape."""
        whole = self.partition.divides(x)
        if not whole and not self.partition.pads:
            raise ValueError(f"x: wanted a map that windows of {self.partition.size} divide, got {list(x.shape)}")
        if self.must_call_modules() or not whole:
            return self._by_modules(x, None, False, None)
        return self.partition.join(self.run(self.partition.split(x)), *x.shape[1:3])

    def _by_modules(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, rope: Tensor | None) -> Tensor:
        # A path is dropped for an image and not for a window.
        x = x + self.drop_path1(self.ls1(self._attended(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attended(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        if not self.partition.divides(x) and self.partition.size is not None:
            rows, columns = self.partition.size
            x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        attended = self.partition.join(self.attn(self.partition.split(x)), *x.shape[1:3])
        return attended[:, :height, :width]


class PrunedTwinsBlock(PrunedMapBlock):
    """Block with compact parameters, called like those of timm's Twins."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """Return the block's output [B, height * width, D] for x of that shape and the size of its map."""
        return super().forward(x.unflatten(1, size)).flatten(1, 2)


class Kind(NamedTuple):
    """What is known of a class of blocks.

    Attributes:
        attends: Whether an attention is one whose q, k and v are all of the tokens of a window.
        partition: What gives the partition of a block.
        compact: What a compact block of it is.
    """

    attends: Callable[[Any], bool]
    partition: Callable[[Any], Partition]
    compact: type[PrunedMapBlock] = PrunedMapBlock


def _attends_locally(attn: Any) -> bool:
    return type(attn) is WindowAttentionGlobal and not attn.use_global


def _attends_fully(attn: Any) -> bool:
    return type(attn) is LocallyGroupedAttn or (type(attn) is GlobalSubSampleAttn and attn.sr is None)


def _of_partition(block: Any) -> Partition:
    return Partition(tuple(block.partition_size), spread=not block.partition_block)


def _of_twins(block: Any) -> Partition:
    side = getattr(block.attn, "ws", None)
    return Partition(None) if side is None else Partition((side, side), pads=True)


_KINDS: dict[type[nn.Module], Kind] = {
    volo.Transformer: Kind(lambda attn: type(attn) is volo.Attention, lambda block: Partition(None)),
    PartitionAttentionCl: Kind(lambda attn: type(attn) is AttentionCl, _of_partition),
    GlobalContextVitBlock: Kind(_attends_locally, lambda block: Partition(tuple(block.window_size))),
    TwinsBlock: Kind(_attends_fully, _of_twins, PrunedTwinsBlock),
}


class TimmMaps(BlockFamily):
    """Adapter for the blocks. Opened they read windows as if these were images, since maps may be of any size."""

    def open_block(self, block: nn.Module) -> OpenBlock | None:
        kind = _KINDS.get(type(block))
        if kind is None or not kind.attends(cast(Any, block).attn):
            return None
        if reason := _why_unsupported(block):
            raise ValueError(f"block: cannot prune it: {reason}")
        return _open(block)

    def dress(self, compact: CompactBlock, block: nn.Module) -> CompactBlock:
        kind, dressed = _KINDS[type(block)], cast(Any, compact)
        dressed.__class__ = kind.compact
        dressed.partition = kind.partition(block)
        return compact


register_blocks(TimmMaps())


def _layers(attn: Any) -> tuple[str, ...]:
    """Return the names of the linear layers that q, k and v come from."""
    return ("q", "kv") if isinstance(attn, GlobalSubSampleAttn) else ("qkv",)


def _why_unsupported(block: Any) -> str | None:
    """Return why this block cannot be pruned exactly, or None if it can."""
    attn = block.attn
    reasons = (why_linear(f"attn.{name}", getattr(attn, name)) for name in (*_layers(attn), "proj"))
    return (
        why_altered(block)
        or why_norms(block)
        or next(filter(None, reasons), None)
        or why_mlp(block.mlp, block.norm2.normalized_shape[0])
    )


def _bias(attn: Any) -> ScoreBias | None:
    source = getattr(attn, "rel_pos", None)
    return bias_of(source)


def _open(block: Any) -> OpenBlock:
    attn = block.attn
    first = getattr(attn, "head_first", False)
    read = HeadByHead(attn.qkv, attn.num_heads) if first else Projection(*(getattr(attn, n) for n in _layers(attn)))
    size = BlockGeometry(
        dim=read.in_features,
        num_heads=attn.num_heads,
        head_dim=read.out_features // 3 // attn.num_heads,
        hidden=block.mlp.fc2.in_features,
    )
    scales = [getattr(block, name, nn.Identity()) for name in ("ls1", "ls2")]
    attention = open_attention(block, read, Projection(attn.proj), scales[0], size, bias=_bias(attn))
    return OpenBlock(block, attention, open_mlp(block, scales[1], size))
