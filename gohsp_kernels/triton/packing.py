# SPDX-License-Identifier: Apache-2.0
"""Makes the parameters of launches out of compact ones: constants folded, channels aligned, column lists on the device.

LayerNorm's affine part folds into the matrix after it. Layer scale stays a factor of the epilogue: at its usual 1e-5 it
would push a float16 weight below the smallest normal number. The softmax scale stays a factor of the scores, where it
costs nothing.

Channels of heads and hidden neurons are padded with zero rows to multiples of 8 and 16, so that rows in memory can be
read 16 bytes at a time whatever was pruned. A zero row of a matrix gives a zero channel, and every activation keeps
zero, so the padding changes no result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._cache import PackedCache
from .._packing import kept_first, round_up
from .linear import PackedLinear
from .rows import as_vector

_orders = PackedCache(by_content=False)


def column_order(cols: Tensor | None, features: int) -> Tensor | None:
    """int32 [features]: the columns ``cols``, then the others. None stays None."""
    if cols is None:
        return None

    # Kept, as training asks at each step and nonzero() waits for the GPU.
    return _orders.get(cols, (cols,), (features,), lambda: kept_first(cols, features).to(torch.int32))


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, cols: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear layer that is fed by a LayerNorm without its affine part. Differentiable."""
    if norm_bias is not None:
        shift = weight @ (norm_bias if cols is None else norm_bias[cols]).to(weight.dtype)
        bias = shift if bias is None else bias.to(weight.dtype) + shift
    if norm_weight is not None:
        weight = weight * (norm_weight if cols is None else norm_weight[cols]).to(weight.dtype)
    return weight, bias


def wide_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` as ``dtype``, each row beginning at a multiple of 16 elements."""
    rows, columns = weight.shape
    storage = weight.new_zeros(rows, round_up(columns, 16), dtype=dtype)
    storage[:, :columns] = weight
    return storage[:, :columns]


def pack_linear(
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    features: int,
    out_features: int,
    in_cols: Tensor | None = None,
    out_cols: Tensor | None = None,
    norm_eps: float | None = None,
    layer_scale: Tensor | None = None,
    activation: str = "identity",
) -> PackedLinear:
    """One launch of the linear kernel for activations of ``dtype``.

    Args:
        weight: [outputs, inputs], in any float dtype; float64 if something was folded into it.
        bias: [outputs] or None.
        dtype: of the activations, and of the weights in memory.
        features: of the input, of which ``in_cols`` are read.
        out_features: of the output, of which ``out_cols`` are computed.
        norm_eps: of a LayerNorm on the input; None for no norm.
        layer_scale: [outputs] or None.
        activation: applied before the layer scale.
    """
    stored = wide_rows(weight.detach(), dtype)
    return PackedLinear(
        stored,
        out_features,
        bias=as_vector(bias, torch.float32),
        # Of the weights as they are rounded: only those cancel against the product (see linear.py).
        row_sum=None if norm_eps is None else stored.to(torch.float64).sum(1).to(torch.float32),
        scale=as_vector(layer_scale, torch.float32),
        in_cols=column_order(in_cols, features),
        out_cols=column_order(out_cols, out_features),
        eps=norm_eps or 0.0,
        activation=activation,
    )
