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


def fold_layer_scale(weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if layer_scale is None:
        return weight, bias
    scale = double(layer_scale)
    return weight * scale[:, None], None if bias is None else bias * scale


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
        qkv, qkv_bias, proj, proj_bias: They need no LayerNorm weights and no layer scale any more.
        scale: What is left of the softmax scale.
    """

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    scale: float


def fold_attention(sublayer: AttentionSublayer) -> FoldedAttention:
    """Fold the constants of an attention sublayer."""
    n_qk, scale, has_norm = sum(sublayer.qk_widths), sublayer.scale, sublayer.q_norm_weight is not None
    qkv, constant = fold_norm(
        sublayer.qkv_weight, sublayer.qkv_bias, sublayer.norm_weight, sublayer.norm_bias, sublayer.in_cols
    )
    proj = double(sublayer.proj_weight)
    v_constant = constant[2 * n_qk :].clone()
    constant[2 * n_qk :] = 0
    proj_constant = proj @ v_constant
    if sublayer.proj_bias is not None:
        proj_constant = double(sublayer.proj_bias) + proj_constant
    if not has_norm:
        qkv[:n_qk] *= scale
        constant[:n_qk] *= scale
        constant[n_qk : 2 * n_qk] = 0
    if sublayer.layer_scale is not None:
        factors = double(sublayer.layer_scale)
        proj, proj_constant = proj * factors[:, None], proj_constant * factors
    return FoldedAttention(qkv, constant, proj, proj_constant, scale if has_norm else 1.0)


def fold_mlp(sublayer: MlpSublayer) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """fc1, its bias, fc2 and its bias, float64, with LayerNorm's affine part and layer scale folded in."""
    fc2_constant = None if sublayer.fc2_bias is None else double(sublayer.fc2_bias)
    return (
        *fold_norm(sublayer.fc1_weight, sublayer.fc1_bias, sublayer.norm_weight, sublayer.norm_bias, sublayer.in_cols),
        *fold_layer_scale(double(sublayer.fc2_weight), fc2_constant, sublayer.layer_scale),
    )
