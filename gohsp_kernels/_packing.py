# SPDX-License-Identifier: Apache-2.0
"""What packing has in common on several backends: constants folded in float64, lists of columns, padding."""

from __future__ import annotations

import torch
from torch import Tensor


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
