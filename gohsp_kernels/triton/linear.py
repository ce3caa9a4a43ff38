# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""Packed linear layer: gather, LayerNorm, product, bias, activation, layer scale, residual and scatter in one launch.

    out[:, out_cols] = residual[:, out_cols] + scale * act(norm(x)[:, in_cols] @ weight.T + bias)

and the other columns of ``out`` are those of the residual, or zero. Each element of ``out`` has one writer (columns are
disjoint), so no atomics are needed and the result is the same at each run.

LayerNorm's affine part is folded into ``weight`` and ``bias`` beforehand. Its statistics are gathered while the product
runs and applied to the accumulator, by linearity:

    norm(x) @ W.T = ((x - p) @ W.T - (mean - p) * rowsum(W)) * rstd        for any number p a row

Against normalising the operand first, this saves a launch and a pass over ``x``, leaves the operand as it was loaded
(so that it can be copied asynchronously) and, in 16 bit, spares a rounding: ``x`` enters the tensor core exactly, where
a normalised operand would be rounded to 11 or 8 bits. Products of 16-bit numbers are exact in the float32 accumulator,
so the subtraction costs about |mean - p| / std of its roundings, provided that ``rowsum`` is taken of the *rounded*
weights. A tf32 product does round ``x``; so float32 operands are shifted by a pivot p, the mean of the first BLOCK_K
features of the row. For 16 bit, p = 0. The sum of squares is always taken about that pivot: the mean of m of D numbers
is never further than std * sqrt(D / m - 1) from the mean of all, which bounds the cancellation in the variance for
every input. tests/gohsp_kernels/triton/test_norm_algebra.py measures all this against float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import config
from ._launch import dot_precision, launch
from .activations import activate
from .config import cdiv
from .rows import load_again


@triton.jit
def linear_kernel(
    x,  # [rows, features]
    weight,  # [n_out, n_in]
    out,  # [rows, out_features]
    bias,  # float32 [n_out] or None, like the next two
    row_sum,  # sums of weight's rows; given when x is to be normalised
    scale,
    residual,  # [rows, out_features] or None
    pre_activation,  # [rows, n_out] or None: where to leave what goes into the activation
    statistics,  # float32 [rows, 2] or None: where to leave mean and 1 / std
    in_cols,  # int32 [features] or None: the n_in features that are read, then the others
    out_cols,  # int32 [out_features] or None: the n_out features that are computed, then the others
    rows,
    features,
    n_in,  # in units of IN_ALIGN, which is how the compiler learns that it is a multiple; like x_stride
    n_out,
    out_features,
    x_stride,
    weight_stride_out,
    weight_stride_in,
    out_stride,
    residual_stride,
    eps,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    READ_FROM_SHARED: tl.constexpr,  # see config.read_from_shared
    IN_ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n_in *= IN_ALIGN
    x_stride *= IN_ALIGN
    # Column tiles of a row tile are neighbours in the grid: they run together and share the rows of x in L2.
    tiles_kept = tl.cdiv(n_out, BLOCK_N)
    tiles = tiles_kept + tl.cdiv(out_features - n_out, BLOCK_N)
    tile_n = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = (row < rows)[:, None]
    row64 = row.to(tl.int64)[:, None]
    x_row = x + row64 * x_stride

    # The tiles past `tiles_kept` have the columns that nothing is added to: no product, the same epilogue.
    kept = tile_n < tiles_kept
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n = tl.where(kept, n, n - tiles_kept * BLOCK_N + n_out)
    n_ok = n < tl.where(kept, n_out, out_features)
    n_kept = n < n_out
    depth = tl.where(kept, n_in, 0)

    # Operands of the product stay as loaded in 16 bit; float32 is shifted by the pivot (see the head of the file).
    SHIFT: tl.constexpr = row_sum is not None and x.dtype.element_ty == tl.float32
    if row_sum is not None:
        k = tl.arange(0, BLOCK_K)
        first = tl.load(x_row + k[None, :], row_ok & (k < features)[None, :], 0.0).to(tl.float32)
        pivot = tl.sum(first, 1) / tl.minimum(features, BLOCK_K)
        total = tl.zeros([BLOCK_M], tl.float32)
        squares = tl.zeros([BLOCK_M], tl.float32)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, depth, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        k_ok = k < n_in
        col = k if in_cols is None else tl.load(in_cols + k, k_ok, 0)
        a = tl.load(x_row + col[None, :], row_ok & k_ok[None, :], 0.0)
        w_ok = k_ok[:, None] & n_kept[None, :]
        w = tl.load(weight + n[None, :] * weight_stride_out + k[:, None] * weight_stride_in, w_ok, 0.0)
        if row_sum is not None:
            # Gathered and shifted operands go through registers, where nothing overwrites them.
            values = a
            if READ_FROM_SHARED and in_cols is None and not SHIFT:
                values = load_again(x_row + col[None, :], row_ok & k_ok[None, :])
            centred = tl.where(k_ok[None, :], values.to(tl.float32) - pivot[:, None], 0.0)
            total += tl.sum(centred, 1)
            squares += tl.sum(centred * centred, 1)
            if SHIFT:
                a = centred
        acc = tl.dot(a, w, acc, input_precision=PRECISION)

    if row_sum is not None:
        tl.static_assert(out_cols is None)  # or tiles without a product would need a defined 1 / std
        if in_cols is not None:  # features that only the statistics read
            for k0 in range(n_in, features, BLOCK_K):
                k = k0 + tl.arange(0, BLOCK_K)
                k_ok = (k < features)[None, :]
                a = tl.load(x_row + tl.load(in_cols + k, k < features, 0)[None, :], row_ok & k_ok, 0.0)
                centred = tl.where(k_ok, a.to(tl.float32) - pivot[:, None], 0.0)
                total += tl.sum(centred, 1)
                squares += tl.sum(centred * centred, 1)
        from_pivot = total / features
        rstd = tl.rsqrt(tl.maximum(squares / features - from_pivot * from_pivot, 0.0) + eps)
        mean = pivot + from_pivot
        shift = from_pivot if SHIFT else mean
        acc = (acc - shift[:, None] * tl.load(row_sum + n, n_kept, 0.0)[None, :]) * rstd[:, None]
        if statistics is not None:  # noqa: SIM102 (one is for the compiler, the other for the program)
            if tile_n == 0:
                tl.store(statistics + 2 * row, mean, row < rows)
                tl.store(statistics + 2 * row + 1, rstd, row < rows)

    if bias is not None:
        acc += tl.load(bias + n, n_kept, 0.0)[None, :]
    if pre_activation is not None:
        tl.store(pre_activation + row64 * n_out + n[None, :], acc, row_ok & n_kept[None, :])
    acc = activate(acc, ACTIVATION)
    if scale is not None:
        acc *= tl.load(scale + n, n_kept, 0.0)[None, :]
    col = (n if out_cols is None else tl.load(out_cols + n, n_ok, 0))[None, :]
    ok = row_ok & n_ok[None, :]
    if residual is not None:
        acc += tl.load(residual + row64 * residual_stride + col, ok, 0.0).to(tl.float32)
    tl.store(out + row64 * out_stride + col, acc, ok)


@dataclass(frozen=True)
class PackedLinear:
    """Parameters of one launch: made once, by :mod:`.packing` or for a backward pass."""

    weight: Tensor  # [outputs, inputs] of the dtype of x, any strides
    out_features: int
    bias: Tensor | None = None  # float32 [outputs], like the next two
    row_sum: Tensor | None = None
    scale: Tensor | None = None
    in_cols: Tensor | None = None  # int32 [features]: those that are read, then the others
    out_cols: Tensor | None = None  # int32 [out_features]: those that are computed, then the others
    eps: float = 0.0
    activation: str = "identity"

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        out: Tensor | None = None,
        pre_activation: Tensor | None = None,
        statistics: Tensor | None = None,
        tile: config.Tile | None = None,
    ) -> Tensor:
        """Launch it.

        Args:
            x: [rows, features]; the last dimension contiguous.
            residual: [rows, out_features]; the last dimension contiguous.
            out: [rows, out_features], may have wider rows; by default a new tensor.
            pre_activation: [rows, outputs], contiguous, filled with what goes into the activation.
            statistics: float32 [rows, 2], filled with mean and 1 / standard deviation of each row of ``x``.
            tile: instead of the one that the rule chooses.
        """
        rows, features = x.shape
        n_out, n_in = self.weight.shape
        if out is None:
            out = x.new_empty(rows, self.out_features)
        target = config.Target.of(x.device)
        if tile is None:
            indexed = self.in_cols is not None or self.out_cols is not None
            tile = config.linear_tile(target, x.dtype, rows, n_out, n_in, indexed)
        align = 8 if n_in % 8 == 0 and x.stride(0) % 8 == 0 else 1
        tiles = cdiv(n_out, tile.BLOCK_N) + cdiv(self.out_features - n_out, tile.BLOCK_N)
        launch(
            linear_kernel,
            cdiv(rows, tile.BLOCK_M) * tiles,
            x.device,
            x,
            self.weight,
            out,
            self.bias,
            self.row_sum,
            self.scale,
            residual,
            pre_activation,
            statistics,
            self.in_cols,
            self.out_cols,
            rows,
            features,
            n_in // align,
            n_out,
            self.out_features,
            x.stride(0) // align,
            self.weight.stride(0),
            self.weight.stride(1),
            out.stride(0),
            0 if residual is None else residual.stride(0),
            self.eps,
            ACTIVATION=self.activation,
            PRECISION=dot_precision(x.dtype, x.device),
            READ_FROM_SHARED=config.read_from_shared(target, tile.BLOCK_M),
            IN_ALIGN=align,
            **tile.meta,
        )
        return out
