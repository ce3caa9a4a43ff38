# SPDX-License-Identifier: Apache-2.0
"""Biases of attention scores for relative positions, with a column for each head that is left."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gohsp.models.base import ScoreBias
from gohsp_kernels.reference import added_scores


class PositionBias(nn.Module):
    """What is added to scores for relative positions, with a column of the table for each head that is left.

    Args:
        bias: That of the dense half block. It is not changed.
        heads: Indices of the kept heads in it.
    """

    index: Tensor
    mask: Tensor | None

    def __init__(self, bias: ScoreBias, heads: Sequence[int]) -> None:
        super().__init__()
        self.table = nn.Parameter(bias.table.detach()[:, list(heads)].clone(), requires_grad=bias.trains)
        real = self.table.device.type == "meta"  # no file holds index and mask
        for name, values in (("index", bias.index), ("mask", bias.mask)):
            kept = values if real or values is None else values.to(self.table.device)
            self.register_buffer(name, kept, persistent=False)

    def forward(self, batch: int) -> Tensor:
        """Return the biases for so many sequences, [batch or 1, heads, N, N]."""
        bias = added_scores(self.table, self.index, self.mask, batch)
        assert bias is not None
        return bias

    def extra_repr(self) -> str:
        return f"{self.table.shape[0]} positions, {self.table.shape[1]} heads"
