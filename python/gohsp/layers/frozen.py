# SPDX-License-Identifier: Apache-2.0
"""Layers that hold their weights packed for the kernels and nothing else: inference alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import gohsp_kernels as gk
from gohsp.layers.compact import PrunedBlock, behind_norm, hook_tables


class FrozenEmbedding(nn.Module):
    """Projection of patches and what is added to it, packed: class token and positions of any kind.

    Args:
        weight: [D, C, p, q] of a convolution whose kernels lie side by side, float32 on the CPU.
        bias: [D] or None.
        base: [N, D], what an image adds the products of its patches to: tokens in front of them, and positions.
        img_size: (height, width) of the images.
        weights: Format of the weights; see :func:`gohsp.freeze`.

    Raises:
        ValueError: The weights are not float32 on the CPU.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, base: Tensor, img_size: tuple[int, int], weights: str = "float32"
    ) -> None:
        super().__init__()
        self.channels, self.img_size = weight.shape[1], img_size
        self.packed = gk.pack_embedding(weight, bias, base, weights)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens [B, N, D] for images [B, C, height, width]; no gradient flows through it."""
        _refuse_rewriting()
        if x.dim() != 4 or x.shape[1:] != (self.channels, *self.img_size) or x.dtype != torch.float32:
            wanted = [self.channels, *self.img_size]
            raise ValueError(f"x: wanted float32 images [B, {str(wanted)[1:]}, got {x.dtype} {list(x.shape)}")
        return self.packed(x.detach())

    def set_input_size(self, *_: object, **__: object) -> None:
        """Refuse timm's call: positions are packed for one size of images.

        Raises:
            ValueError: Always.
        """
        raise ValueError("model: it is frozen for one size of images; wanted the model that it was made from")


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
        _refuse_rewriting()
        return self.packed(x.detach())


class FrozenBlock(nn.Module):
    """A block whose two sublayers are packed: in one chain, or in two with a norm between them.

    Args:
        block: The compact block. It is not changed, and not held.
        weights: See :func:`gohsp.freeze`.
    """

    def __init__(self, block: PrunedBlock, weights: str = "float32") -> None:
        super().__init__()
        sublayers, dim = block.sublayers(), block.attn.dim
        self.norm = None if block.is_one_chain() else copy.deepcopy(block.norm2).requires_grad_(False)
        self.chain = gk.SublayerChain(sublayers if self.norm is None else sublayers[:1]).frozen(dim, weights)
        self.last = None if self.norm is None else gk.SublayerChain(sublayers[1:]).frozen(dim, weights)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, num_queries: int | None = None
    ) -> Tensor:
        """Return the block's output [B, num_queries or N, D] for x [B, N, D]; no gradient flows through it.

        Raises:
            ValueError: There is an attention mask, which the packed block has no place for.
        """
        _refuse_rewriting()
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask: wanted None for a frozen model; the model that it was made from takes a mask")
        x = self.chain(x.detach(), num_queries=num_queries)
        return x if self.last is None else behind_norm(self.norm, self.last, x)


class FrozenBlocks(nn.Sequential):
    """Frozen blocks, run as one chain where each is one and no hook hangs on it."""

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Return the last block's output [B, num_queries or N, D] for x [B, N, D]; no gradient flows through it."""
        _refuse_rewriting()
        blocks: list[Any] = list(self)
        if any(block.last is not None or any(hook_tables(block)) for block in blocks):
            for block in blocks[:-1]:
                x = block(x)
            return blocks[-1](x, num_queries=num_queries)
        chains = [block.chain for block in blocks]
        sublayers, costs = ([part for chain in chains for part in getattr(chain, of)] for of in ("sublayers", "costs"))
        chain = gk.FrozenChain(chains[0].features, tuple(sublayers), tuple(costs))
        if gk.is_counted():  # all tokens, as for every other model
            return chain(x.detach())[:, :num_queries]
        return chain(x.detach(), num_queries=num_queries)


def _refuse_rewriting() -> None:
    if gk.is_rewritten():
        raise RuntimeError(
            "model: it is frozen, and torch.jit.trace, ONNX export, torch.func.vmap and forward-mode AD know nothing "
            "of its kernels; wanted the model that it was made from, or gohsp.densify of that"
        )
