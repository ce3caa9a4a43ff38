# SPDX-License-Identifier: Apache-2.0
"""The differentiable path: two autograd functions and the sublayers composed of them.

LayerNorm's affine part is folded into the next matrix by ordinary PyTorch operations on weights (in float32), so that
autograd turns the gradient of the folded matrix into those of the matrix and of the norm; the kernels only know a norm
without affine part. The same holds for the alignment of channels. Layer scale and norms on q and k, which few models
have, are plain PyTorch here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..descriptors import Attention, AttentionSublayer, Linear, MlpSublayer
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


def packed_linear(operator: Linear, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.packed_linear`."""
    rows = linear(
        as_rows(x),
        operator.weight,
        operator.bias,
        out_features=operator.out_features,
        in_cols=operator.in_cols,
        out_cols=operator.out_cols,
        activation=operator.activation,
    )
    return rows.view(*x.shape[:-1], operator.out_features)


def normalise_heads(qkv: Tensor, heads: int, width: int, norms: tuple[Tensor | None, ...], eps: float) -> Tensor:
    """``qkv`` with LayerNorm applied to q and k of each head; they come first, and all have one ``width``."""
    q_weight, q_bias, k_weight, k_bias = (None if t is None else t.to(qkv.dtype) for t in norms)
    q, k, rest = qkv.tensor_split([heads * width, 2 * heads * width], dim=-1)
    q = F.layer_norm(q.unflatten(-1, (heads, width)), (width,), q_weight, q_bias, eps)
    k = F.layer_norm(k.unflatten(-1, (heads, width)), (width,), k_weight, k_bias, eps)
    return torch.cat([q.flatten(-2), k.flatten(-2), rest], dim=-1)


def ragged_attention(heads: Attention, qkv: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.ragged_attention`."""
    qk_widths = heads.qk_widths
    if heads.q_norm_weight is not None and qk_widths:
        qkv = normalise_heads(qkv, len(qk_widths), qk_widths[0], heads.norms, heads.eps)
    layout = HeadLayout.of(qk_widths, heads.v_widths, qkv.device)
    result: Tensor = AttentionFunction.apply(as_tokens(qkv), layout, heads.scale, num_queries)
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


def attention_sublayer(sublayer: AttentionSublayer, x: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.attention_sublayer`."""
    batch, tokens, features = x.shape
    aligned = align_attention(sublayer, torch.float32)
    channels = aligned.qkv_weight.shape[0]
    rows = as_rows(x)
    weights, in_cols = (aligned.qkv_weight, aligned.qkv_bias), sublayer.in_cols
    qkv = linear(rows, *weights, out_features=channels, in_cols=in_cols, eps=sublayer.eps)
    qkv = qkv.view(batch, tokens, channels)
    heads = aligned.layout.table.shape[0]
    if sublayer.q_norm_weight is not None and heads:
        qkv = normalise_heads(qkv, heads, sublayer.qk_widths[0], sublayer.norms, sublayer.qk_eps)
    out: Tensor = AttentionFunction.apply(qkv, aligned.layout, sublayer.scale, num_queries)
    residual = as_rows(rows.view(x.shape)[:, :num_queries])
    last = aligned.proj_weight, sublayer.proj_bias, residual, sublayer.layer_scale, sublayer.out_cols
    return finish_sublayer(out.flatten(0, 1), *last).view(batch, num_queries, features)


def mlp_sublayer(sublayer: MlpSublayer, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.mlp_sublayer`."""
    rows, in_cols = as_rows(x), sublayer.in_cols
    norm = sublayer.norm_weight, sublayer.norm_bias
    weight, bias = fold_norm(sublayer.fc1_weight.float(), sublayer.fc1_bias, *norm, in_cols)
    weight, bias, fc2_weight = align_hidden(weight, bias, sublayer.fc2_weight)
    neurons, eps, activation = weight.shape[0], sublayer.eps, sublayer.activation
    hidden = linear(rows, weight, bias, out_features=neurons, in_cols=in_cols, eps=eps, activation=activation)
    last = fc2_weight, sublayer.fc2_bias, rows, sublayer.layer_scale, sublayer.out_cols
    return finish_sublayer(hidden, *last).view(x.shape)


RUN: dict[str, Callable[..., Tensor]] = {
    "packed_linear": packed_linear,
    "ragged_attention": ragged_attention,
    "attention_sublayer": attention_sublayer,
    "mlp_sublayer": mlp_sublayer,
}
"""The operators, by name."""
