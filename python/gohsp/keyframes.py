# SPDX-License-Identifier: Apache-2.0
"""Video by two networks: a dense one now and then, a pruned one always, and what lies between them carried along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gohsp.arguments import check_kind, check_whole


class KeyframeModel(nn.Module):
    """A dense model on key frames, and a pruned one in between that remembers how far off it was there.

    On a key frame both models run. The dense features are the answer, and the difference, dense minus pruned, is kept.
    On the frames after it the pruned model runs alone, and the difference is added to its features. So a frame costs
    the pruned model and one ``every``-th of the dense one; with ``every=1`` the dense model alone runs.

    A batch is a frame of each of B streams that run in step. The state is one difference for each of them. It is no
    part of the ``state_dict``. Where it does not fit a batch, because the number of streams, the size of the frames,
    the dtype or the device is another, that batch is a key frame. What it cannot tell is that the streams are others,
    or the weights: call :meth:`reset` then. One object serves one set of streams, and one thread.

    For inference only: no gradient is recorded, and a model in training mode is refused.

    Args:
        dense: Any module from frames [B, ...] to features or logits [B, ...]. It is held, not copied.
        pruned: A cheaper one whose result has the same shape, such as ``gohsp.freeze(gohsp.compress(...))``.
        every: Frames from one key frame to the next.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: ``every`` is below 1.
    """

    def __init__(self, dense: nn.Module, pruned: nn.Module, every: int = 8) -> None:
        check_kind("dense", dense, nn.Module, "a module")
        check_kind("pruned", pruned, nn.Module, "a module")
        check_whole("every", every, 1)
        super().__init__()
        self.dense, self.pruned, self.every = dense, pruned, int(every)
        self.training = dense.training or pruned.training
        self.reset()

    def reset(self) -> None:
        """Forget the streams: the next batch is a key frame."""
        self._difference: Tensor | None = None
        self._frames: tuple[Any, ...] = ()  # what the batches of the streams look like
        self._age = 0  # batches since the key frame, itself included

    @torch.no_grad()
    def forward(self, frames: Tensor) -> Tensor:
        """Return the features [B, ...] of one frame of each stream [B, ...].

        Raises:
            RuntimeError: One of the models is in training mode.
            TypeError: A model gives something other than a tensor.
            ValueError: The models give different shapes.
        """
        if self.training or self.dense.training or self.pruned.training:
            raise RuntimeError("KeyframeModel: wanted evaluation mode, for it is made for inference; call eval() first")
        if self.every == 1:
            return self.dense(frames)
        cheap = self.pruned(frames)
        check_kind("pruned", cheap, Tensor, "a module that gives a tensor")
        kind = (frames.shape, frames.dtype, frames.device, cheap.dtype, cheap.device)
        if self._difference is not None and self._age < self.every and self._frames == kind:
            self._age += 1
            return cheap + self._difference
        self.reset()
        exact = self.dense(frames)
        check_kind("dense", exact, Tensor, "a module that gives a tensor")
        if exact.shape != cheap.shape:
            raise ValueError(
                f"pruned: wanted the shape that the dense model gives, {tuple(exact.shape)}, got {tuple(cheap.shape)}"
            )
        self._difference, self._frames, self._age = exact - cheap, kind, 1
        return exact

    def extra_repr(self) -> str:
        """Return how often the dense model runs."""
        return f"every={self.every}"
