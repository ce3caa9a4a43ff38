# SPDX-License-Identifier: Apache-2.0
"""Parameters and multiply-accumulates of dense, masked and compressed models, by block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gohsp import vit
from gohsp.vit import Geometry

if TYPE_CHECKING:
    from gohsp.mask import BlockLayout, ModelMask


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
        tokens: Tokens that the blocks see, class and register tokens included.
    """

    params: int
    macs: int
    blocks: tuple[BlockCount, ...]
    tokens: int


@dataclass(frozen=True)
class BlockSize:
    """The widths that the cost of a block depends on.

    Attributes:
        qk, v: QK and V channels, summed over the heads.
        hidden: Neurons of the MLP.
        attn_in, attn_out, mlp_in, mlp_out: Residual features read and written.
    """

    qk: int
    v: int
    hidden: int
    attn_in: int
    attn_out: int
    mlp_in: int
    mlp_out: int


def count(model: nn.Module, input_size: int | Sequence[int] | None = None, *, mask: ModelMask | None = None) -> Count:
    """Count the parameters and the multiply-accumulates of a model for one image.

    A multiply-accumulate is one product of a matrix product: convolution, linear layers, QK^T and PV by their true
    widths. Norms, softmax, activations and additions are not counted, as in torch.utils.flop_counter (which counts two
    FLOPs for each). The shortcut of a compressed model that computes only the class token in its last block is not
    taken into account.

    Args:
        model: Dense timm vision transformer, or a compressed one.
        input_size: Side, (height, width) or (channels, height, width) of the images; None takes the model's own.
        mask: Count what ``compress(model, mask)`` would give, without making it.

    Raises:
        ValueError: The input size does not suit the model, or the mask does not fit it.
        TypeError: The model is not a timm vision transformer that gohsp knows.
    """
    blocks = vit.find_blocks(model)
    if mask is not None:
        vit.find_dense_blocks(model)
        mask.validate(model)
    height, width = _image_size(model, input_size)
    tokens = _tokens(model, height, width)
    masks = [getattr(block, "mask", None) for block in blocks] if mask is None else mask.blocks
    size = vit.geometry(model)
    costs = tuple(
        count_block(block, _block_size(size, None if kept is None else kept.layout()), tokens)
        for block, kept in zip(blocks, masks, strict=True)
    )
    outside = _numel(model) - sum(_numel(block) for block in blocks)
    return Count(
        params=outside + sum(cost.params for cost in costs),
        macs=_macs_outside(model, height, width, tokens) + sum(cost.macs for cost in costs),
        blocks=costs,
        tokens=tokens,
    )


def count_block(block: Any, size: BlockSize, tokens: int) -> BlockCount:
    """Count what a block costs when it is cut to the given widths.

    Args:
        block: timm Block or PrunedBlock; tells which parts it has (biases, layer scale, qk-norm).
        size: The widths.
        tokens: Tokens in a sequence.
    """
    attn, mlp = block.attn, block.mlp
    rows = 2 * size.qk + size.v
    attn_params = _numel(block.norm1) + _numel(attn.q_norm) + _numel(attn.k_norm)
    attn_params += _linear(attn.qkv, size.attn_in, rows) + _linear(attn.proj, size.v, size.attn_out)
    attn_params += 0 if isinstance(block.ls1, nn.Identity) else size.attn_out
    mlp_params = _numel(block.norm2)
    mlp_params += _linear(mlp.fc1, size.mlp_in, size.hidden) + _linear(mlp.fc2, size.hidden, size.mlp_out)
    mlp_params += 0 if isinstance(block.ls2, nn.Identity) else size.mlp_out
    attn_macs = tokens * (size.attn_in * rows + size.v * size.attn_out) + tokens * tokens * (size.qk + size.v)
    mlp_macs = tokens * size.hidden * (size.mlp_in + size.mlp_out)
    return BlockCount(attn_params, attn_macs, mlp_params, mlp_macs)


def _block_size(dense: Geometry, layout: BlockLayout | None) -> BlockSize:
    """Return the widths of a block that is cut to a layout, or of a whole one."""
    span, dim = dense.num_heads * dense.head_dim, dense.dim
    if layout is None:
        return BlockSize(span, span, dense.hidden, dim, dim, dim, dim)
    kept = (
        dim if columns is None else columns.numel()
        for columns in (layout.attn_in, layout.attn_out, layout.mlp_in, layout.mlp_out)
    )
    return BlockSize(sum(layout.qk_widths), sum(layout.v_widths), layout.hidden.numel(), *kept)


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _linear(layer: Any, inputs: int, outputs: int) -> int:
    return (inputs + (layer.bias is not None)) * outputs


def _image_size(model: Any, input_size: int | Sequence[int] | None) -> tuple[int, int]:
    own = model.patch_embed.img_size
    if input_size is None:
        if own is None:
            raise ValueError("input_size: wanted a size, because the model has none of its own")
        return own
    sizes = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)[-2:]
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"input_size: wanted a side, (height, width) or (channels, height, width), got {input_size}")
    if model.patch_embed.strict_img_size and sizes != tuple(own):
        raise ValueError(f"input_size: wanted {tuple(own)}, which this model is fixed to, got {input_size}")
    return sizes


def _tokens(model: Any, height: int, width: int) -> int:
    rows, columns = model.patch_embed.dynamic_feat_size((height, width))
    return rows * columns + model.num_prefix_tokens


def _macs_outside(model: Any, height: int, width: int, tokens: int) -> int:
    """Count what stands before and after the blocks with torch's own counter, on shapes alone."""
    dim, channels = model.embed_dim, model.patch_embed.proj.in_channels
    parts: list[tuple[nn.Module | None, tuple[int, ...]]] = [
        (model.patch_embed, (1, channels, height, width)),
        (model.attn_pool, (1, tokens if model.pool_include_prefix else tokens - model.num_prefix_tokens, dim)),
        (model.head, (1, dim)),
        (getattr(model, "head_dist", None), (1, dim)),
    ]
    return sum(_macs(module, torch.empty(shape, device="meta")) for module, shape in parts if module is not None)


def _macs(module: nn.Module, x: Tensor) -> int:
    # The counter hooks gradients of what requires them, which fails on views made without gradient.
    shadow = copy.deepcopy(module).to(device="meta", dtype=x.dtype).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        shadow(x)
    return counter.get_total_flops() // 2
