# SPDX-License-Identifier: Apache-2.0
"""timm's modules of relative positions, which are added to scores of attention, as tables.

However a dense model comes to its biases, a compressed one has a table of them in each block, a column for each head
that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.layers.pos_embed_rel import gen_relative_position_index
from torch import Tensor, nn

from gohsp.layers import PrunedAttention
from gohsp.models.base import ScoreBias
from gohsp.models.timm_parts import unfilled


def why_positions(source: nn.Module | None) -> str | None:
    """Return why relative positions are none that a table can hold, or None if they are."""
    if source is None or type(source) in (RelPosBias, RelPosBiasTf, RelPosMlp):
        return None
    return f"attn.rel_pos is {type(source).__name__}; wanted timm's RelPosBias, RelPosBiasTf or RelPosMlp"


def bias_of(source: Any) -> ScoreBias | None:
    """Return the biases of a module of timm's as a table, which :func:`why_positions` has nothing against."""
    if source is None:
        return None
    trains = any(parameter.requires_grad for parameter in source.parameters())
    if isinstance(source, RelPosMlp):
        return ScoreBias(partial(_computed, source), _padded_index(source), trains)
    if isinstance(source, RelPosBiasTf):
        return ScoreBias(partial(_seen_flat, source), _index_of_keys(source), trains)
    index = real_index(source, gen_relative_position_index, class_token=source.prefix_tokens > 0)
    return ScoreBias(partial(getattr, source, "relative_position_bias_table"), index, trains)


def real_index(source: Any, make: Any, **more: Any) -> Tensor:
    """Return the index of relative positions, [N, N], real where the model is on meta: no file holds it."""
    index: Tensor = source.relative_position_index
    if index.is_meta:
        index = make(source.window_size, **more)
    side = round(index.numel() ** 0.5)
    return index.view(side, side)


def plain_positions(attn: PrunedAttention, window_size: Sequence[int]) -> nn.Module | None:
    """Return timm's module of relative positions with the table of a compact attention; None without one.

    Args:
        attn: The compact attention.
        window_size: (height, width) of the tokens that attend to each other.
    """
    bias = attn.position_bias
    if bias is None:
        return None
    table, index = bias.table, bias.index
    own = gen_relative_position_index((window_size[0], window_size[1])).to(index.device)
    if own.shape == index.shape and torch.equal(index, own.T):  # RelPosBias counts the other way round
        table, index = nn.Parameter(table.detach().flip(0), requires_grad=table.requires_grad), own
    plain = unfilled(RelPosBias, window_size=tuple(window_size), num_heads=1)
    plain.relative_position_bias_table, plain.bias_shape = table, (*index.shape, len(attn.heads))
    plain.register_buffer("relative_position_index", index.flatten(), persistent=False)
    return cast(nn.Module, plain)


def _seen_flat(source: RelPosBiasTf) -> Tensor:
    """Return the table of a module that has heads in front of rows and columns."""
    return source.relative_position_bias_table.flatten(1).T


def _index_of_keys(source: RelPosBiasTf) -> Tensor:
    """Return the index of positions that are counted from a key to a query, as TensorFlow's are: [N, N]."""
    index: Tensor = gen_relative_position_index(source.window_size).T.contiguous()
    device = source.relative_position_bias_table.device
    return index if device.type == "meta" else index.to(device)


def _computed(source: RelPosMlp) -> Tensor:
    """Return the table that an MLP of positions gives."""
    mlp = source.mlp
    # Step by step, because a call in training would drop some of its neurons.
    table = source.bias_act(mlp.fc2(mlp.norm(mlp.act(mlp.fc1(source.rel_coords_log)))).flatten(0, 1))
    table = table if source.bias_gain is None else source.bias_gain * table
    # Tokens in front of the image have no position: a row of zeros.
    return F.pad(table, (0, 0, 0, 1)) if source.prefix_tokens else table


def _padded_index(source: RelPosMlp) -> Tensor:
    index = real_index(source, gen_relative_position_index)
    rows, columns = source.window_size
    last = (2 * rows - 1) * (2 * columns - 1)
    return F.pad(index, (source.prefix_tokens, 0, source.prefix_tokens, 0), value=last)
