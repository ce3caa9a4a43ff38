# SPDX-License-Identifier: Apache-2.0
"""The backends, peers behind one protocol, and what they are asked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._cache import Entry, capturing, up_to_date
from ._watchers import is_counted, is_rewritten
from .descriptors import Descriptor, Sublayer


class Request(NamedTuple):
    """A call, as far as a backend must know it to tell whether it can run it.

    Attributes:
        device: where the tensors are.
        dtype: of the activations.
        needs_grad: whether the result must be differentiable.
        capability: compute capability of a GPU to judge by; None for that of ``device``.
        widest_head: most channels that a head has.
        weights: one of ``dispatch.WEIGHTS``.
        rows: of activations; 0 where it is not known.
        operator: name of the one that is called; empty for those that all backends have.
        parts: what the call has beyond what every backend knows, some of ``descriptors.PARTS``.
    """

    device: torch.device
    dtype: torch.dtype
    needs_grad: bool = False
    capability: tuple[int, int] | None = None
    widest_head: int = 0
    weights: str = "float32"
    rows: int = 0
    operator: str = ""
    parts: frozenset[str] = frozenset()


class Backend(Protocol):
    """A way to compute operators. Each means the same on all backends that have it."""

    name: str

    @property
    def operators(self) -> Collection[str]:
        """Names of those that it has."""

    @property
    def parts(self) -> Collection[str]:
        """Those of ``descriptors.PARTS`` that it can run."""

    def missing(self, request: Request) -> str:
        """Why it cannot run such a call, or the empty string if it can."""

    def only_named(self, request: Request) -> str:
        """Why "auto" does not take it for such a call although it could run, or the empty string."""

    def priority(self, request: Request) -> int:
        """How early it is tried: the highest number first. The reference, which runs everything, has 0."""

    def run(self, operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
        """Compute a call; ``num_queries`` counts where the operator attends."""

    def chain(self, x: Tensor, sublayers: Sequence[Sublayer]) -> PackedChain | None:
        """The sublayers for activations like ``x``, to be run in one go; None where they are called one by one."""


def needs_grad(tensors: Iterable[object]) -> bool:
    """Whether a call on these tensors must be differentiable, backwards or forwards, or watched on its way."""
    if is_rewritten() or is_counted():
        return True
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


BACKENDS: dict[str, Backend] = {}
"""By name."""


def register(backend: Backend) -> None:
    """Add a backend.

    Raises:
        ValueError: there is one of that name.
    """
    if backend.name in BACKENDS:
        raise ValueError(f"backend: wanted a name that is free; got {backend.name!r}")
    BACKENDS[backend.name] = backend


class PackedChain:
    """Packed sublayers of a chain, packed again when one of their tensors has changed.

    Args:
        x: [batch, tokens, features], of the dtype and device that it will be called with.
        sublayers: in their order.
        pack: makes the packed form of one for activations like its second argument [0, features].
        run: the activations, the packed forms and the number of queries to the result.
    """

    def __init__(
        self,
        x: Tensor,
        sublayers: Sequence[Sublayer],
        pack: Callable[[Any, Tensor], Any],
        run: Callable[[Tensor, list[Any], int], Tensor],
    ) -> None:
        self._like = x.new_empty(0, x.shape[2])
        self._sublayers = sublayers
        self._pack_one, self._run = pack, run
        self._tensors = [t for s in sublayers for t in s.tensors if t is not None]
        self._entry: Entry[list[Any]] | None = None

    def fits(self, x: Tensor) -> bool:
        """Whether it was made for such an ``x``."""
        like = self._like
        return (x.shape[2], x.dtype, x.device) == (like.shape[1], like.dtype, like.device)

    def current(self) -> list[Any]:
        """The packed sublayers as their tensors are now."""
        before = self._entry
        entry = up_to_date(before, self._tensors, (), self._pack)
        if entry is not before and not capturing(self._tensors):
            self._entry = entry
        return entry[1]

    def __call__(self, x: Tensor, num_queries: int) -> Tensor:
        return self._run(x, self.current(), num_queries)

    def _pack(self) -> list[Any]:
        for sublayer in self._sublayers:
            sublayer.check(self._like.shape[1])
        return [self._pack_one(sublayer, self._like) for sublayer in self._sublayers]
