# SPDX-License-Identifier: Apache-2.0
"""What families of timm's have in common whose blocks are called with an image's tokens and attend within windows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gohsp.layers import FrozenBlock, PrunedBlock, RaggedAttention


class InWindows:
    """What compact and frozen blocks have in common: where their tokens stand in windows.

    A compact block puts its tokens into windows once, runs both of its sublayers on these as if they were images, and
    puts them back: norms, MLP and residual know nothing of it.
    """

    def split(self, x: Tensor) -> Tensor:
        """Return the tokens window by window, [B * windows, n, D] from [B, ..., D]."""
        raise NotImplementedError

    def join(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Undo :meth:`split`.

        Args:
            x: [B * windows, n, D].
            size: Sizes of what was split, between B and D.
        """
        raise NotImplementedError


class PrunedWindowBlock(InWindows, PrunedBlock):
    """Block with compact parameters that is called with the tokens of images, in whatever shape."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the block's output [B, ..., D] for x of that shape."""
        size = x.shape[1:-1]
        if not self.must_call_modules():
            return self.join(self.run(self.split(x)), size)

        def attend(seen: Tensor) -> Tensor:
            return self.join(self.attn(self.split(seen)), size)

        # A path is dropped for an image and not for a window.
        x = x + self.drop_path1(self.ls1(self.normed(self.norm1, attend, x)))
        return x + self.drop_path2(self.ls2(self.normed(self.norm2, self.mlp, x)))


class FrozenWindowBlock(InWindows, FrozenBlock):
    """Packed block that is called with the tokens of images, in whatever shape."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the block's output [B, ..., D] for x of that shape; no gradient flows through it."""
        return self.join(super().forward(self.split(x)), x.shape[1:-1])


class PlainMapAttention(RaggedAttention):
    """Attention of heads of any width in plain PyTorch, called with maps of tokens that attend to each other."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the attention output [B, height, width, D] for x of that shape."""
        return super().forward(x.flatten(1, -2)).unflatten(1, x.shape[1:-1])


def places_in_windows(size: Sequence[int], window: Sequence[int], shift: Sequence[int] = (0, 0)) -> Tensor:
    """Return the tokens of each window of a map, int64 [windows, n].

    Args:
        size, window: (height, width) of the map and of its windows, which divide it.
        shift: By how many tokens the windows begin later; the last ones go on at the other side.
    """
    (height, width), (rows, columns) = size, window
    places = torch.arange(math.prod(size), device="cpu").view(height, width)
    places = places.roll((-shift[0], -shift[1]), dims=(0, 1))
    return places.view(height // rows, rows, width // columns, columns).transpose(1, 2).reshape(-1, rows * columns)
