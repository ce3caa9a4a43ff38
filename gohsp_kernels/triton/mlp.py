# SPDX-License-Identifier: Apache-2.0
# mypy: allow-untyped-defs
"""A whole MLP sublayer in one launch, for narrow models: the hidden layer never reaches memory.

    out[:, out_cols] = x[:, out_cols] + scale * (act(norm(x)[:, in_cols] @ fc1.T + bias1) @ fc2.T + bias2)

A program holds the full width of a tile of rows, before and after, and goes through the hidden layer in steps. Both
must fit in registers, so the width ends at 256; :func:`gohsp_kernels.triton.config.fused_mlp_tile` is the rule for when
this pays. A wider MLP is two launches of :mod:`.linear`. The width is held as two panels, each a power of two: the 192
features of DeiT-Tiny are 128 and 64, where one panel would be 256 and a third more work.

The rows are there in full, so LayerNorm is direct: mean, then the variance about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..descriptors import MlpSublayer
from . import config
from ._launch import dot_precision, launch
from .activations import activate
from .config import cdiv
from .linear import PackedLinear
from .packing import fold_norm, pack_linear
from .rows import as_rows


@triton.jit
def centred_panel(x_row, row_ok, in_cols, c, limit, mean):
    """Columns ``c`` (or those that ``in_cols`` names there) of the rows less their mean, zero from ``limit`` on."""
    col = c if in_cols is None else tl.load(in_cols + c, c < limit, 0)
    values = tl.load(x_row + col[None, :], row_ok & (c < limit)[None, :], 0.0).to(tl.float32)
    return tl.where((c < limit)[None, :], values - mean[:, None], 0.0)


@triton.jit
def finish_panel(acc, x_row, out_row, row_ok, bias2, scale, out_cols, c, n_out, features):
    """Bias, scale, residual, store. Columns past n_out get the residual alone: what belongs to them reads as zero."""
    if bias2 is not None:
        acc += tl.load(bias2 + c, c < n_out, 0.0)[None, :]
    if scale is not None:
        acc *= tl.load(scale + c, c < n_out, 0.0)[None, :]
    col = (c if out_cols is None else tl.load(out_cols + c, c < features, 0))[None, :]
    ok = row_ok & (c < features)[None, :]
    tl.store(out_row + col, acc + tl.load(x_row + col, ok, 0.0).to(tl.float32), ok)


@triton.jit
def mlp_kernel(
    x,  # [rows, features]
    fc1,  # [hidden, n_in]
    fc2,  # [n_out, hidden]
    out,  # [rows, features]
    bias1,  # float32 [hidden] or None
    bias2,  # float32 [n_out] or None, like the next
    scale,
    in_cols,  # int32 [features] or None: the n_in features that are read, then the others
    out_cols,  # int32 [features] or None: the n_out features that are computed, then the others
    rows,
    features,
    n_in,
    n_out,
    hidden,
    x_stride,
    fc1_stride,
    fc2_stride,
    eps,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PANEL_A: tl.constexpr,
    PANEL_B: tl.constexpr,  # may be 0
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = (row < rows)[:, None]
    row64 = row.to(tl.int64)[:, None]
    x_row = x + row64 * x_stride
    out_row = out + row64 * features
    a = tl.arange(0, PANEL_A)
    acc_a = tl.zeros([BLOCK_M, PANEL_A], tl.float32)

    zero = tl.zeros([BLOCK_M], tl.float32)
    total = tl.sum(centred_panel(x_row, row_ok, None, a, features, zero), 1)
    if PANEL_B > 0:
        b = PANEL_A + tl.arange(0, PANEL_B)
        acc_b = tl.zeros([BLOCK_M, PANEL_B], tl.float32)
        total += tl.sum(centred_panel(x_row, row_ok, None, b, features, zero), 1)
    mean = total / features
    x_a = centred_panel(x_row, row_ok, None, a, features, mean)
    squares = tl.sum(x_a * x_a, 1)
    if PANEL_B > 0:
        x_b = centred_panel(x_row, row_ok, None, b, features, mean)
        squares += tl.sum(x_b * x_b, 1)
    rstd = tl.rsqrt(squares / features + eps)[:, None]
    if in_cols is not None:
        x_a = centred_panel(x_row, row_ok, in_cols, a, n_in, mean)
    x_a = (x_a * rstd).to(x.dtype.element_ty)
    if PANEL_B > 0:
        if in_cols is not None:
            x_b = centred_panel(x_row, row_ok, in_cols, b, n_in, mean)
        x_b = (x_b * rstd).to(x.dtype.element_ty)

    for h0 in range(0, hidden, BLOCK_H):
        h = h0 + tl.arange(0, BLOCK_H)
        h_ok = h < hidden
        fc1_row = fc1 + h[None, :] * fc1_stride
        fc2_row = fc2 + h[:, None]
        w = tl.load(fc1_row + a[:, None], (a < n_in)[:, None] & h_ok[None, :], 0.0)
        u = tl.dot(x_a, w, input_precision=PRECISION)
        if PANEL_B > 0:
            w = tl.load(fc1_row + b[:, None], (b < n_in)[:, None] & h_ok[None, :], 0.0)
            u = tl.dot(x_b, w, u, input_precision=PRECISION)
        if bias1 is not None:
            u += tl.load(bias1 + h, h_ok, 0.0)[None, :]
        u = activate(u, ACTIVATION).to(x.dtype.element_ty)
        w = tl.load(fc2_row + a[None, :] * fc2_stride, h_ok[:, None] & (a < n_out)[None, :], 0.0)
        acc_a = tl.dot(u, w, acc_a, input_precision=PRECISION)
        if PANEL_B > 0:
            w = tl.load(fc2_row + b[None, :] * fc2_stride, h_ok[:, None] & (b < n_out)[None, :], 0.0)
            acc_b = tl.dot(u, w, acc_b, input_precision=PRECISION)

    finish_panel(acc_a, x_row, out_row, row_ok, bias2, scale, out_cols, a, n_out, features)
    if PANEL_B > 0:
        finish_panel(acc_b, x_row, out_row, row_ok, bias2, scale, out_cols, b, n_out, features)


@dataclass(frozen=True)
class PackedMlp:
    """An MLP sublayer ready to launch."""

    fc1: PackedLinear
    fc2: PackedLinear

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` [..., features] to the same shape, in one launch or two."""
        rows = as_rows(x)
        tile = config.fused_mlp_tile(config.Target.of(x.device), x.element_size(), *rows.shape)
        return (self.in_two(rows) if tile is None else self.in_one(rows, tile)).view(x.shape)

    def in_two(self, x: Tensor) -> Tensor:
        """Two launches on ``x`` [rows, features]."""
        return self.fc2(self.fc1(x), x)

    def in_one(self, x: Tensor, tile: config.MlpTile) -> Tensor:
        """One launch on ``x`` [rows, features]."""
        rows, features = x.shape
        out = x.new_empty(rows, features)
        launch(
            mlp_kernel,
            cdiv(rows, tile.BLOCK_M),
            x.device,
            x,
            self.fc1.weight,
            self.fc2.weight,
            out,
            self.fc1.bias,
            self.fc2.bias,
            self.fc2.scale,
            self.fc1.in_cols,
            self.fc2.out_cols,
            rows,
            features,
            self.fc1.weight.shape[1],
            self.fc2.weight.shape[0],
            self.fc1.weight.shape[0],
            x.stride(0),
            self.fc1.weight.stride(0),
            self.fc2.weight.stride(0),
            self.fc1.eps,
            ACTIVATION=self.fc1.activation,
            PRECISION=dot_precision(x.dtype, x.device),
            **tile.meta,
        )
        return out


def align_hidden(fc1: Tensor, bias1: Tensor | None, fc2: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """The two layers with neurons of zero added up to a multiple of 16. Differentiable."""
    added = -fc1.shape[0] % 16
    return F.pad(fc1, (0, 0, 0, added)), None if bias1 is None else F.pad(bias1, (0, added)), F.pad(fc2, (0, added))


def pack_mlp(sublayer: MlpSublayer, x: Tensor) -> PackedMlp:
    """Prepare a sublayer for activations like ``x`` [..., features]."""
    features, norm = x.shape[-1], (sublayer.norm_weight, sublayer.norm_bias)
    with torch.no_grad():
        weight, bias = fold_norm(sublayer.fc1_weight.double(), sublayer.fc1_bias, *norm, sublayer.in_cols)
        weight, bias, fc2_weight = align_hidden(weight, bias, sublayer.fc2_weight)
    hidden = weight.shape[0]
    return PackedMlp(
        pack_linear(
            weight,
            bias,
            x.dtype,
            features=features,
            out_features=hidden,
            in_cols=sublayer.in_cols,
            norm_eps=sublayer.eps,
            activation=sublayer.activation,
        ),
        pack_linear(
            fc2_weight,
            sublayer.fc2_bias,
            x.dtype,
            features=hidden,
            out_features=features,
            out_cols=sublayer.out_cols,
            layer_scale=sublayer.layer_scale,
        ),
    )
