# SPDX-License-Identifier: Apache-2.0
"""The way back from a compact model to the dense shape, so that it can be pruned further."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from gohsp.layers import CompactLayerScale, PrunedAttention, PrunedMlp, find_bare_blocks
from gohsp.masks.mask import ModelMask
from gohsp.models.base import Attention, CompactBlock, Mlp, Projection
from gohsp.models.registry import family_of, geometry_of, open_model


@torch.no_grad()
def expand(model: nn.Module) -> tuple[nn.Module, ModelMask]:
    """Return a compressed model in its dense shape, with zeros where something was pruned, and its mask.

    The two are what :func:`gohsp.compress` makes the same model of. The dense model has the weights of now, as they
    were fine-tuned or loaded; it can be ranked, pruned further and trained. What is zero costs :func:`gohsp.prune`
    nothing and so goes first; its target is still a share of the dense cost.

    Args:
        model: A model made by :func:`gohsp.compress` or :func:`gohsp.load`. It is not changed.

    Raises:
        ValueError: The model is not compressed, or frozen; a hook or an adapter hangs in one of its blocks; a file
            could not describe the dense model either (see :func:`gohsp.save`); or the dense model has no place for
            something that the compact one has learnt.
    """
    blocks: list[Any] = find_bare_blocks(model)
    family, like = family_of(model), next(model.parameters())
    dense = family.build(family.describe(model, geometry_of(model)))
    _fill(dense, like)
    dense.load_state_dict(_outside(model), strict=False)
    for index, (block, compact) in enumerate(zip(open_model(dense).blocks, blocks, strict=True)):
        try:
            _write_attention(block.attention, compact.attn, compact)
            _write_mlp(block.mlp, compact.mlp, compact)
        except _NoPlace as error:
            raise ValueError(f"model: cannot expand block {index}: {error}") from error
    return dense.train(model.training), ModelMask.of(model)


class _NoPlace(Exception):
    """The dense model has no parameter for something that is to be written."""


def _fill(dense: nn.Module, like: Tensor) -> None:
    """Give a model on meta parameters of zeros, and the buffers that its library computes and no file holds."""
    computed = []
    for module in dense.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.zeros_like(parameter, device=like.device))
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=like.device)
                computed.append(module)
    dense.to(like.device, like.dtype)
    for module in dict.fromkeys(computed):
        if hasattr(module, "init_non_persistent_buffers"):
            cast(Any, module).init_non_persistent_buffers()


def _outside(model: nn.Module) -> dict[str, Tensor]:
    """Return what a file would hold of a compressed model, but for its blocks."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, CompactBlock))
    return {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}


def _write_attention(into: Attention, attn: PrunedAttention, block: Any) -> None:
    layout = block.mask.layout()
    _write(into.read, attn.qkv, layout.qkv_rows, layout.attn_in)
    _write(into.write, attn.proj, layout.attn_out, layout.proj_cols)
    for norm, own in ((into.norm, block.norm1), (into.q_norm, attn.q_norm), (into.k_norm, attn.k_norm)):
        norm.load_state_dict(own.state_dict())
    _write_inner_norm(into.inner_norm, attn.inner_norm, layout.proj_cols)
    _write_scale(into.scale, block.ls1)
    if into.bias is not None and attn.position_bias is not None:
        table = into.bias.table
        if not isinstance(table if table._base is None else table._base, nn.Parameter):
            raise _NoPlace("its table of relative positions is one that the dense model computes")
        table[:, list(attn.heads)] = attn.position_bias.table
    if into.logit_scale is not None and attn.logit_scale is not None:
        into.logit_scale[list(attn.heads)] = attn.logit_scale


def _write_mlp(into: Mlp, mlp: PrunedMlp, block: Any) -> None:
    layout = block.mask.layout()
    rows, matrix = layout.hidden, cast(Any, mlp.fc1)
    if mlp.gate is not None:
        first, last = (mlp.fc1, mlp.gate) if into.gate == "last" else (mlp.gate, mlp.fc1)
        rows, matrix = into.rows(rows), _Stacked(first, last)
    _write(into.read, matrix, rows, layout.mlp_in)
    _write(into.write, mlp.fc2, layout.mlp_out, layout.hidden)
    into.norm.load_state_dict(block.norm2.state_dict())
    into.own_norm.load_state_dict(mlp.norm.state_dict())
    _write_inner_norm(into.inner_norm, mlp.inner_norm, layout.hidden)
    _write_scale(into.scale, block.ls2)


class _Stacked:
    """Two linear layers that read the same, one above the other."""

    def __init__(self, first: Any, last: Any) -> None:
        self.weight = torch.cat((first.weight, last.weight))
        self.bias = None if first.bias is None else torch.cat((first.bias, last.bias))


def _write(into: Projection, compact: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    """Write a compact matrix and its bias into the rows and columns that they were cut from; zeros elsewhere."""
    weight = torch.zeros_like(into.weight)
    rows = _all(rows, weight.shape[0]).to(weight.device)
    columns = _all(columns, weight.shape[1]).to(weight.device)
    weight[rows[:, None], columns] = compact.weight
    bias = None
    if compact.bias is not None:
        bias = weight.new_zeros(len(weight)).index_copy(0, rows, compact.bias)
    into.write_(weight, bias)
    if bias is not None and (into.bias is None or not torch.equal(into.bias, bias)):
        raise _NoPlace("a bias was learnt where the dense model has none")


def _all(kept: Tensor | None, size: int) -> Tensor:
    return torch.arange(size, device="cpu") if kept is None else kept


def _write_inner_norm(into: Any, compact: Any, kept: Tensor) -> None:
    if isinstance(compact, nn.Identity):
        return
    for name, value, elsewhere in (("weight", compact.weight, 1.0), ("bias", compact.bias, 0.0)):
        if value is not None:
            getattr(into, name).fill_(elsewhere).index_copy_(0, kept.to(value.device), value)


def _write_scale(into: Any, compact: nn.Module) -> None:
    if isinstance(compact, CompactLayerScale):
        into.gamma.fill_(1.0)  # of what is not written, which is zero
        into.gamma.index_copy_(0, _all(compact.out_cols, compact.dim).to(into.gamma.device), compact.gamma)
