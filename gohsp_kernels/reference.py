# SPDX-License-Identifier: Apache-2.0
"""Meaning of every operator, in plain PyTorch.

These functions are the definition that all other backends are tested against. They run on any device and dtype and are
differentiable, so they are also the training path and the fallback where nothing faster can run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .activations import ACTIVATIONS
from .descriptors import (
    HIGHEST_LOGIT_SCALE,
    PARTS,
    Attention,
    AttentionSublayer,
    Descriptor,
    Linear,
    MlpSublayer,
    Sublayer,
)
from .registry import PackedChain, Request, register

LinearLayer = Callable[[Tensor, Tensor, Any], Tensor]
"""x, weight, bias -> x W^T + b"""


def gather_columns(x: Tensor, cols: Tensor | None) -> Tensor:
    """Columns ``cols`` of the last dimension of ``x``; all of them where ``cols`` is None."""
    return x if cols is None else x.index_select(-1, cols)


def scatter_columns(y: Tensor, cols: Tensor | None, features: int) -> Tensor:
    """``y`` [..., n] spread over the columns ``cols`` of a zero tensor [..., features]."""
    if cols is None:
        return y
    return y.new_zeros(*y.shape[:-1], features).index_copy(-1, cols, y)


def packed_linear(linear: Linear, x: Tensor, _: int | None = None) -> Tensor:
    """Gather, matrix product, bias, activation, scatter. See :func:`gohsp_kernels.packed_linear`."""
    y = F.linear(gather_columns(x, linear.in_cols), linear.weight, linear.bias)
    return scatter_columns(ACTIVATIONS[linear.activation](y), linear.out_cols, linear.out_features)


def quantise_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weight [n, k] as int8 values in [-127, 127] and one float32 scale an output [n]: weight = value * scale."""
    largest = weight.abs().amax(dim=1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scales = (largest / 127).to(torch.float32)
    divisors = torch.where(scales == 0, 1, scales).to(weight.dtype)
    values = (weight / divisors[:, None]).round().clamp(-127, 127)
    return values.nan_to_num().to(torch.int8), scales


def quantise_rows(x: Tensor, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x [..., k] as integers in [0, levels], and a zero point and a scale a row: x = (value - zero) * scale.

    A row's range is stretched to contain 0. One below 1e-30 counts as none: scale and values are 0.

    Returns:
        values [..., k] and zeros [..., 1], integers as float64; scales [..., 1], float32; NaN for a row that is not
        finite.
    """
    x = x.to(torch.float32)
    if x.shape[-1] == 0:
        nothing = x.new_zeros(*x.shape[:-1], 1)
        return x.double(), nothing.double(), nothing
    low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    span = high - low
    flat = span < 1e-30
    inverse = torch.where(flat, 0, levels / span).double()
    zeros = (-low.double() * inverse).round()
    values = (x.double() * inverse + zeros).round().clamp(0, levels)
    return values, zeros, torch.where(flat, 0, span / levels)


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, levels: int = 255) -> Tensor:
    """What the CPU backend computes with int8 weights: integer products, exactly summed, then scaled.

    Weights are quantised symmetrically, output by output; activations with a zero point, row by row, as the call
    finds them. This is post-training quantisation with dynamic activations, no calibration.

    Args:
        x: [..., k].
        weight: [n, k], not yet quantised.
        bias: [n] or None.
        levels: largest integer that an activation becomes; see :func:`gohsp_kernels.cpu.activation_levels`.

    Returns:
        [..., n] in the dtype of x.
    """
    values, zeros, scales = quantise_rows(x, levels)
    weight_values, weight_scales = quantise_weight(weight)
    y = F.linear(values - zeros, weight_values.double()) * (scales * weight_scales).double()
    return (y if bias is None else y + bias.double()).to(x.dtype)


def _in_bf16(x: Tensor) -> Tensor:
    return x.to(torch.float32).bfloat16().double()


def bf16_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the CPU backend computes with bfloat16 weights: both factors rounded, to even on a tie, sums not rounded.

    Args:
        x: [..., k].
        weight: [n, k], not yet rounded.
        bias: [n] or None.

    Returns:
        [..., n] in the dtype of x.
    """
    y = F.linear(_in_bf16(x), _in_bf16(weight))
    return (y if bias is None else y + bias.double()).to(x.dtype)


def _normalised(kind: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last dimension of x, or RMSNorm, which takes no mean."""
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def normalised_part(
    kind: str, x: Tensor, features: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """A norm over ``features``, of which those that x [..., n] does not have were pruned and are zeros.

    Args:
        kind: one of ``descriptors.NORM_KINDS``.
        x: float.
        features: at least n.
        weight, bias: [n] or None.
        eps: of the norm.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.sum(-1, keepdim=True) / features if kind == "layer" else wide.new_zeros(())
    squares = (wide - mean).square().sum(-1, keepdim=True) + (features - x.shape[-1]) * mean.square()
    y = (wide - mean) * (squares / features + eps).rsqrt()
    if weight is not None:
        y = y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _normalised_inside(sublayer: Sublayer, x: Tensor) -> Tensor:
    """What the last matrix of a sublayer reads."""
    if sublayer.inner_features == 0:
        return x
    affine = sublayer.inner_norm_weight, sublayer.inner_norm_bias
    return normalised_part(sublayer.norm, x, sublayer.inner_features, *affine, sublayer.inner_eps)


def _finished(heads: Attention, x: Tensor, which: str, angles: Tensor | None) -> Tensor:
    """q or k [..., tokens, width] of heads of one width, normalised and turned by angles [2, ..., tokens, pairs]."""
    weight, bias = getattr(heads, f"{which}_norm_weight"), getattr(heads, f"{which}_norm_bias")
    if weight is not None:
        x = _normalised(heads.norm, x, weight, bias, heads.eps)
    if heads.logit_scale is not None:
        x = F.normalize(x, dim=-1)  # to the length of 1
    return x if angles is None else turned(x, angles, heads.rope_pairs)


def logit_factors(logit_scale: Tensor) -> Tensor:
    """What the cosines of each head are multiplied by, [heads], for a parameter of that shape."""
    return logit_scale.clamp(max=HIGHEST_LOGIT_SCALE).exp()


def _factors(heads: Attention) -> Tensor | None:
    """:func:`logit_factors`; None where scores are no cosines."""
    return None if heads.logit_scale is None else logit_factors(heads.logit_scale)


def turned(x: Tensor, angles: Tensor, pairs: str) -> Tensor:
    """Pairs of the channels of x [..., tokens, width], turned by angles.

    Args:
        x: float.
        angles: [2, ..., tokens, width // 2], cosines and sines, which broadcast against x.
        pairs: one of ``descriptors.ROPE_PAIRS``.
    """
    cos, sin = angles.unbind()  # only the result is rounded to the precision of x
    if pairs == "halves":
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2).to(x.dtype)


def _same_width_heads(
    qk_widths: Sequence[int], v_widths: Sequence[int]
) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """Heads by (QK width, V width), each as (head, first QK channel, first V channel)."""
    groups: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    qk_start = v_start = 0
    for head, (qk, v) in enumerate(zip(qk_widths, v_widths, strict=True)):
        groups.setdefault((qk, v), []).append((head, qk_start, v_start))
        qk_start, v_start = qk_start + qk, v_start + v
    return groups


def _heads(x: Tensor, starts: Sequence[int], width: int) -> Tensor:
    """Channel ranges of ``x`` [B, N, C] that begin at ``starts``, as [B, heads, N, width]."""
    if list(starts) == [starts[0] + i * width for i in range(len(starts))]:  # adjacent: a view will do
        block = x[..., starts[0] : starts[0] + len(starts) * width]
        return block.unflatten(-1, (len(starts), width)).transpose(1, 2)
    return torch.stack([x[..., s : s + width] for s in starts], dim=1)


def _mean_of_values(v: Tensor, num_queries: int) -> Tensor:
    """Attention when every score is equal: a head without QK channels."""
    return v.mean(dim=2, keepdim=True).expand(-1, -1, num_queries, -1)


def ragged_attention(heads: Attention, qkv: Tensor, num_queries: int) -> Tensor:
    """Softmax attention over heads of any widths. See :func:`gohsp_kernels.ragged_attention`.

    Heads of equal widths share one call of PyTorch's scaled_dot_product_attention.
    """
    n_qk, n_v = sum(heads.qk_widths), sum(heads.v_widths)
    q, k, v = qkv.split([n_qk, n_qk, n_v], dim=-1)
    q = q[:, :num_queries]
    biases, factors = score_bias(heads, qkv, num_queries), _factors(heads)
    outputs: list[Tensor] = [qkv.new_empty(0)] * len(heads.qk_widths)
    for (qk, width), members in _same_width_heads(heads.qk_widths, heads.v_widths).items():
        ids, qk_starts, v_starts = zip(*members, strict=True)
        values = _heads(v, v_starts, width)
        bias = None if biases is None else biases[:, list(ids)]
        if width == 0 or (qk == 0 and bias is None):
            out = _mean_of_values(values, num_queries)
        else:
            angles = None if heads.rope is None else _heads(heads.rope, [s // 2 for s in qk_starts], qk // 2)
            of_queries = None if angles is None else angles[:, :, :num_queries]
            queries = _finished(heads, _heads(q, qk_starts, qk), "q", of_queries)
            keys = _finished(heads, _heads(k, qk_starts, qk), "k", angles)
            if factors is not None:
                queries = queries * factors[list(ids), None, None].to(queries.dtype)
            out = _attend(queries, keys, values, heads.scale, bias)
        for head, head_out in zip(ids, out.unbind(1), strict=True):
            outputs[head] = head_out
    if not outputs:
        return qkv.new_zeros(qkv.shape[0], num_queries, 0)
    return torch.cat(outputs, dim=-1)


TRAINED_BY_PRODUCTS = {torch.float32: 256, torch.bfloat16: 1024}
"""Up to so many tokens PyTorch's fused attention was slower on a CPU than its two products, forward and backward
together, most of all in bfloat16. Beyond, the fused form is as fast in float32 and saves the square."""


def added_scores(table: Tensor | None, index: Tensor | None, mask: Tensor | None, batch: int) -> Tensor | None:
    """What is added to the scores of a batch of so many images; None if nothing is.

    Args:
        table, index, mask: as :func:`gohsp_kernels.ragged_attention` has them; index and mask may hold fewer queries.
        batch: number of images, a multiple of the groups of the mask.

    Returns:
        [batch or 1, heads or 1, queries, tokens].
    """
    bias = None if table is None or index is None else table[index].movedim(-1, 0)[None]
    if mask is None:
        return bias
    mask = mask[:, None] if len(mask) == 1 else mask[:, None].repeat(batch // len(mask), 1, 1, 1)
    return mask if bias is None else bias + mask.to(bias.dtype)


def score_bias(heads: Attention, qkv: Tensor, num_queries: int) -> Tensor | None:
    """:func:`added_scores` of the first queries of each image, for every head and in the dtype of qkv."""
    index = None if heads.bias_index is None else heads.bias_index[:num_queries]
    mask = None if heads.bias_mask is None else heads.bias_mask[:, :num_queries]
    bias = added_scores(heads.bias_table, index, mask, qkv.shape[0])
    return None if bias is None else bias.to(qkv.dtype).expand(-1, len(heads.qk_widths), -1, -1)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    trains = queries.device.type == "cpu" and queries.requires_grad and torch.is_grad_enabled()
    short = trains and keys.shape[-2] <= TRAINED_BY_PRODUCTS.get(queries.dtype, 0)
    if short or queries.shape[-1] == 0 or forward_ad._current_level >= 0:  # fused forms have no forward derivative
        scores = queries * scale @ keys.mT
        return (scores if bias is None else scores + bias).softmax(dim=-1) @ values
    return F.scaled_dot_product_attention(queries, keys, values, bias, scale=scale)


def bf16_attention(heads: Attention, qkv: Tensor, num_queries: int) -> Tensor:
    """What the CPU backend computes beside bfloat16 weights: as :func:`ragged_attention`, factors of both products
    rounded, those of the second before the softmax divides by its sum."""
    n_qk, n_v = sum(heads.qk_widths), sum(heads.v_widths)
    q, k, v = qkv.split([n_qk, n_qk, n_v], dim=-1)
    outputs = [qkv.new_zeros(qkv.shape[0], num_queries, 0)]
    halves = [width // 2 for width in heads.qk_widths]
    turns = [None] * len(halves) if heads.rope is None else heads.rope.split(halves, -1)
    biases, factors = score_bias(heads, qkv, num_queries), _factors(heads)
    for queries, keys, values, angles, bias, factor in zip(
        q[:, :num_queries].split(list(heads.qk_widths), -1),
        k.split(list(heads.qk_widths), -1),
        v.split(list(heads.v_widths), -1),
        turns,
        [None] * len(halves) if biases is None else biases.unbind(1),
        [1.0] * len(halves) if factors is None else factors.unbind(),
        strict=True,
    ):
        queries = _finished(heads, queries, "q", None if angles is None else angles[:, :num_queries])
        queries = queries * (heads.scale * factor)
        keys = _finished(heads, keys, "k", angles)
        scores = _in_bf16(queries) @ _in_bf16(keys).mT
        scores = scores if bias is None else scores + bias
        shares = (scores - scores.amax(-1, keepdim=True)).exp()
        outputs.append((_in_bf16(shares) @ _in_bf16(values) / shares.sum(-1, keepdim=True)).to(qkv.dtype))
    return torch.cat(outputs, dim=-1)


def _residual_add(sublayer: Sublayer, x: Tensor, y: Tensor) -> Tensor:
    """x and what the last matrix of a sublayer gave."""
    if sublayer.post_norm:
        y = _normalised(sublayer.norm, y, sublayer.norm_weight, sublayer.norm_bias, sublayer.eps)
    if sublayer.layer_scale is not None:
        y = y * sublayer.layer_scale
    return x + y if sublayer.out_cols is None else x.index_add(-1, sublayer.out_cols, y.to(x.dtype))


def attention_sublayer(
    sublayer: AttentionSublayer,
    x: Tensor,
    num_queries: int,
    linear: LinearLayer = F.linear,
    attention: Callable[[Attention, Tensor, int], Tensor] = ragged_attention,
) -> Tensor:
    """LayerNorm, attention, layer scale, residual. See :func:`gohsp_kernels.attention_sublayer`."""
    qkv = linear(_seen(sublayer, x), sublayer.qkv_weight, sublayer.qkv_bias)
    heads = _normalised_inside(sublayer, attention(sublayer.attention, qkv, num_queries))
    y = linear(heads, sublayer.proj_weight, sublayer.proj_bias)
    return _residual_add(sublayer, x[:, :num_queries], y)


def mlp_sublayer(sublayer: MlpSublayer, x: Tensor, _: int | None = None, linear: LinearLayer = F.linear) -> Tensor:
    """LayerNorm, MLP, layer scale, residual. See :func:`gohsp_kernels.mlp_sublayer`."""
    seen = _seen(sublayer, x)
    hidden = linear(seen, sublayer.fc1_weight, sublayer.fc1_bias)
    if sublayer.gate_weight is None:
        hidden = ACTIVATIONS[sublayer.activation](hidden)
    else:
        hidden = ACTIVATIONS[sublayer.activation](linear(seen, sublayer.gate_weight, sublayer.gate_bias)) * hidden
    y = linear(_normalised_inside(sublayer, hidden), sublayer.fc2_weight, sublayer.fc2_bias)
    return _residual_add(sublayer, x, y)


def _seen(sublayer: Sublayer, x: Tensor) -> Tensor:
    """What the first matrix of a sublayer reads."""
    if not sublayer.post_norm:
        x = _normalised(sublayer.norm, x, sublayer.norm_weight, sublayer.norm_bias, sublayer.eps)
    return gather_columns(x, sublayer.in_cols)


_RUN: dict[str, Callable[..., Tensor]] = {
    "packed_linear": packed_linear,
    "ragged_attention": ragged_attention,
    "attention_sublayer": attention_sublayer,
    "mlp_sublayer": mlp_sublayer,
}


class ReferenceBackend:
    """Plain PyTorch: runs every call, and defines what it means."""

    name = "reference"
    operators = _RUN.keys()
    parts = PARTS

    def missing(self, request: Request) -> str:
        return ""

    def only_named(self, request: Request) -> str:
        return ""

    def priority(self, request: Request) -> int:
        return 0

    def run(self, operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
        return _RUN[operator.name](operator, x, num_queries)

    def chain(self, x: Tensor, sublayers: Sequence[Sublayer]) -> PackedChain | None:
        return None


register(ReferenceBackend())
