# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Gradients of the packed linear layer.

With G the gradient before the activation, for the computed columns only:

    d weight = G.T @ norm(x)[:, in_cols]      d bias = G summed over rows      d norm(x)[:, in_cols] = G @ weight

The last is the forward kernel again, with the transposed weight and the column lists exchanged. The first sums over all
rows; to give every multiprocessor work it is cut into row ranges, whose sums are added in a fixed order: the same
gradient at each run, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._launch import dot_precision, launch
from .activations import activation_slope
from .config import cdiv
from .rows import load_again


@triton.jit
def epilogue_gradient_kernel(
    grad_out,  # [rows, out_features]
    pre_activation,  # [rows, n_out] or None
    grad,  # [rows, n_out]: result
    out_cols,  # int32 [out_features] or None: the n_out features that are computed, then the others
    rows,
    n_out,
    grad_out_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Back through scatter and activation: one tile of the gradient of what goes into the activation."""
    tiles = tl.cdiv(n_out, BLOCK_N)
    row = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = (row < rows)[:, None] & (n < n_out)[None, :]
    row64 = row.to(tl.int64)[:, None]
    col = (n if out_cols is None else tl.load(out_cols + n, n < n_out, 0))[None, :]
    g = tl.load(grad_out + row64 * grad_out_stride + col, ok, 0.0).to(tl.float32)
    if pre_activation is not None:
        g *= activation_slope(tl.load(pre_activation + row64 * n_out + n[None, :], ok, 0.0).to(tl.float32), ACTIVATION)
    tl.store(grad + row64 * n_out + n[None, :], g, ok)


@triton.jit
def weight_gradient_kernel(
    grad,  # [rows, n_out]
    x,  # [rows, features]
    statistics,  # float32 [rows, 2] or None: mean and 1 / std of each row of x, if it is to be normalised
    in_cols,  # int32 [features] or None: the n_in features that are read, then the others
    weight_grad,  # float32 [ranges, n_out, n_in]: result
    bias_grad,  # float32 [ranges, n_out]: result
    rows,
    rows_per_range,
    n_out,
    n_in,
    grad_stride,
    x_stride,
    PRECISION: tl.constexpr,
    READ_FROM_SHARED: tl.constexpr,  # see config.read_from_shared
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A BLOCK_M x BLOCK_N tile of the weight's gradient over one range of rows, BLOCK_K rows a step."""
    tiles_in = tl.maximum(tl.cdiv(n_in, BLOCK_N), 1)  # the bias has a gradient even without an input
    tiles = tl.cdiv(n_out, BLOCK_M) * tiles_in
    part = tl.program_id(0) // tiles
    o = ((tl.program_id(0) % tiles) // tiles_in) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_in = tl.program_id(0) % tiles_in
    i = tile_in * BLOCK_N + tl.arange(0, BLOCK_N)
    col = i if in_cols is None else tl.load(in_cols + i, i < n_in, 0)
    first = part * rows_per_range
    last = tl.minimum(first + rows_per_range, rows)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias = tl.zeros([BLOCK_M], tl.float32)
    for r0 in range(first, last, BLOCK_K):
        row = r0 + tl.arange(0, BLOCK_K)
        row_ok = (row < last)[:, None]
        row64 = row.to(tl.int64)[:, None]
        g_at = grad + row64 * grad_stride + o[None, :]
        g_ok = row_ok & (o < n_out)[None, :]
        g = tl.load(g_at, g_ok, 0.0)
        a = tl.load(x + row64 * x_stride + col[None, :], row_ok & (i < n_in)[None, :], 0.0)
        if statistics is not None:
            mean = tl.load(statistics + 2 * row, row < last, 0.0)[:, None]
            rstd = tl.load(statistics + 2 * row + 1, row < last, 0.0)[:, None]
            a = ((a.to(tl.float32) - mean) * rstd).to(x.dtype.element_ty)
        acc = tl.dot(tl.trans(g), a, acc, input_precision=PRECISION)
        if READ_FROM_SHARED and statistics is None:  # a normalised ``a`` makes the product wait by itself
            g = load_again(g_at, g_ok)
        bias += tl.sum(g.to(tl.float32), 0)
    out_row = (part.to(tl.int64) * n_out + o)[:, None] * n_in
    tl.store(weight_grad + out_row + i[None, :], acc, (o < n_out)[:, None] & (i < n_in)[None, :])
    tl.store(bias_grad + part.to(tl.int64) * n_out + o, bias, (o < n_out) & (tile_in == 0))


@triton.jit
def norm_gradient_kernel(
    grad,  # [rows, n_in]: gradient of the normalised features that were read
    x,  # [rows, features]
    statistics,  # float32 [rows, 2]
    position,  # int32 [features] or None: column of grad that a feature has, or -1
    out,  # [rows, features]: result
    rows,
    features,
    grad_stride,
    x_stride,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Back through a LayerNorm without affine part: the mean and the part along the normalised row drop out."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row64 = row.to(tl.int64)[:, None]
    c = tl.arange(0, WIDTH)
    ok = (row < rows)[:, None] & (c < features)[None, :]
    at = c if position is None else tl.load(position + c, c < features, -1)
    g = tl.load(grad + row64 * grad_stride + at[None, :], ok & (at >= 0)[None, :], 0.0).to(tl.float32)
    mean = tl.load(statistics + 2 * row, row < rows, 0.0)[:, None]
    rstd = tl.load(statistics + 2 * row + 1, row < rows, 0.0)[:, None]
    values = tl.load(x + row64 * x_stride + c[None, :], ok, 0.0).to(tl.float32)
    normed = tl.where(ok, (values - mean) * rstd, 0.0)
    along = tl.sum(g * normed, 1) / features
    common = tl.sum(g, 1) / features
    tl.store(out + row64 * features + c[None, :], rstd * (g - common[:, None] - normed * along[:, None]), ok)


def epilogue_gradient(
    grad_out: Tensor, pre_activation: Tensor | None, out_cols: Tensor | None, n_out: int, activation: str
) -> Tensor:
    """Gradient [rows, n_out] of what goes into the activation, from that of the output [rows, out_features].

    Args:
        grad_out: the last dimension contiguous.
        pre_activation: [rows, n_out]; None where the activation is the identity.
        out_cols: int32 [out_features], the computed columns first, or None.
        n_out: number of computed columns.
        activation: its name.
    """
    rows = grad_out.shape[0]
    grad = grad_out.new_empty(rows, n_out)
    launch(
        epilogue_gradient_kernel,
        cdiv(rows, 32) * cdiv(n_out, 64),
        grad.device,
        grad_out,
        pre_activation,
        grad,
        out_cols,
        rows,
        n_out,
        grad_out.stride(0),
        ACTIVATION=activation,
        BLOCK_M=32,
        BLOCK_N=64,
        num_warps=4,
    )
    return grad


def weight_gradient(
    grad: Tensor, x: Tensor, n_in: int, in_cols: Tensor | None, statistics: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients [outputs, inputs] of the weight and [outputs] of the bias, both float32.

    Args:
        grad: [rows, outputs]; the last dimension contiguous.
        x: [rows, features]; the last dimension contiguous.
        n_in: number of features that are read.
        in_cols: int32 [features], those that are read first, or None.
        statistics: float32 [rows, 2] if ``x`` is normalised.
    """
    rows, n_out = grad.shape
    tile = config.WEIGHT_GRADIENT_TILE
    tiles = cdiv(n_out, tile.BLOCK_M) * max(cdiv(n_in, tile.BLOCK_N), 1)
    target = config.Target.of(x.device)
    rows_per_range = config.rows_per_range(target, rows, tiles, tile.BLOCK_K)
    ranges = cdiv(rows, rows_per_range)
    weight_grad = x.new_empty(ranges, n_out, n_in, dtype=torch.float32)
    bias_grad = x.new_empty(ranges, n_out, dtype=torch.float32)
    launch(
        weight_gradient_kernel,
        tiles * ranges,
        x.device,
        grad,
        x,
        statistics,
        in_cols,
        weight_grad,
        bias_grad,
        rows,
        rows_per_range,
        n_out,
        n_in,
        grad.stride(0),
        x.stride(0),
        PRECISION=dot_precision(x.dtype, x.device),
        READ_FROM_SHARED=config.read_from_shared(target, tile.BLOCK_M),
        **tile.meta,
    )
    return weight_grad.sum(0), bias_grad.sum(0)


def norm_gradient(grad: Tensor, x: Tensor, statistics: Tensor, in_cols: Tensor | None) -> Tensor:
    """Gradient [rows, features] of what went into the LayerNorm.

    Args:
        grad: [rows, inputs], of the normalised features that were read; the last dimension contiguous.
        x: [rows, features]; the last dimension contiguous.
        statistics: float32 [rows, 2]: mean and 1 / standard deviation.
        in_cols: int32 [features], the features that were read first, or None.
    """
    rows, features = x.shape
    position = None
    if in_cols is not None:
        n_in = grad.shape[1]
        position = torch.full_like(in_cols, -1)
        position[in_cols[:n_in].long()] = torch.arange(n_in, dtype=in_cols.dtype, device=in_cols.device)
    out = x.new_empty(rows, features)
    width = max(16, triton.next_power_of_2(features))
    block_m = max(1, 4096 // width)  # 32 elements a thread
    launch(
        norm_gradient_kernel,
        cdiv(rows, block_m),
        x.device,
        grad,
        x,
        statistics,
        position,
        out,
        rows,
        features,
        grad.stride(0),
        x.stride(0),
        BLOCK_M=block_m,
        WIDTH=width,
        num_warps=4,
    )
    return out
