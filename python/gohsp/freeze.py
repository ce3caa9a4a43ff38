# SPDX-License-Identifier: Apache-2.0
"""Inference only: a compressed model that holds its weights once, packed for the kernels."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

import gohsp_kernels as gk
from gohsp.layers import PrunedBlock, find_bare_blocks, has_additions


def freeze(model: nn.Module, weights: str = "float32") -> nn.Module:
    """Return the compressed model for inference on the CPU kernels, without the compact parameters of its blocks.

    A compressed model keeps its compact parameters beside the packed form that the kernels read, so that it can be
    trained, saved and moved. The frozen one cannot: its blocks have no parameters, and their weights are in memory
    once. The plain patch embedding of timm, with class token and positions, and a linear head are packed as well.
    Everything else is copied, so that the result is a snapshot: neither model changes the other. Drop the given one to
    free its memory.

    Args:
        model: A model made by :func:`gohsp.compress` or :func:`gohsp.load`, float32 on the CPU.
        weights: "float32" gives the results of the given model. "bfloat16" holds the matrices of the blocks in
            bfloat16 and rounds the activations in front of them and what meets in attention: half of the memory and,
            with AMX, by far the fastest; a CPU without AMX refuses it. LayerNorm, softmax, sums and residual stream
            stay in float32. "int8" holds the matrices of the blocks in 8 bits, with one scale an output after
            everything is folded in that can be, and turns the activations in front of them into 8 bits row by row: a
            quarter of the memory. The last block then stays in float32, because nothing after it evens its errors
            out; so do LayerNorm, attention and residual stream. Patch embedding and head are float32 in every form.
            Neither rounded form gives the same results: try it on your own images.

    Raises:
        ValueError: The model is not compressed, a hook or an adapter in one of its blocks would be lost, its weights
            are not float32 on the CPU, or there are no weights of that name.
        RuntimeError: The CPU kernels cannot run here, or not with such weights; the message says why.
    """
    support = gk.can_run("cpu", weights=weights)
    if not support:
        raise RuntimeError(f"backend 'cpu': {support.reason}")
    *blocks, last = find_bare_blocks(model)
    # All but the blocks is copied, a few kilobytes: neither model's training, mode or dtype reaches the other.
    result: Any = copy.deepcopy(model, {id(model.blocks): model.blocks})
    of_last = "float32" if weights == "int8" else weights
    result.blocks = FrozenBlocks(*(FrozenBlock(block, weights) for block in blocks), FrozenBlock(last, of_last))
    result.eval()
    if _is_plain(model):
        result.patch_embed = FrozenEmbedding(result)
        result._pos_embed = _as_it_is
    for name in ("head", "head_dist"):
        layer = getattr(model, name, None)
        if type(layer) is nn.Linear and not has_additions(layer):
            setattr(result, name, FrozenLinear(getattr(model, name)))
    return result.eval()


def _is_plain(model: Any) -> bool:
    """Whether images become tokens by one product of patches side by side, and by a constant added to it."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed or not embed.flatten or not isinstance(embed.norm, nn.Identity):
        return False
    if any(map(has_additions, (*embed.modules(), model.pos_drop))):
        return False
    return embed.img_size is not None and embed.strict_img_size and not embed.dynamic_img_pad


def _as_it_is(x: Tensor) -> Tensor:
    return x


class FrozenEmbedding(nn.Module):
    """Patch embedding, tokens in front of the patches and positions, packed; in place of timm's ``PatchEmbed``.

    Args:
        model: The model whose patch embedding and ``_pos_embed`` it does the work of. It is not changed, and not held.

    Raises:
        ValueError: The weights are not float32 on the CPU.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        embed = model.patch_embed
        self.img_size, self.patch_size, self.grid_size = embed.img_size, embed.patch_size, embed.grid_size
        self.num_patches, self.channels = embed.num_patches, embed.proj.in_channels
        weight = embed.proj.weight
        # What timm adds to patches of which nothing is left: the tokens in front of them, and all positions.
        with torch.no_grad():
            base = model._pos_embed(weight.new_zeros(1, embed.num_patches, weight.shape[0]))[0]
        self.packed = gk.pack_embedding(weight, embed.proj.bias, base)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, N, D] for images [B, C, height, width]; no gradient flows through it."""
        if x.dim() != 4 or x.shape[1:] != (self.channels, *self.img_size) or x.dtype != torch.float32:
            wanted = [self.channels, *self.img_size]
            raise ValueError(f"x: wanted float32 images [B, {str(wanted)[1:]}, got {x.dtype} {list(x.shape)}")
        return self.packed(x.detach())

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return how many patches lie below and beside each other; timm asks for it."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]


class FrozenLinear(nn.Module):
    """A linear layer, packed.

    Args:
        layer: It is not changed, and not held.

    Raises:
        ValueError: The weights are not float32 on the CPU.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.packed = gk.pack_linear(layer.weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., out_features] for x [..., in_features]; no gradient flows through it."""
        return self.packed(x.detach())


class FrozenBlock(nn.Module):
    """A block whose two sublayers are packed.

    Args:
        block: The compact block. It is not changed, and not held.
        weights: See :func:`freeze`.
    """

    def __init__(self, block: PrunedBlock, weights: str = "float32") -> None:
        super().__init__()
        self.chain = gk.SublayerChain(block.sublayers()).frozen(block.attn.dim, weights)

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Return the block's output [B, num_queries or N, D] for x [B, N, D]; no gradient flows through it."""
        return self.chain(x.detach(), num_queries=num_queries)


class FrozenBlocks(nn.Sequential):
    """Frozen blocks, run as one chain."""

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Return the last block's output [B, num_queries or N, D] for x [B, N, D]; no gradient flows through it."""
        blocks: list[Any] = list(self)
        chain = gk.FrozenChain(blocks[0].chain.features, tuple(s for block in blocks for s in block.chain.sublayers))
        return chain(x.detach(), num_queries=num_queries)
