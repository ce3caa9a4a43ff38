# SPDX-License-Identifier: Apache-2.0
"""From a dense model and a mask to a compact model, and from a compact model to plain PyTorch modules."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from gohsp.arguments import check_kind
from gohsp.layers import PrunedBlock, find_bare_blocks, hook_tables
from gohsp.masks.mask import BlockMask, ModelMask
from gohsp.models.base import BlockFamily, OpenBlock, OpenModel
from gohsp.models.registry import family_of, known_block, open_block, open_model

LARGEST_DIFFERENCE = 0.01  # of rows of q and k in principal axes, relative to their sum; light fine-tuning stays below


def compress(model: nn.Module, mask: ModelMask) -> nn.Module:
    """Return a new model without the pruned groups.

    It computes what the masked dense model computes, is called the same way, is still a model of its library, and can
    be trained: its parameters are compact and carry timm's names. The given model is not changed.

    Args:
        model: Dense vision transformer of a family that gohsp knows (see :data:`gohsp.models.registry.FAMILIES`).
        mask: What to keep of it.

    Raises:
        ValueError: The model is already compressed or holds something that cannot be pruned, a hook hangs on a module
            that is replaced, or the mask is not valid or does not fit it.
        TypeError: The model is of no family that gohsp knows.
    """
    opened = open_model(model)
    refuse_hooks(opened)
    check_kind("mask", mask, ModelMask, "a ModelMask")
    mask.check_fits(opened.geometry)
    whole = all(bool(block.attn_in.all()) for block in mask.blocks)  # else other rows were fitted
    if "qk" in mask.turned and whole and not _in_principal_axes(opened):
        warnings.warn(
            "mask: it is of heads in their principal axes, and this model's are not, so that other channels would go. "
            "Pass the model that gohsp.prune returned, or gohsp.pruning.axes.principal_axes(model, batches)",
            stacklevel=2,
        )
    blocks = [PrunedBlock(block, kept) for block, kept in zip(opened.blocks, mask.blocks, strict=True)]
    return opened.family.assemble(model, blocks)


def compress_block(block: nn.Module, mask: BlockMask) -> nn.Module:
    """Return a compact block to stand in the place of a dense one, in a model of whatever class.

    It is called as the dense one is, computes what the masked one computes, and can be trained. For models that
    :func:`compress` does not take as a whole, such as PiT, CrossViT and MobileViT, whose blocks are timm's own, or
    MaxViT.

    Args:
        block: timm's ``Block`` and some others of timm's, torchvision's ``EncoderBlock``, or a layer of an image
            encoder of transformers. It is not changed.
        mask: What to keep of it; :meth:`gohsp.BlockMask.of_block` gives the one that keeps everything.

    Raises:
        ValueError: The block holds something that cannot be pruned exactly, a hook hangs on it, or the mask is not
            valid or does not fit it.
        TypeError: gohsp does not know such blocks.
    """
    family, opened = known_block(block)
    check_kind("mask", mask, BlockMask, "a BlockMask")
    mask.check_fits(opened.geometry)
    if name := _hooked(opened, family):
        raise ValueError(f"block: a hook hangs on {name}; wanted none. Remove it, and hang it on the compact block")
    return family.dress(PrunedBlock(opened, mask), block)


def accelerate(model: nn.Module) -> nn.Module:
    """Return a copy of a dense model that computes the same on the kernels, with nothing pruned.

    It is called as before and can be trained, moved and copied. A model that :func:`compress` takes is compressed with
    the mask that keeps everything: it can be frozen (:func:`gohsp.freeze`), saved and made plain. In any other model
    each block that gohsp knows is replaced (see :func:`compress_block`), and all else is as it was.

    Args:
        model: It is not changed.

    Raises:
        ValueError: The model is already compressed, or holds something that cannot be computed exactly, or a hook
            hangs on a module that is replaced.
        TypeError: There is no block in the model that gohsp knows.
    """
    try:
        return compress(model, ModelMask.full(model))
    except TypeError:
        result = copy.deepcopy(model)
        if not isinstance(model, nn.Module) or not _replace_blocks(result):
            raise
        return result


def _replace_blocks(module: nn.Module) -> int:
    """Put compact blocks in the place of all that gohsp knows, and return how many there were."""
    found = 0
    for name, child in module.named_children():
        if open_block(child) is None:
            found += _replace_blocks(child)
        else:
            setattr(module, name, compress_block(child, BlockMask.of_block(child)))
            found += 1
    return found


def _in_principal_axes(opened: OpenModel) -> bool:
    """Return whether rows of q are as long as the rows of k that they meet, as turning leaves them.

    Where training left them they differ by a tenth, in a model of random weights by some hundredths.
    """
    differences = []
    for block in opened.blocks:
        q, k, _ = block.attention.read.weight.detach().norm(dim=1).chunk(3)
        differences.append(((q - k).abs() / (q + k)).nan_to_num())
    return float(torch.cat(differences).mean()) < LARGEST_DIFFERENCE


def densify(model: nn.Module) -> nn.Module:
    """Return a compressed model as plain PyTorch: the library's own classes, ``nn.Linear`` and torch functions only.

    For ONNX export and other runtimes. Where the heads of a block have one width its attention is timm's Attention,
    else :class:`gohsp.layers.RaggedAttention`. Pruned columns become an ``index_select`` after the norm and one after
    layer scale. Every token is computed in every block. The given model is not changed.

    Args:
        model: A model made by :func:`compress`.

    Raises:
        ValueError: The model is not compressed, or a hook, an adapter or a computed weight in one of its blocks would
            be lost.
    """
    find_bare_blocks(model)
    return family_of(model).disassemble(model)


def refuse_hooks(opened: OpenModel) -> None:
    """Refuse hooks on modules that compact ones take the place of. Those on the norms of the stream are kept.

    Raises:
        ValueError: There is such a hook; the message names the module.
    """
    for index, block in enumerate(opened.blocks):
        if name := _hooked(block, opened.family):
            where = f"blocks.{index}" if name == "the block" else f"blocks.{index}.{name}"
            raise ValueError(
                f"model: a hook hangs on {where}, which compress replaces; wanted none. "
                "Remove it, and hang it on the compressed model"
            )


def _hooked(block: OpenBlock, family: BlockFamily) -> str | None:
    """Return the name of a module that a compact one takes the place of, and that a hook hangs on."""
    kept = {layer.norm for layer in block.sublayers}
    for name, module in block.module.named_modules():
        hooks = [hook for table in hook_tables(module) for hook in table.values()]
        if module not in kept and not all(map(family.keeps_hook, hooks)):
            return name or "the block"
    return None
