# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Attention over heads of any widths, in one launch and without a score matrix in memory.

A program takes one tile of queries of one head of one image and goes over the keys with the online softmax. Where its
head's channels lie, and how many there are, it reads from the layout. Widths are padded to 16, 32, 64 or 128, in
registers only: the body is compiled once for each padded width that the layout spans, and a program branches to the one
that its head fits.

A head without QK channels has scores of zero and so gives the mean of its values; nothing is special about it here. A
head without V channels has no output, and no program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._launch import dot_precision, launch
from .config import cdiv

LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class HeadLayout:
    """Where the channels of each head lie in a row of qkv and in a row of the output."""

    table: Tensor  # int32 [heads with output, 6]: first q, k, v and output channel, QK width, V width
    qkv_channels: int
    out_channels: int
    log_narrowest: int  # of the padded widths
    log_widest: int
    align: int  # every number in the table is a multiple of it

    @staticmethod
    @functools.cache  # without a limit: a captured graph reads the table by its address
    def of(qk_widths: tuple[int, ...], v_widths: tuple[int, ...], device: torch.device) -> HeadLayout:
        """Layout of heads that follow one another: q of all, k of all, v of all.

        Raises:
            ValueError: for a head wider than the kernels take.
        """
        n_qk = sum(qk_widths)
        rows, padded = [], []
        qk_start = v_start = 0
        for qk, v in zip(qk_widths, v_widths, strict=True):
            if v > 0:
                rows.append((qk_start, n_qk + qk_start, 2 * n_qk + v_start, v_start, qk, v))
                padded.append(padded_width(max(qk, v)))
            qk_start, v_start = qk_start + qk, v_start + v
        table = torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 6)
        logs = [width.bit_length() - 1 for width in padded] or [4]
        align = 8 if all(width % 8 == 0 for width in (*qk_widths, *v_widths)) else 1
        return HeadLayout(table, 2 * n_qk + v_start, v_start, min(logs), max(logs), align)


def padded_width(width: int) -> int:
    """The width that a head takes in registers.

    Raises:
        ValueError: for a head wider than the kernels take.
    """
    for padded in config.WIDTHS:
        if width <= padded:
            return padded
    raise ValueError(f"qk_widths, v_widths: wanted heads of at most {config.WIDTHS[-1]} channels; got {width}")


@triton.jit
def layout_entry(layout, head, i, ALIGN: tl.constexpr):
    """Number ``i`` of a head in the layout; that it is a multiple of ALIGN is what lets loads be wide."""
    return tl.multiple_of(tl.load(layout + 6 * head + i), ALIGN)


@triton.jit
def layout_row(layout, head, ALIGN: tl.constexpr):
    """First q, k, v and output channel of a head, its QK width and its V width."""
    q_start = layout_entry(layout, head, 0, ALIGN)
    k_start = layout_entry(layout, head, 1, ALIGN)
    v_start = layout_entry(layout, head, 2, ALIGN)
    out_start = layout_entry(layout, head, 3, ALIGN)
    return (
        q_start,
        k_start,
        v_start,
        out_start,
        layout_entry(layout, head, 4, ALIGN),
        layout_entry(layout, head, 5, ALIGN),
    )


@triton.jit
def load_head(base, row64, row_ok, start, width, stride, WIDTH: tl.constexpr):
    """Rows of one head's q, k, v or output, padded with zeros to [rows, WIDTH]."""
    c = tl.arange(0, WIDTH)[None, :]
    return tl.load(base + row64 * stride + start + c, row_ok & (c < width), 0.0)


@triton.jit
def normalise_head(x, weight, bias, width, eps, WIDTH: tl.constexpr):
    """LayerNorm over the channels of a head, for models that have one on q and k; the padding stays zero."""
    c = tl.arange(0, WIDTH)
    ok = c < width
    values = x.to(tl.float32)
    centred = tl.where(ok[None, :], values - (tl.sum(values, 1) / width)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    normed = centred * rstd[:, None] * tl.load(weight + c, ok, 0.0).to(tl.float32)[None, :]
    if bias is not None:
        normed += tl.load(bias + c, ok, 0.0).to(tl.float32)[None, :]
    return normed.to(x.dtype)


@triton.jit
def attend(
    qkv,
    out,
    log_sums,
    layout,
    q_weight,
    q_bias,
    k_weight,
    k_bias,
    batch,
    head,
    heads,
    first_query,
    tokens,
    queries,
    qkv_stride,
    out_stride,
    scale_log2,
    eps,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of queries of one head whose widths fit in WIDTH."""
    q_start, k_start, v_start, out_start, qk_width, v_width = layout_row(layout, head, ALIGN)
    qkv_batch = qkv + batch.to(tl.int64) * tokens * qkv_stride

    row = first_query + tl.arange(0, BLOCK_M)
    row_ok = (row < queries)[:, None]
    q = load_head(qkv_batch, row.to(tl.int64)[:, None], row_ok, q_start, qk_width, qkv_stride, WIDTH)
    if q_weight is not None:
        q = normalise_head(q, q_weight, q_bias, qk_width, eps, WIDTH)

    # Running maximum, and relative to it the sum of exponentials and the values that they weigh.
    high = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for first in range(0, tokens, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        key64 = key.to(tl.int64)[:, None]
        key_ok = (key < tokens)[:, None]
        k = load_head(qkv_batch, key64, key_ok, k_start, qk_width, qkv_stride, WIDTH)
        if k_weight is not None:
            k = normalise_head(k, k_weight, k_bias, qk_width, eps, WIDTH)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        scores = tl.where((key < tokens)[None, :], scores, float("-inf"))
        new_high = tl.maximum(high, tl.max(scores, 1))
        p = tl.exp2(scores - new_high[:, None])
        rescale = tl.exp2(high - new_high)
        total = total * rescale + tl.sum(p, 1)
        v = load_head(qkv_batch, key64, key_ok, v_start, v_width, qkv_stride, WIDTH)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        high = new_high

    c = tl.arange(0, WIDTH)[None, :]
    out_row = out + (batch.to(tl.int64) * queries + row)[:, None] * out_stride
    tl.store(out_row + out_start + c, acc / total[:, None], row_ok & (c < v_width))
    if log_sums is not None:
        tl.store(log_sums + (batch.to(tl.int64) * heads + head) * queries + row, high + tl.log2(total), row < queries)


@triton.jit
def attention_kernel(
    qkv,  # [batch, tokens, channels]
    out,  # [batch, queries, V channels]
    log_sums,  # float32 [batch, heads, queries] or None: where to leave log2 of the sum of the exponentials
    layout,  # int32 [heads, 6]
    q_weight,  # [head width] or None, like the next three: LayerNorm on q and k
    q_bias,
    k_weight,
    k_bias,
    heads,
    tokens,
    queries,
    qkv_stride,  # in units of ALIGN, which is how the compiler learns that it is a multiple; like the next
    out_stride,
    scale_log2,  # factor on the scores, times log2(e), as 2^x is what the hardware has
    eps,
    LOG_NARROWEST: tl.constexpr,
    LOG_WIDEST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qkv_stride *= ALIGN
    out_stride *= ALIGN
    tiles = tl.cdiv(queries, BLOCK_M)
    first_query = (tl.program_id(0) % tiles) * BLOCK_M
    head = (tl.program_id(0) // tiles) % heads
    batch = tl.program_id(0) // (tiles * heads)
    width = tl.maximum(layout_entry(layout, head, 4, ALIGN), layout_entry(layout, head, 5, ALIGN))
    for log in tl.static_range(LOG_NARROWEST, LOG_WIDEST + 1):
        # One branch is taken; a layout of one padded width has one branch and no test.
        fits = (width <= (1 << log)) & ((width > (1 << log) // 2) | (log == LOG_NARROWEST))
        if (LOG_NARROWEST == LOG_WIDEST) or fits:
            attend(
                qkv, out, log_sums, layout, q_weight, q_bias, k_weight, k_bias, batch, head, heads, first_query, tokens,
                queries, qkv_stride, out_stride, scale_log2, eps, PRECISION, ALIGN, 1 << log, BLOCK_M, BLOCK_N,
            )  # fmt: skip


def attention(
    qkv: Tensor,
    layout: HeadLayout,
    scale: float,
    num_queries: int,
    *,
    norms: Sequence[Tensor | None] = (None, None, None, None),
    eps: float = 0.0,
    out: Tensor | None = None,
    log_sums: Tensor | None = None,
    tile: config.AttentionTile | None = None,
) -> Tensor:
    """Launch it.

    Args:
        qkv: [batch, tokens, channels]; tokens evenly spaced, the last dimension contiguous.
        layout: where the heads lie in a row.
        scale: factor on the scores.
        num_queries: compute the first so many tokens.
        norms: weight and bias of a LayerNorm on q, then on k.
        eps: of those.
        out: [batch, num_queries, layout.out_channels], may have wider rows; by default a new tensor.
        log_sums: float32 [batch, heads in the layout, num_queries], filled with log2 of the sums of exponentials.
        tile: instead of the one that the rule chooses.
    """
    batch, tokens, _ = qkv.shape
    heads = layout.table.shape[0]
    if out is None:
        out = qkv.new_empty(batch, num_queries, layout.out_channels)
    if tile is None:
        target = config.Target.of(qkv.device)
        widest = 1 << layout.log_widest
        tile = config.attention_tile(target, qkv.dtype, num_queries, tokens, widest, layout.align > 1)
    launch(
        attention_kernel,
        cdiv(num_queries, tile.BLOCK_M) * heads * batch,
        qkv.device,
        qkv,
        out,
        log_sums,
        layout.table,
        *norms,
        heads,
        tokens,
        num_queries,
        qkv.stride(1) // layout.align,
        out.stride(1) // layout.align,
        scale * LOG2_E,
        eps,
        LOG_NARROWEST=layout.log_narrowest,
        LOG_WIDEST=layout.log_widest,
        PRECISION=dot_precision(qkv.dtype, qkv.device),
        ALIGN=layout.align,
        **tile.meta,
    )
    return out
