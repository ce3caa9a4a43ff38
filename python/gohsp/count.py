# SPDX-License-Identifier: Apache-2.0
"""Parameters and multiply-accumulates of dense, masked and compressed models, by block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gohsp.models.base import (
    BlockGeometry,
    Geometry,
    OpenBlock,
    OpenModel,
    Sublayer,
    count_parameters,
)
from gohsp.models.registry import family_of, find_compact_blocks, is_compressed, open_model


@dataclass(frozen=True)
class BlockCount:
    """Cost of one block. The attention half holds norm1, qkv, proj and ls1; the MLP half norm2, fc1, fc2 and ls2.

    Attributes:
        attn_params, mlp_params: Parameters.
        attn_macs, mlp_macs: Multiply-accumulates for one image.
    """

    attn_params: int
    attn_macs: int
    mlp_params: int
    mlp_macs: int

    @property
    def params(self) -> int:
        """Parameters of the block."""
        return self.attn_params + self.mlp_params

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the block for one image."""
        return self.attn_macs + self.mlp_macs


@dataclass(frozen=True)
class Count:
    """Cost of a model for one image.

    Attributes:
        params: All parameters; on a compressed model exactly ``sum(p.numel() for p in model.parameters())``.
        macs: All multiply-accumulates, with every token computed in every block.
        blocks: The cost of each block.
        tokens: Tokens that the blocks see, class and register tokens included; of a model with stages the first ones.
        attended: Of each block how many tokens it sees, and to how many each of them attends.
    """

    params: int
    macs: int
    blocks: tuple[BlockCount, ...]
    tokens: int
    attended: tuple[tuple[int, int], ...]


Size = TypeVar("Size", bound="BlockSize")


@dataclass(frozen=True)
class BlockSize:
    """The widths that the cost of a block depends on.

    Attributes:
        heads: Heads that are left.
        qk, v: QK and V channels, summed over the heads.
        hidden: Neurons of the MLP.
        attn_in, attn_out, mlp_in, mlp_out: Residual features read and written.
    """

    heads: int
    qk: int
    v: int
    hidden: int
    attn_in: int
    attn_out: int
    mlp_in: int
    mlp_out: int

    @classmethod
    def whole(cls: type[Size], size: BlockGeometry) -> Size:
        """Return the widths of a block that keeps everything."""
        return cls(size.num_heads, size.span, size.span, size.hidden, size.dim, size.dim, size.dim, size.dim)


class Kept(Protocol):
    """What :func:`count` asks of a :class:`gohsp.ModelMask`."""

    blocks: Any

    def check_fits(self, geometry: Geometry) -> None: ...


def count(model: nn.Module, input_size: int | Sequence[int] | None = None, *, mask: Kept | None = None) -> Count:
    """Count the parameters and the multiply-accumulates of a model for one image.

    A multiply-accumulate is one product of a matrix product: convolution, linear layers, QK^T and PV by their true
    widths. Norms, softmax, activations and additions are not counted, as in torch.utils.flop_counter (which counts two
    FLOPs for each), nor is what reads no image, such as what makes a table of relative positions. The shortcut of a
    compressed model that computes only the class token in its last block is not taken into account.

    Args:
        model: Dense vision transformer that gohsp knows, or a compressed one.
        input_size: Side, (height, width) or (channels, height, width) of the images; None takes the model's own.
        mask: Count what ``compress(model, mask)`` would give, without making it.

    Raises:
        ValueError: The input size does not suit the model, or the mask does not fit it.
        TypeError: The model is not a vision transformer that gohsp knows.
    """
    if not is_compressed(model) or mask is not None:
        return count_opened(open_model(model), input_size, mask=mask)
    blocks = find_compact_blocks(model)
    height, width = _image_size(model, input_size)
    attended = _attended(model, height, width, len(blocks))
    costs = [
        _count_modules(block.halves(), block.geometry, block.mask.size(), sizes)
        for block, sizes in zip(blocks, attended, strict=True)
    ]
    inside = [module for block in blocks for half in block.halves() for module in half]
    return _count_all(model, inside, costs, (height, width), attended)


def count_opened(
    opened: OpenModel, input_size: int | Sequence[int] | None = None, *, mask: Kept | None = None
) -> Count:
    """Count a dense model that is opened already; see :func:`count`.

    Raises:
        ValueError: The input size does not suit the model, or the mask does not fit it.
    """
    height, width = _image_size(opened.model, input_size)
    attended = _attended(opened.model, height, width, len(opened.blocks))
    costs = _count_dense(opened, mask, attended)
    inside = [module for block in opened.blocks for half in block.sublayers for module in _modules(half)]
    if mask is not None:
        inside += opened.family.taken_over(opened.model)
    return _count_all(opened.model, inside, costs, (height, width), attended)


def _count_all(
    model: nn.Module,
    inside: Sequence[nn.Module],
    costs: Sequence[BlockCount],
    size: tuple[int, int],
    attended: Sequence[tuple[int, int]],
) -> Count:
    """Add to the costs of blocks what stands outside, or beside their halves, in some modules of the model."""
    outside = count_parameters(model) - count_parameters(*inside)
    macs = sum(_macs(*part) for part in family_of(model).modules_outside(model, *size))
    return Count(
        params=outside + sum(cost.params for cost in costs),
        macs=macs + sum(cost.macs for cost in costs),
        blocks=tuple(costs),
        tokens=attended[0][0],
        attended=tuple(attended),
    )


def _count_dense(opened: OpenModel, mask: Kept | None, attended: Sequence[tuple[int, int]]) -> list[BlockCount]:
    if mask is None:
        halves = [[_modules(half) for half in block.sublayers] for block in opened.blocks]
        sizes = [BlockSize.whole(block.geometry) for block in opened.blocks]
        return list(map(_count_modules, halves, opened.geometry.blocks, sizes, attended))
    mask.check_fits(opened.geometry)
    return list(map(count_block, opened.blocks, [kept.size() for kept in mask.blocks], attended))


def _modules(half: Sublayer) -> tuple[nn.Module, ...]:
    """Return what holds the parameters of a dense half block."""
    return half.norm, half.body, half.scale


def _count_modules(
    halves: Sequence[Sequence[nn.Module]], geometry: BlockGeometry, size: BlockSize, attended: tuple[int, int]
) -> BlockCount:
    attention, mlp = (count_parameters(*modules) for modules in halves)
    attention_macs, mlp_macs = _block_macs(geometry, size, attended)
    return BlockCount(attention, attention_macs, mlp, mlp_macs)


def count_block(block: OpenBlock, size: BlockSize, attended: tuple[int, int]) -> BlockCount:
    """Count what a dense block would cost if it were cut to the given widths.

    Args:
        block: Tells which parts it has: biases, layer scale, norms on q and k.
        size: The widths.
        attended: How many tokens the block sees, and to how many each of them attends.
    """
    attention, mlp = block.sublayers
    rows = 2 * size.qk + size.v
    attention_params = count_parameters(attention.q_norm, attention.k_norm)
    attention_params += _sublayer(attention, size.attn_in, rows, size.v, size.attn_out)
    attention_params += _norm_params(attention.inner_norm, size.v)
    attention_params += 0 if attention.bias is None else size.heads * len(attention.bias.table)
    attention_params += 0 if attention.logit_scale is None else size.heads
    mlp_params = _sublayer(mlp, size.mlp_in, _rows(block.geometry, size), size.hidden, size.mlp_out)
    mlp_params += _norm_params(mlp.inner_norm, size.hidden)
    attention_macs, mlp_macs = _block_macs(block.geometry, size, attended)
    return BlockCount(attention_params, attention_macs, mlp_params, mlp_macs)


def _sublayer(layer: Sublayer, inputs: int, rows: int, columns: int, outputs: int) -> int:
    """Return the parameters of norm, reading and writing matrix, and layer scale, at the given widths."""
    read = (inputs + (layer.read.bias is not None)) * rows
    write = (columns + (layer.write.bias is not None)) * outputs
    return count_parameters(*layer.norms) + read + write + (0 if isinstance(layer.scale, nn.Identity) else outputs)


def _rows(geometry: BlockGeometry, size: BlockSize) -> int:
    """Return the rows of the matrix that an MLP reads with."""
    return 2 * size.hidden if geometry.gated else size.hidden


def _norm_params(norm: nn.Module, width: int) -> int:
    """Return the parameters of a norm of which so many features are left."""
    return width * sum(1 for _ in norm.parameters())


def _block_macs(geometry: BlockGeometry, size: BlockSize, attended: tuple[int, int]) -> tuple[int, int]:
    rows, (tokens, keys) = 2 * size.qk + size.v, attended
    products = tokens * (size.attn_in * rows + size.v * size.attn_out)
    mlp_macs = tokens * (size.mlp_in * _rows(geometry, size) + size.hidden * size.mlp_out)
    return products + tokens * keys * (size.qk + size.v), mlp_macs


def _image_size(model: nn.Module, input_size: int | Sequence[int] | None) -> tuple[int, int]:
    if input_size is None:
        own = family_of(model).image_shape(model)
        if own is None:
            raise ValueError("input_size: wanted a size, because the model has none of its own")
        return own[1:]
    sizes = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"input_size: wanted a side, (height, width) or (channels, height, width), got {input_size}")
    return sizes


def _attended(model: nn.Module, height: int, width: int, blocks: int) -> list[tuple[int, int]]:
    family = family_of(model)
    try:
        tokens = family.tokens(model, height, width)
        return family.attended(model, height, width) or [(tokens, tokens)] * blocks
    except ValueError as error:
        raise ValueError(f"input_size: {error}") from error


def _macs(module: nn.Module, shape: tuple[int, ...]) -> int:
    """Count with torch's own counter, on shapes alone."""
    # The counter hooks gradients of what requires them, which fails on views made without gradient.
    shadow = copy.deepcopy(module).to(device="meta", dtype=torch.float32).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        shadow(torch.empty(shape, device="meta"))
    return counter.get_total_flops() // 2
