# SPDX-License-Identifier: Apache-2.0
"""The differentiable path: two autograd functions and the sublayers composed of them.

LayerNorm's affine part is folded into the next matrix by ordinary PyTorch operations on weights (in float32), so that
autograd turns the gradient of the folded matrix into those of the matrix and of the norm; the kernels only know a norm
without affine part. The same holds for the alignment of channels. Layer scale and norms on q and k, which few models
have, are plain PyTorch here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import HeadLayout, attention
from .attention_backward import attention_gradient
from .attention_sublayer import align_attention, new_heads
from .linear import PackedLinear
from .linear_backward import epilogue_gradient, norm_gradient, weight_gradient
from .mlp import align_hidden
from .packing import fold_norm, pack_linear
from .rows import as_rows, as_tokens


class LinearFunction(torch.autograd.Function):
    """residual + scatter(act(norm(x)[:, in_cols] @ weight.T + bias)) on rows; norm where ``eps`` is given."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        in_cols: Tensor | None,
        out_cols: Tensor | None,
        out_features: int,
        eps: float | None,
        activation: str,
    ) -> Tensor:
        linear = pack_linear(
            weight,
            bias,
            x.dtype,
            features=x.shape[1],
            out_features=out_features,
            in_cols=in_cols,
            out_cols=out_cols,
            norm_eps=eps,
            activation=activation,
        )
        statistics = None if eps is None else x.new_empty(x.shape[0], 2, dtype=torch.float32)
        pre_activation = None if activation == "identity" else x.new_empty(x.shape[0], weight.shape[0])
        out = linear(x, residual, statistics=statistics, pre_activation=pre_activation)
        ctx.save_for_backward(x, linear.weight, linear.in_cols, linear.out_cols, statistics, pre_activation)
        ctx.activation = activation
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, in_cols, out_cols, statistics, pre_activation = ctx.saved_tensors
        n_out, n_in = weight.shape
        grad_out = as_rows(grads[0])
        grad = grad_out
        if pre_activation is not None or out_cols is not None:
            grad = epilogue_gradient(grad_out, pre_activation, out_cols, n_out, ctx.activation)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            if n_out == 0:  # then nothing was launched, and there are no statistics
                grad_x = torch.zeros_like(x)
            elif statistics is None:
                grad_x = PackedLinear(weight.t(), x.shape[1], out_cols=in_cols)(grad)
            else:
                normed = PackedLinear(weight.t(), n_in)(grad)
                grad_x = norm_gradient(normed, x, statistics, in_cols)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = weight_gradient(grad, x, n_in, in_cols, statistics)
            weight_dtype, bias_dtype = ctx.dtypes
            grad_weight = grad_weight.to(weight_dtype)
            grad_bias = None if bias_dtype is None else grad_bias.to(bias_dtype)
        grad_residual = grad_out if ctx.needs_input_grad[3] else None
        return grad_x, grad_weight, grad_bias, grad_residual, None, None, None, None, None


class AttentionFunction(torch.autograd.Function):
    """Ragged attention on ``qkv`` [batch, tokens, channels], without norms on q and k."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, layout: HeadLayout, scale: float, num_queries: int) -> Tensor:
        batch, heads = qkv.shape[0], layout.table.shape[0]
        log_sums = qkv.new_empty(batch, heads, num_queries, dtype=torch.float32)
        out = attention(qkv, layout, scale, num_queries, out=new_heads(qkv, num_queries, layout), log_sums=log_sums)
        ctx.save_for_backward(qkv, out, log_sums)
        ctx.layout, ctx.scale = layout, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, log_sums = ctx.saved_tensors
        grad_qkv = attention_gradient(as_tokens(grads[0]), qkv, out, log_sums, ctx.layout, ctx.scale)
        return grad_qkv, None, None, None


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    out_features: int,
    residual: Tensor | None = None,
    in_cols: Tensor | None = None,
    out_cols: Tensor | None = None,
    eps: float | None = None,
    activation: str = "identity",
) -> Tensor:
    """:class:`LinearFunction` with names."""
    result: Tensor = LinearFunction.apply(x, weight, bias, residual, in_cols, out_cols, out_features, eps, activation)
    return result


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    rows = linear(
        as_rows(x),
        weight,
        bias,
        out_features=out_features,
        in_cols=in_cols,
        out_cols=out_cols,
        activation=activation,
    )
    return rows.view(*x.shape[:-1], out_features)


def normalise_heads(qkv: Tensor, heads: int, width: int, norms: tuple[Tensor | None, ...], eps: float) -> Tensor:
    """``qkv`` with LayerNorm applied to q and k of each head; they come first, and all have one ``width``."""
    q_weight, q_bias, k_weight, k_bias = (None if t is None else t.to(qkv.dtype) for t in norms)
    q, k, rest = qkv.tensor_split([heads * width, 2 * heads * width], dim=-1)
    q = F.layer_norm(q.unflatten(-1, (heads, width)), (width,), q_weight, q_bias, eps)
    k = F.layer_norm(k.unflatten(-1, (heads, width)), (width,), k_weight, k_bias, eps)
    return torch.cat([q.flatten(-2), k.flatten(-2), rest], dim=-1)


def ragged_attention(
    qkv: Tensor,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    qk_widths: tuple[int, ...],
    v_widths: tuple[int, ...],
    scale: float,
    eps: float,
    num_queries: int,
) -> Tensor:
    if q_norm_weight is not None and qk_widths:
        norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
        qkv = normalise_heads(qkv, len(qk_widths), qk_widths[0], norms, eps)
    layout = HeadLayout.of(qk_widths, v_widths, qkv.device)
    result: Tensor = AttentionFunction.apply(as_tokens(qkv), layout, scale, num_queries)
    return result.contiguous()


def finish_sublayer(
    branch: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    layer_scale: Tensor | None,
    out_cols: Tensor | None,
) -> Tensor:
    """The sublayer's second matrix and its residual, on rows."""
    features = residual.shape[1]
    if layer_scale is None:
        return linear(branch, weight, bias, out_features=features, residual=residual, out_cols=out_cols)
    y = linear(branch, weight, bias, out_features=weight.shape[0]) * layer_scale.to(branch.dtype)
    return residual + y if out_cols is None else residual.index_add(-1, out_cols, y)


def attention_sublayer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    layer_scale: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    qk_widths: tuple[int, ...],
    v_widths: tuple[int, ...],
    scale: float,
    eps: float,
    qk_eps: float,
    num_queries: int,
) -> Tensor:
    batch, tokens, features = x.shape
    qk_norm = q_norm_weight is not None
    weights = (norm_weight, norm_bias, qkv_weight.float(), qkv_bias, proj_weight)
    aligned = align_attention(*weights, in_cols, qk_widths, v_widths, qk_norm)
    channels = aligned.qkv_weight.shape[0]
    rows = as_rows(x)
    qkv = linear(rows, aligned.qkv_weight, aligned.qkv_bias, out_features=channels, in_cols=in_cols, eps=eps)
    qkv = qkv.view(batch, tokens, channels)
    heads = aligned.layout.table.shape[0]
    if qk_norm and heads:
        norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
        qkv = normalise_heads(qkv, heads, qk_widths[0], norms, qk_eps)
    out: Tensor = AttentionFunction.apply(qkv, aligned.layout, scale, num_queries)
    residual = as_rows(rows.view(x.shape)[:, :num_queries])
    y = finish_sublayer(out.flatten(0, 1), aligned.proj_weight, proj_bias, residual, layer_scale, out_cols)
    return y.view(batch, num_queries, features)


def mlp_sublayer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    activation: str,
    eps: float,
) -> Tensor:
    rows = as_rows(x)
    weight, bias = fold_norm(fc1_weight.float(), fc1_bias, norm_weight, norm_bias, in_cols)
    weight, bias, fc2_weight = align_hidden(weight, bias, fc2_weight)
    hidden = linear(rows, weight, bias, out_features=weight.shape[0], in_cols=in_cols, eps=eps, activation=activation)
    return finish_sublayer(hidden, fc2_weight, fc2_bias, rows, layer_scale, out_cols).view(x.shape)
