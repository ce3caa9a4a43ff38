# SPDX-License-Identifier: Apache-2.0
"""Inference only: a compressed model that holds its weights once, packed for the kernels."""

from __future__ import annotations

from torch import nn

import gohsp_kernels as gk
from gohsp.layers import FrozenBlock, FrozenBlocks, find_bare_blocks
from gohsp.models.registry import family_of
from gohsp_kernels.formats import FORMATS


def freeze(model: nn.Module, weights: str = "float32") -> nn.Module:
    """Return the compressed model for inference on the CPU kernels, without the compact parameters of its blocks.

    A compressed model keeps its compact parameters beside the packed form that the kernels read, so that it can be
    trained, saved and moved. The frozen one cannot: its blocks have no parameters, and their weights are in memory
    once. A plain patch embedding, with class token and positions, and a linear head are packed as well.
    Everything else is copied, so that the result is a snapshot: neither model changes the other. Drop the given one to
    free its memory.

    Args:
        model: A model made by :func:`gohsp.compress` or :func:`gohsp.load`, float32 on the CPU.
        weights: "float32" gives the results of the given model. "bfloat16" holds the matrices of the blocks in
            bfloat16 and rounds the activations in front of them and what meets in attention: half of the memory. CPUs
            whose instructions for it gain nothing over float32 refuse it; the message says what was measured.
            LayerNorm, softmax, sums and residual stream stay in float32. "int8" holds the matrices of the blocks in
            8 bits, with one scale an output after everything is folded in that can be, and turns the activations in
            front of them into 8 bits row by row: a quarter of the memory. Nothing evens out the errors of the last
            block, so it is bfloat16 then, or float32 where the CPU refuses that; so are the patch embedding and what
            meets in attention. LayerNorm, softmax and residual stay in float32, and so does the head in every form.
            Neither rounded form gives the same results: try it on your own images.

    Raises:
        ValueError: The model is not compressed, a hook or an adapter in one of its blocks would be lost, its weights
            are not float32 on the CPU, or there are no weights of that name.
        RuntimeError: The CPU kernels cannot run here, or not with such weights; the message says why.
    """
    support = gk.can_run("cpu", weights=weights)
    if not support:
        raise RuntimeError(f"backend 'cpu': {support.reason}")
    family_of(model).refresh(model)
    *blocks, last = find_bare_blocks(model)
    of_ends = next(name for name in FORMATS[weights].ends if gk.can_run("cpu", weights=name))
    packed = FrozenBlocks(*(FrozenBlock(block, weights) for block in blocks), FrozenBlock(last, of_ends))
    return family_of(model).freeze(model, packed, of_ends).eval()
