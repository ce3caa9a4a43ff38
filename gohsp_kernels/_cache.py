# SPDX-License-Identifier: Apache-2.0
"""Prepared weights, kept beside the parameters they were made from and made again when one of those has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from ._stamp import Stamp, trusting
from ._watchers import unrecorded

Packed = TypeVar("Packed")

Entry = tuple[Stamp, Packed, set[Any]]
"""What tensors were, the form made of them, and the streams of a GPU that its memory is known to be read on."""

GPU = "cuda"  # type of the devices that have streams and graphs; PyTorch gives AMD's the same name

# Of the thread (or task) that captures: another's block would end this one, and what it gives out is not read here.
_keepers: ContextVar[tuple[list[object], ...]] = ContextVar("gohsp_kernels_keepers", default=())

# What graphs that others capture (torch.compile among them) read by address, and so must not go.
_captured: list[object] = []


@contextmanager
def keeping() -> Iterator[list[object]]:
    """A list of everything that caches give out in the ``with`` block, for what goes on reading it afterwards."""
    kept: list[object] = []
    token = _keepers.set((*_keepers.get(), kept))
    try:
        yield kept
    finally:
        _keepers.reset(token)


def capturing(tensors: Sequence[Tensor | None]) -> bool:
    """Whether calls on these tensors are only written down at present, for a CUDA graph."""
    return _gpu_of(tensors) is not None and torch.cuda.is_current_stream_capturing()


def up_to_date(
    entry: Entry[Packed] | None,
    tensors: Sequence[Tensor | None],
    constants: tuple[object, ...],
    pack: Callable[[], Packed],
    by_content: bool = True,
) -> Entry[Packed]:
    """``entry`` if it is there and still true, otherwise what ``pack`` makes now, beside a stamp that is older still.

    Stamp and packed form are one object, so that no thread meets the form of one state with the stamp of another. What
    it gives can be read on the current stream at once, and may be dropped as soon as the reading is launched. What is
    made in a capture is written when the graph runs, so it is for that capture alone: do not keep it.
    """
    device = _gpu_of(tensors)
    written_down = capturing(tensors)
    # A capture only writes kernels down, so nothing can be read back in it; the call before it has just compared.
    with trusting() if written_down or not by_content else nullcontext():
        if entry is None or not entry[0].is_of(tensors, constants):
            # Without the modes of the caller: a form made under FakeTensorMode would be a fake for good.
            with _disable_current_modes():
                entry = (Stamp(tensors, constants), pack(), set())
            if device is not None and not written_down:
                # Other streams do not wait for this one, and a capture could not. It is one wait for each packing.
                torch.cuda.current_stream(device).synchronize()
                entry[2].add(torch.cuda.current_stream(device))
    keepers = _keepers.get()
    for kept in keepers:
        kept.append(entry[1])
    if written_down:
        if not keepers:
            _captured.append(entry[1])
    elif device is not None and (stream := torch.cuda.current_stream(device)) not in entry[2]:
        read_on(stream, entry[1])
        entry[2].add(stream)
    return entry


def _gpu_of(tensors: Sequence[Tensor | None]) -> torch.device | None:
    if not torch.cuda.is_initialized():
        return None
    return next((t.device for t in tensors if t is not None and t.device.type == GPU), None)


def read_on(stream: Any, packed: object) -> None:
    """Keep the memory of a packed form from being used again before ``stream`` has done with it, when it is dropped."""
    for tensor in _tensors_of(packed):
        if tensor.device.type == GPU:
            tensor.record_stream(stream)


def _tensors_of(packed: object) -> Iterator[Tensor]:
    """All tensors in a packed form: a tensor, an object with some, or a sequence of such."""
    if isinstance(packed, Tensor):
        yield packed
    elif isinstance(packed, (list, tuple)):
        for part in packed:
            yield from _tensors_of(part)
    elif hasattr(packed, "__dict__"):
        yield from _tensors_of(list(vars(packed).values()))


class PackedCache:
    """What one backend has prepared, by parameter. An entry goes when its key tensor goes.

    Args:
        by_content: whether a change is told by the bytes of the tensors. Otherwise version counters are believed,
            which costs no wait for a GPU: for lists of columns, that no optimiser writes.
    """

    def __init__(self, by_content: bool = True) -> None:
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._by_content = by_content

    def get(
        self,
        key: Tensor,
        tensors: Sequence[Tensor | None],
        constants: tuple[object, ...],
        pack: Callable[[], Packed],
    ) -> Packed:
        """The packed form of ``tensors`` and ``constants``, made by ``pack`` if it is not there or no longer true.

        Args:
            key: one of ``tensors``; each holds at most one packed form in a cache.
            tensors: all that ``pack`` reads.
            constants: whatever else the result depends on.
            pack: called without arguments.
        """
        if isinstance(key, FakeTensor) or key.device.type == "meta":
            return pack()
        if not self._by_content:
            if any(t is not None and t.is_inference() for t in tensors):
                return pack()  # such a tensor keeps no version counter, so a change could not be seen
            constants = (*constants, *(t._version for t in tensors if t is not None))
        before: Entry[Packed] | None = self._entries.get(key)
        # Packed or not yet: the graphs of two traces are compared.
        with unrecorded() if torch.jit.is_tracing() else nullcontext():
            entry = up_to_date(before, tensors, constants, pack, self._by_content)
        if entry is not before and not capturing(tensors):
            self._entries[key] = entry
        return entry[1]
