# SPDX-License-Identifier: Apache-2.0
"""Biases of attention scores for relative positions, with a column for each head that is left."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from gohsp.models.base import ScoreBias


class PositionBias(nn.Module):
    """What is added to scores for relative positions, with a column of the table for each head that is left.

    Args:
        bias: That of the dense half block. It is not changed.
        heads: Indices of the kept heads in it.
    """

    index: Tensor

    def __init__(self, bias: ScoreBias, heads: Sequence[int]) -> None:
        super().__init__()
        self.table = nn.Parameter(bias.table.detach()[:, list(heads)].clone(), requires_grad=bias.trains)
        real = self.table.device.type == "meta"  # no file holds the index
        self.register_buffer("index", bias.index if real else bias.index.to(self.table.device), persistent=False)

    def forward(self) -> Tensor:
        """Return the biases, [1, heads, N, N]."""
        return self.table[self.index].movedim(-1, 0)[None]

    def extra_repr(self) -> str:
        return f"{self.table.shape[0]} positions, {self.table.shape[1]} heads"
