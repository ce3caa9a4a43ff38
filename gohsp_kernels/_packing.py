# SPDX-License-Identifier: Apache-2.0
"""What packing has in common on several backends: constants folded in float64, lists of columns, padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .descriptors import AttentionSublayer, MlpSublayer


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def kept_first(cols: Tensor, features: int) -> Tensor:
    """The columns ``cols``, then the others: [features]."""
    other = torch.ones(features, dtype=torch.bool, device=cols.device)
    other[cols] = False
    return torch.cat([cols, other.nonzero()[:, 0]])


def double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, cols: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``weight`` and ``bias`` (float64) of a linear that is fed by a LayerNorm without its affine part."""
    folded = double(weight)
    constant = folded.new_zeros(folded.shape[0]) if bias is None else double(bias)
    if norm_bias is not None:
        shift = double(norm_bias)
        constant = constant + folded @ (shift if cols is None else shift[cols])
    if norm_weight is not None:
        gain = double(norm_weight)
        folded = folded * (gain if cols is None else gain[cols])
    return folded, constant


def _fold_front_norm(
    sublayer: AttentionSublayer | MlpSublayer, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`fold_norm` of a matrix that a sublayer reads the residual stream with."""
    norm = (None, None) if sublayer.post_norm else (sublayer.norm_weight, sublayer.norm_bias)
    return fold_norm(weight, bias, *norm, sublayer.in_cols)


def post_norm_table(sublayer: AttentionSublayer | MlpSublayer, features: int) -> Tensor | None:
    """Affine part of a norm behind a sublayer, with layer scale in it, as rows [2, features]; None without."""
    if not sublayer.post_norm:
        return None
    one = torch.ones(features, dtype=torch.float64, device=sublayer.key.device)
    weight = one if sublayer.norm_weight is None else double(sublayer.norm_weight)
    bias = torch.zeros_like(one) if sublayer.norm_bias is None else double(sublayer.norm_bias)
    scale = one if sublayer.layer_scale is None else double(sublayer.layer_scale)
    return torch.stack((weight * scale, bias * scale)).to(torch.float32)


def fold_layer_scale(weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if layer_scale is None:
        return weight, bias
    scale = double(layer_scale)
    return weight * scale[:, None], None if bias is None else bias * scale


def fold_inner_norm(sublayer: AttentionSublayer | MlpSublayer, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``weight`` and ``bias`` (float64) of the last matrix, fed by an inner norm without its affine part."""
    if sublayer.inner_norm_bias is not None:
        bias = bias + weight @ double(sublayer.inner_norm_bias)
    if sublayer.inner_norm_weight is not None:
        weight = weight * double(sublayer.inner_norm_weight)
    return weight, bias


def qk_norm_table(
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None
) -> Tensor | None:
    """Affine parts of the q and k norms as rows [4, head width], or None where the model has none."""
    if q_weight is None or k_weight is None:
        return None
    rows = [q_weight, torch.zeros_like(q_weight) if q_bias is None else q_bias]
    rows += [k_weight, torch.zeros_like(k_weight) if k_bias is None else k_bias]
    return torch.stack([row.detach() for row in rows]).to(torch.float32)


@dataclass(frozen=True)
class FoldedAttention:
    """The matrices of an attention sublayer, float64, with all constants folded in that can be.

    Attributes:
        qkv, qkv_bias, proj, proj_bias: They need no LayerNorm weights and no layer scale any more, but for those of
            :func:`post_norm_table`.
        scale: What is left of the softmax scale.
    """

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    scale: float


def fold_attention(sublayer: AttentionSublayer) -> FoldedAttention:
    """Fold the constants of an attention sublayer.

    The k bias cancels in the softmax unless a norm, lengths that are divided by, or rotary positions make something
    else of it token by token, and the v bias passes to proj unless a norm lies between.
    """
    n_qk, scale = sum(sublayer.qk_widths), sublayer.scale
    is_kept = sublayer.q_norm_weight is not None or sublayer.logit_scale is not None  # the length of q as it is read
    qkv, constant = _fold_front_norm(sublayer, sublayer.qkv_weight, sublayer.qkv_bias)
    proj = double(sublayer.proj_weight)
    proj_constant = proj.new_zeros(proj.shape[0]) if sublayer.proj_bias is None else double(sublayer.proj_bias)
    if sublayer.inner_features > 0:
        proj, proj_constant = fold_inner_norm(sublayer, proj, proj_constant)
    else:
        proj_constant = proj_constant + proj @ constant[2 * n_qk :]
        constant[2 * n_qk :] = 0
    if not is_kept:
        qkv[:n_qk] *= scale
        constant[:n_qk] *= scale
        if sublayer.rope is None:
            constant[n_qk : 2 * n_qk] = 0
    if sublayer.layer_scale is not None and not sublayer.post_norm:
        factors = double(sublayer.layer_scale)
        proj, proj_constant = proj * factors[:, None], proj_constant * factors
    return FoldedAttention(qkv, constant, proj, proj_constant, scale if is_kept else 1.0)


@dataclass(frozen=True)
class FoldedMlp:
    """The matrices of an MLP sublayer, float64, with all constants folded in that can be.

    Attributes:
        fc1, fc1_bias, gate, gate_bias, fc2, fc2_bias: They need no LayerNorm weights and no layer scale any more, but
            for those of :func:`post_norm_table`. The gate is None where there is none, and fc2's bias where nothing is
            added.
    """

    fc1: Tensor
    fc1_bias: Tensor
    gate: Tensor | None
    gate_bias: Tensor | None
    fc2: Tensor
    fc2_bias: Tensor | None


def fold_mlp(sublayer: MlpSublayer) -> FoldedMlp:
    """Fold the constants of an MLP sublayer."""
    gate: tuple[Tensor | None, Tensor | None] = None, None
    if sublayer.gate_weight is not None:
        gate = _fold_front_norm(sublayer, sublayer.gate_weight, sublayer.gate_bias)
    fc2, fc2_bias = double(sublayer.fc2_weight), None if sublayer.fc2_bias is None else double(sublayer.fc2_bias)
    if sublayer.inner_features > 0:
        fc2, fc2_bias = fold_inner_norm(sublayer, fc2, fc2.new_zeros(fc2.shape[0]) if fc2_bias is None else fc2_bias)
    layer_scale = None if sublayer.post_norm else sublayer.layer_scale
    return FoldedMlp(
        *_fold_front_norm(sublayer, sublayer.fc1_weight, sublayer.fc1_bias),
        *gate,
        *fold_layer_scale(fc2, fc2_bias, layer_scale),
    )
