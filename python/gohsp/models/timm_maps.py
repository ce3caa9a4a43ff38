# SPDX-License-Identifier: Apache-2.0
"""Blocks of timm's that read maps of tokens, in models that are not taken as a whole.

VOLO, CoAtNet, GlobalContextVit and Twins: all tokens of a map attend to each other, or those of a window.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from timm.layers import ConvMlp, LayerNorm, LayerNorm2d, Mlp
from timm.models import volo
from timm.models.gcvit import GlobalContextVitBlock, WindowAttentionGlobal
from timm.models.maxxvit import Attention2d, TransformerBlock2d
from timm.models.twins import Block as TwinsBlock
from timm.models.twins import GlobalSubSampleAttn, LocallyGroupedAttn
from torch import Tensor, nn

from gohsp.layers import PrunedBlock
from gohsp.models.base import BlockFamily, BlockGeometry, CompactBlock, OpenBlock, Projection, ScoreBias
from gohsp.models.refusals import why_altered, why_linear
from gohsp.models.registry import register_blocks
from gohsp.models.timm_parts import (
    HeadByHead,
    layer_scale,
    open_attention,
    open_mlp,
    unfilled,
    why_mlp,
    why_norms,
)
from gohsp.models.timm_positions import bias_of


def _as_linear(convolution: Any) -> nn.Linear:
    """Return a linear layer that shares the weights of a convolution of single pixels."""
    layer = nn.Linear(1, 1, bias=convolution.bias is not None, device="meta")
    layer.out_features, layer.in_features = convolution.weight.shape[:2]
    weight = convolution.weight
    layer.weight = nn.Parameter(weight.detach().view(weight.shape[:2]), requires_grad=weight.requires_grad)
    if convolution.bias is not None:
        layer.bias = convolution.bias
    return layer


def _as_layer_norm(norm: Any) -> nn.Module:
    """Return a norm of features that stand last, with the parameters of one of channels that stand first."""
    last = unfilled(LayerNorm, num_channels=norm.normalized_shape, eps=norm.eps)
    last.weight, last.bias = norm.weight, norm.bias
    return cast(nn.Module, last.train(norm.training))


class _ChannelsLast:
    """A block whose channels stand first, with layers and norms for features that stand last. They share parameters.

    Args:
        block: A TransformerBlock2d of stride 1.
    """

    def __init__(self, block: Any) -> None:
        self.norm1, self.norm2 = _as_layer_norm(block.norm1), _as_layer_norm(block.norm2)
        self.drop_path1, self.drop_path2 = block.drop_path1, block.drop_path2
        self.ls1, self.ls2 = (layer_scale(getattr(ls, "gamma", None)) for ls in (block.ls1, block.ls2))
        attn, mlp = block.attn, block.mlp
        self.attn, self.mlp = copy.copy(attn), unfilled(Mlp, in_features=2)
        self.attn._modules = dict(attn._modules)
        self.attn.qkv, self.attn.proj = _as_linear(attn.qkv), _as_linear(attn.proj)
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = _as_linear(mlp.fc1), mlp.act, _as_linear(mlp.fc2)
        self.mlp.drop1 = mlp.drop


class Partition(NamedTuple):
    """Which tokens of a map attend to each other.

    Attributes:
        size: (height, width) of a window; None where all tokens attend to each other.
        pads: Whether maps that windows do not divide are padded with zeros, behind the norm.
    """

    size: tuple[int, int] | None
    pads: bool = False

    def divides(self, x: Tensor) -> bool:
        """Return whether a map [B, height, width, D] is one of whole windows."""
        return self.size is None or not any(side % own for side, own in zip(x.shape[1:3], self.size, strict=True))

    def split(self, x: Tensor) -> Tensor:
        """Return the tokens window by window, [B * windows, n, D] from [B, height, width, D]."""
        if self.size is None:
            return x.flatten(1, 2)
        rows, columns = self.size
        return (
            x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 1, 3, 2, 4, 5).flatten(0, 2).flatten(1, 2)
        )

    def join(self, x: Tensor, height: int, width: int) -> Tensor:
        """Undo :meth:`split` for a map of so many tokens."""
        if self.size is None:
            return x.unflatten(1, (height, width))
        rows, columns = self.size
        x = x.unflatten(1, self.size).unflatten(0, (-1, height // rows, width // columns))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


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


class PrunedChannelsBlock(PrunedMapBlock):
    """Block with compact parameters, called like those of timm's that read maps whose channels stand first."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """Return the block's output [B, D, height, width] for x of that shape."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Kind(NamedTuple):
    """What is known of a class of blocks.

    Attributes:
        takes: Whether a block is one whose q, k and v are all of the same tokens.
        partition: What gives the partition of a block.
        compact: What a compact block of it is.
    """

    takes: Callable[[Any], bool]
    partition: Callable[[Any], Partition]
    compact: type[PrunedMapBlock] = PrunedMapBlock


def _attends_locally(block: Any) -> bool:
    attn = block.attn
    return type(attn) is WindowAttentionGlobal and not attn.use_global


def _attends_fully(block: Any) -> bool:
    attn = block.attn
    return type(attn) is LocallyGroupedAttn or (type(attn) is GlobalSubSampleAttn and attn.sr is None)


def _keeps_its_size(block: Any) -> bool:
    return type(block.attn) is Attention2d and isinstance(block.shortcut, nn.Identity)


def _of_twins(block: Any) -> Partition:
    side = getattr(block.attn, "ws", None)
    return Partition(None) if side is None else Partition((side, side), pads=True)


_KINDS: dict[type[nn.Module], Kind] = {
    volo.Transformer: Kind(lambda block: type(block.attn) is volo.Attention, lambda block: Partition(None)),
    GlobalContextVitBlock: Kind(_attends_locally, lambda block: Partition(tuple(block.window_size))),
    TwinsBlock: Kind(_attends_fully, _of_twins, PrunedTwinsBlock),
    TransformerBlock2d: Kind(_keeps_its_size, lambda block: Partition(None), PrunedChannelsBlock),
}


class TimmMaps(BlockFamily):
    """Adapter for the blocks. Opened they read windows as if these were images, since maps may be of any size."""

    def open_block(self, block: nn.Module) -> OpenBlock | None:
        kind = _KINDS.get(type(block))
        if kind is None or not kind.takes(block):
            return None
        seen: Any = block
        reason = why_altered(block)
        if type(block) is TransformerBlock2d and not reason and not (reason := _why_not_in_2d(block)):
            seen = _ChannelsLast(block)
        if reason := reason or _why_unsupported(seen):
            raise ValueError(f"block: cannot prune it: {reason}")
        return _open(block, seen)

    def dress(self, compact: CompactBlock, block: nn.Module) -> CompactBlock:
        kind, dressed = _KINDS[type(block)], cast(Any, compact)
        dressed.__class__ = kind.compact
        dressed.partition = kind.partition(block)
        return compact


register_blocks(TimmMaps())


def _layers(attn: Any) -> tuple[str, ...]:
    """Return the names of the linear layers that q, k and v come from."""
    return ("q", "kv") if isinstance(attn, GlobalSubSampleAttn) else ("qkv",)


def _why_not_in_2d(block: Any) -> str | None:
    """Return why a block whose channels stand first is not one of the same with features last, or None if it is."""
    attn, mlp = block.attn, block.mlp
    for name, norm in (("norm1", block.norm1), ("norm2", block.norm2)):
        if type(norm) is not LayerNorm2d:
            return f"{name} is {type(norm).__name__}; wanted timm's LayerNorm2d"
    if type(mlp) is not ConvMlp or not isinstance(mlp.norm, nn.Identity):
        return f"mlp is {type(mlp).__name__}; wanted timm's ConvMlp without a norm"
    layers = {"attn.qkv": attn.qkv, "attn.proj": attn.proj, "mlp.fc1": mlp.fc1, "mlp.fc2": mlp.fc2}
    for name, layer in layers.items():
        if type(layer) is not nn.Conv2d or layer.weight.shape[2:] != (1, 1) or layer.groups != 1:
            return f"{name} is {type(layer).__name__}; wanted torch.nn.Conv2d of single pixels"
    return None


def _why_unsupported(block: Any) -> str | None:
    """Return why the halves of a block cannot be pruned exactly, or None if they can."""
    attn = block.attn
    reasons = (why_linear(f"attn.{name}", getattr(attn, name)) for name in (*_layers(attn), "proj"))
    return why_norms(block) or next(filter(None, reasons), None) or why_mlp(block.mlp, block.norm2.normalized_shape[0])


def _bias(attn: Any) -> ScoreBias | None:
    source = getattr(attn, "rel_pos", None)
    return bias_of(source)


def _open(module: nn.Module, block: Any) -> OpenBlock:
    """Return a block, opened.

    Args:
        module: The block itself.
        block: The same, or what shows its parts with features last.
    """
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
    return OpenBlock(module, attention, open_mlp(block, scales[1], size))
