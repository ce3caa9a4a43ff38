# SPDX-License-Identifier: Apache-2.0
"""Norms of which some features are gone."""

from __future__ import annotations

from typing import Any

from timm.layers import RmsNorm
from torch import Tensor, nn

from gohsp_kernels.reference import normalised_part


class CompactNorm(nn.Module):
    """A norm in front of the last matrix of a sublayer, of whose features some are gone.

    It divides by all that the dense norm has: what was pruned is zero in it.

    Args:
        norm: The dense norm. It is not changed.
        kept: Indices of the features that are left.
    """

    def __init__(self, norm: Any, kept: Tensor) -> None:
        super().__init__()
        self.features: int = norm.normalized_shape[0]
        self.kind, self.eps = norm_kind(norm), norm.eps
        bias = getattr(norm, "bias", None)
        self.weight = None if norm.weight is None else _cut(norm.weight, kept)
        self.bias = None if bias is None else _cut(bias, kept)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised features that are left, [..., n] from [..., n]."""
        return normalised_part(self.kind, x, self.features, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.kind}, {self.features}, eps={self.eps}"


def norm_kind(norm: nn.Module) -> str:
    """Return what :mod:`gohsp_kernels` calls the kind of a norm."""
    return "rms" if isinstance(norm, nn.RMSNorm | RmsNorm) else "layer"


def _cut(values: Tensor, kept: Tensor) -> nn.Parameter:
    left = values.detach().index_select(0, kept.to(values.device))
    return nn.Parameter(left, requires_grad=values.requires_grad)
