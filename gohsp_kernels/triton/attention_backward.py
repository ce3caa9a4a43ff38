# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Gradients of ragged attention, with the probabilities computed again instead of kept.

With S the scores, P = softmax(S) and dO the gradient of the output O = P V, row by row:

    dV = P.T dO    dP = dO V.T    dS = P * (dP - delta), delta = sum(dO * O)    dQ = scale dS K    dK = scale dS.T Q

P comes from the scores and the log-sum that the forward pass left, in one exponential. One launch takes tiles of
queries and makes dQ (and delta), a second takes tiles of keys and makes dK and dV. Each element of the result has one
writer, so no atomics are needed and the gradient is the same at each run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._launch import dot_precision, launch
from .attention import LOG2_E, HeadLayout, layout_entry, layout_row, load_head
from .config import cdiv


@triton.jit
def probabilities(q, k, log_sum, key, tokens, scale_log2, PRECISION: tl.constexpr):
    """exp(scores) / sum, as the forward pass had it; zero where there is no key.

    A query that is not there has zeros for q, log-sum, delta and dO: its 1 adds nothing. A key that is not there has a
    score of 0, which may be so far above the log-sum that the exponential overflows.
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
    return tl.where((key < tokens)[None, :], tl.exp2(scores - log_sum[:, None]), 0.0)


@triton.jit
def query_gradient(
    qkv,
    out,
    grad_out,
    grad_qkv,
    log_sums,
    deltas,
    layout,
    batch,
    head,
    heads,
    first_query,
    tokens,
    queries,
    qkv_stride,
    out_stride,
    grad_out_stride,
    scale_log2,
    scale,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ and delta of one tile of queries of one head whose widths fit in WIDTH."""
    q_start, k_start, v_start, out_start, qk_width, v_width = layout_row(layout, head, ALIGN)
    qkv_batch = qkv + batch.to(tl.int64) * tokens * qkv_stride

    row = first_query + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)[:, None]
    row_ok = (row < queries)[:, None]
    out_row64 = batch.to(tl.int64) * queries + row64
    q = load_head(qkv_batch, row64, row_ok, q_start, qk_width, qkv_stride, WIDTH)
    o = load_head(out, out_row64, row_ok, out_start, v_width, out_stride, WIDTH)
    do = load_head(grad_out, out_row64, row_ok, out_start, v_width, grad_out_stride, WIDTH)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = (batch.to(tl.int64) * heads + head) * queries + row
    tl.store(deltas + at, delta, row < queries)
    log_sum = tl.load(log_sums + at, row < queries, 0.0)

    dq = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    for first in range(0, tokens, BLOCK_N):
        key = first + tl.arange(0, BLOCK_N)
        key64 = key.to(tl.int64)[:, None]
        key_ok = (key < tokens)[:, None]
        k = load_head(qkv_batch, key64, key_ok, k_start, qk_width, qkv_stride, WIDTH)
        v = load_head(qkv_batch, key64, key_ok, v_start, v_width, qkv_stride, WIDTH)
        p = probabilities(q, k, log_sum, key, tokens, scale_log2, PRECISION)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    c = tl.arange(0, WIDTH)[None, :]
    grad_row = grad_qkv + (batch.to(tl.int64) * tokens + row64) * qkv_stride
    tl.store(grad_row + q_start + c, dq * scale, row_ok & (c < qk_width))


@triton.jit
def key_value_gradient(
    qkv,
    grad_out,
    grad_qkv,
    log_sums,
    deltas,
    layout,
    batch,
    head,
    heads,
    first_key,
    tokens,
    queries,
    qkv_stride,
    grad_out_stride,
    scale_log2,
    scale,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dK and dV of one tile of keys of one head whose widths fit in WIDTH."""
    q_start, k_start, v_start, out_start, qk_width, v_width = layout_row(layout, head, ALIGN)
    qkv_batch = qkv + batch.to(tl.int64) * tokens * qkv_stride

    key = first_key + tl.arange(0, BLOCK_N)
    key64 = key.to(tl.int64)[:, None]
    key_ok = (key < tokens)[:, None]
    k = load_head(qkv_batch, key64, key_ok, k_start, qk_width, qkv_stride, WIDTH)
    v = load_head(qkv_batch, key64, key_ok, v_start, v_width, qkv_stride, WIDTH)

    dk = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for first in range(0, queries, BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        row64 = row.to(tl.int64)[:, None]
        row_ok = (row < queries)[:, None]
        q = load_head(qkv_batch, row64, row_ok, q_start, qk_width, qkv_stride, WIDTH)
        out_row64 = batch.to(tl.int64) * queries + row64
        do = load_head(grad_out, out_row64, row_ok, out_start, v_width, grad_out_stride, WIDTH)
        at = (batch.to(tl.int64) * heads + head) * queries + row
        log_sum = tl.load(log_sums + at, row < queries, 0.0)
        delta = tl.load(deltas + at, row < queries, 0.0)
        p = probabilities(q, k, log_sum, key, tokens, scale_log2, PRECISION)
        dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
        ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta[:, None])
        dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    c = tl.arange(0, WIDTH)[None, :]
    grad_row = grad_qkv + (batch.to(tl.int64) * tokens + key64) * qkv_stride
    tl.store(grad_row + k_start + c, dk * scale, key_ok & (c < qk_width))
    tl.store(grad_row + v_start + c, dv, key_ok & (c < v_width))


@triton.jit
def query_gradient_kernel(
    qkv,  # [batch, tokens, channels]
    out,  # [batch, queries, V channels]
    grad_out,  # as `out`
    grad_qkv,  # as `qkv`: result, the q channels of the first `queries` tokens
    log_sums,  # float32 [batch, heads, queries]
    deltas,  # float32 [batch, heads, queries]: result
    layout,  # int32 [heads, 6]
    heads,
    tokens,
    queries,
    qkv_stride,  # in units of ALIGN, like the next two
    out_stride,
    grad_out_stride,
    scale_log2,
    scale,
    LOG_NARROWEST: tl.constexpr,
    LOG_WIDEST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qkv_stride *= ALIGN
    out_stride *= ALIGN
    grad_out_stride *= ALIGN
    tiles = tl.cdiv(queries, BLOCK_M)
    first_query = (tl.program_id(0) % tiles) * BLOCK_M
    head = (tl.program_id(0) // tiles) % heads
    batch = tl.program_id(0) // (tiles * heads)
    width = tl.maximum(layout_entry(layout, head, 4, ALIGN), layout_entry(layout, head, 5, ALIGN))
    for log in tl.static_range(LOG_NARROWEST, LOG_WIDEST + 1):
        fits = (width <= (1 << log)) & ((width > (1 << log) // 2) | (log == LOG_NARROWEST))
        if (LOG_NARROWEST == LOG_WIDEST) or fits:
            query_gradient(
                qkv, out, grad_out, grad_qkv, log_sums, deltas, layout, batch, head, heads, first_query, tokens,
                queries, qkv_stride, out_stride, grad_out_stride, scale_log2, scale, PRECISION, ALIGN, 1 << log,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip


@triton.jit
def key_value_gradient_kernel(
    qkv,  # [batch, tokens, channels]
    grad_out,  # [batch, queries, V channels]
    grad_qkv,  # as `qkv`: result, the k and v channels
    log_sums,  # float32 [batch, heads, queries]
    deltas,  # float32 [batch, heads, queries]
    layout,  # int32 [heads, 6]
    heads,
    tokens,
    queries,
    qkv_stride,  # in units of ALIGN, like the next
    grad_out_stride,
    scale_log2,
    scale,
    LOG_NARROWEST: tl.constexpr,
    LOG_WIDEST: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qkv_stride *= ALIGN
    grad_out_stride *= ALIGN
    tiles = tl.cdiv(tokens, BLOCK_N)
    first_key = (tl.program_id(0) % tiles) * BLOCK_N
    head = (tl.program_id(0) // tiles) % heads
    batch = tl.program_id(0) // (tiles * heads)
    width = tl.maximum(layout_entry(layout, head, 4, ALIGN), layout_entry(layout, head, 5, ALIGN))
    for log in tl.static_range(LOG_NARROWEST, LOG_WIDEST + 1):
        fits = (width <= (1 << log)) & ((width > (1 << log) // 2) | (log == LOG_NARROWEST))
        if (LOG_NARROWEST == LOG_WIDEST) or fits:
            key_value_gradient(
                qkv, grad_out, grad_qkv, log_sums, deltas, layout, batch, head, heads, first_key, tokens, queries,
                qkv_stride, grad_out_stride, scale_log2, scale, PRECISION, ALIGN, 1 << log, BLOCK_M, BLOCK_N,
            )  # fmt: skip


def attention_gradient(
    grad_out: Tensor, qkv: Tensor, out: Tensor, log_sums: Tensor, layout: HeadLayout, scale: float
) -> Tensor:
    """Gradient of ``qkv`` [batch, tokens, channels].

    Args:
        grad_out: [batch, queries, V channels], tokens evenly spaced, the last dimension contiguous; as the next two.
        qkv: [batch, tokens, channels], contiguous.
        out: [batch, queries, V channels], what the forward pass gave.
        log_sums: float32 [batch, heads in the layout, queries], what it left.
        layout: of the heads.
        scale: factor on the scores.
    """
    batch, tokens, _ = qkv.shape
    queries, heads = out.shape[1], layout.table.shape[0]
    # Channels that no program writes: queries past the asked ones, heads without output, padding.
    grad_qkv = torch.zeros_like(qkv)
    deltas = torch.empty_like(log_sums)
    target = config.Target.of(qkv.device)
    tile = config.attention_gradient_tile(target, qkv.element_size(), 1 << layout.log_widest, layout.align > 1)
    meta = dict(
        LOG_NARROWEST=layout.log_narrowest,
        LOG_WIDEST=layout.log_widest,
        PRECISION=dot_precision(qkv.dtype, qkv.device),
        ALIGN=layout.align,
        **tile.meta,
    )
    scales = (scale * LOG2_E, scale)
    launch(
        query_gradient_kernel,
        cdiv(queries, tile.BLOCK_M) * heads * batch,
        qkv.device,
        *(qkv, out, grad_out, grad_qkv, log_sums, deltas, layout.table, heads, tokens, queries),
        *(t.stride(1) // layout.align for t in (qkv, out, grad_out)),
        *scales,
        **meta,
    )
    launch(
        key_value_gradient_kernel,
        cdiv(tokens, tile.BLOCK_N) * heads * batch,
        qkv.device,
        *(qkv, grad_out, grad_qkv, log_sums, deltas, layout.table, heads, tokens, queries),
        *(t.stride(1) // layout.align for t in (qkv, grad_out)),
        *scales,
        **meta,
    )
    return grad_qkv
