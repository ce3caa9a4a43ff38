# SPDX-License-Identifier: Apache-2.0
"""Tells whether tensors are still what something was made from: where they lie, and every byte that is there.

A version counter is no proof. Fused optimisers, collectives, ``parameter.data``, numpy views and other processes all
change weights without moving it. So the content is read: on the CPU by the native library at the speed of the memory,
elsewhere by PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from . import _native

_trusting: ContextVar[bool] = ContextVar("gohsp_kernels_trusting", default=False)


class Stamp:
    """What tensors were when it was made. Make it *before* reading them, so that a change in between shows.

    Args:
        tensors: None among them stands for one that is not there.
        constants: whatever else counts.
    """

    def __init__(self, tensors: Sequence[Tensor | None], constants: tuple[object, ...] = ()) -> None:
        self.constants = constants
        self._places = _places(tensors)
        # Without the modes of the caller, under some of which real tensors cannot be read.
        with _disable_current_modes(), torch.no_grad():
            # Aliases keep the storage, and so the address, from being taken by another tensor.
            self._content = _content([t.detach() for t in tensors if t is not None])
            self._sum = None if _trusting.get() else self._content()

    def is_of(self, tensors: Sequence[Tensor | None], constants: tuple[object, ...] = ()) -> bool:
        """Whether these are the same tensors, in the same place and with the same content, and the same constants."""
        if constants != self.constants or _places(tensors) != self._places:
            return False
        return _trusting.get() or self._content() == self._sum


@contextmanager
def trusting() -> Iterator[None]:
    """In the ``with`` block of this thread, places alone are compared: whoever uses it has just read the content."""
    token = _trusting.set(True)
    try:
        yield
    finally:
        _trusting.reset(token)


def _places(tensors: Iterable[Tensor | None]) -> list[object]:
    return [None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype) for t in tensors]


def _content(tensors: Sequence[Tensor]) -> Callable[[], object]:
    """A function that reads all bytes of the tensors as they are when it is called. It holds the tensors."""
    native = _native_checksum()
    direct = [t for t in tensors if t.device.type == "cpu"] if native else []
    others = [t for t in tensors if not native or t.device.type != "cpu"]
    numbers = [number for t in direct for number in _span(t)]
    spans = (ctypes.c_int64 * len(numbers))(*numbers)

    def read() -> object:
        own = native(spans, len(direct)) if native and direct else 0
        return (own, _sums(others)) if others else own

    return read


def _span(tensor: Tensor) -> tuple[int, int]:
    """Address and number of bytes from the first element to the last, whatever lies between."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


@functools.cache
def _native_checksum() -> Callable[[Any, int], int] | None:
    """The native checksum of an array of spans, or None where the library is missing or cannot run."""
    library = _native.load()
    if not library:
        return None
    function = ctypes.CDLL(str(library.path)).gohsp_cpu_checksum
    function.argtypes = (ctypes.POINTER(ctypes.c_int64), ctypes.c_int64, ctypes.POINTER(ctypes.c_uint64))
    function.restype = ctypes.c_bool

    def checksum(spans: Any, count: int) -> int:
        result = ctypes.c_uint64()
        if not function(spans, count, ctypes.byref(result)):
            raise RuntimeError("the native library could not read the weights")
        return result.value

    try:
        checksum((ctypes.c_int64 * 0)(), 0)
    except RuntimeError:  # such as an instruction set that was asked for and is not here; the call itself will say
        return None
    return checksum


def _sums(tensors: Sequence[Tensor]) -> list[int]:
    """One number for all tensors of each device and size of element, by PyTorch; waits for the device once each."""
    groups: dict[tuple[torch.device, int], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.element_size()), []).append(tensor)
    with _disable_current_modes(), torch.no_grad():
        return [_sum(group) for group in groups.values()]


_WORDS = {1: torch.int8, 2: torch.int16}  # of elements of so many bytes; all longer ones are read as words of 4


def _sum(tensors: Sequence[Tensor]) -> int:
    """Sum of all words, each times an odd number drawn from its place.

    A word has at most 32 bits and the sum 64, so a change of one word always changes it.
    """
    word = _WORDS.get(tensors[0].element_size(), torch.int32)
    words = torch.cat([t.reshape(-1).contiguous().view(word) for t in tensors]).to(torch.int64)
    factors = torch.arange(words.numel(), dtype=torch.int64, device=words.device) * -7046029254386353131
    return int((words * ((factors ^ (factors >> 29)) | 1)).sum())
