# SPDX-License-Identifier: Apache-2.0
"""Tells whether tensors are still what something was made from: where they lie, and every byte that is there.

A version counter is no proof. Fused optimisers, collectives, ``parameter.data``, numpy views and other processes all
change weights without moving it. So the content is read: by the native libraries at the speed of the memory, where they
are missing by PyTorch.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from operator import attrgetter
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
            self._sum = None if _trusting.get() else self._content()()

    def is_of(self, tensors: Sequence[Tensor | None], constants: tuple[object, ...] = ()) -> bool:
        """Whether these are the same tensors, in the same place and with the same content, and the same constants."""
        if constants != self.constants or _places(tensors) != self._places:
            return False
        return _trusting.get() or self._content()() == self._sum

    def begin(self) -> Callable[[Sequence[Tensor | None]], bool]:
        """Begin to read what is in the places now; the function that is returned says whether tensors are still those.

        On a GPU the content is read in the order of the current stream, so that what is launched afterwards runs while
        the host looks at the tensors one by one.
        """
        content = self._content()
        return lambda tensors: _places(tensors) == self._places and content() == self._sum


@contextmanager
def trusting() -> Iterator[None]:
    """In the ``with`` block of this thread, places alone are compared: whoever uses it has just read the content."""
    token = _trusting.set(True)
    try:
        yield
    finally:
        _trusting.reset(token)


_dtype = attrgetter("dtype")


def _places(tensors: Sequence[Tensor | None]) -> list[object]:
    """Where tensors lie and how, by loops in C: a model has hundreds, and each call looks at all of them."""
    there = [t for t in tensors if t is not None]
    looked = (map(look, there) for look in (Tensor.data_ptr, Tensor.size, Tensor.stride, _dtype))
    return [[t is None for t in tensors], *map(list, looked)]


_Reading = Callable[[], Callable[[], object]]
"""Begins to read all bytes of some tensors as they are now; what it returns waits for a value that stands for them."""


def _content(tensors: Sequence[Tensor]) -> _Reading:
    """How to read the tensors, which it holds."""
    groups: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.device, []).append(tensor)
    readings = [_reading(device, group) for device, group in groups.items()]

    def begin() -> Callable[[], object]:
        begun = [reading() for reading in readings]
        return lambda: [finish() for finish in begun]

    return begin


def _reading(device: torch.device, tensors: Sequence[Tensor]) -> _Reading:
    if device.type == "cpu" and (checksum := _native_checksum()):
        return _at_once(partial(checksum, _spans(tensors), len(tensors)), tensors)
    if device.type == "cuda" and not torch.version.hip and not _native.cuda_missing(device.index):
        return _from_gpu(device, tensors)
    return _at_once(partial(_sums, tensors), tensors)


def _at_once(read: Callable[[], object], tensors: Sequence[Tensor]) -> _Reading:
    def begin(_held: Sequence[Tensor] = tensors) -> Callable[[], object]:
        value = read()
        return lambda: value

    return begin


def _spans(tensors: Sequence[Tensor]) -> Any:
    numbers = [number for tensor in tensors for number in _span(tensor)]
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _from_gpu(device: torch.device, tensors: Sequence[Tensor]) -> _Reading:
    """By one launch and one copy of some kilobytes to the host."""
    pieces = torch.tensor(
        [
            (address + start, min(PIECE_BYTES, size - start))
            for address, size in map(_span, tensors)
            for start in range(0, size, PIECE_BYTES)
        ],
        dtype=torch.int64,
    )
    pieces = pieces.reshape(-1, 2).to(device)

    def begin(_held: Sequence[Tensor] = tensors) -> Callable[[], object]:
        with torch.cuda.device(device):
            sums = torch.ops.gohsp_kernels.cuda_checksum(pieces)
            host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True)
            host.copy_(sums, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()

        def finish() -> object:
            arrived.synchronize()
            return host.numpy().tobytes()

        return finish

    return begin


PIECE_BYTES = 64 * 1024
"""What a block of the GPU's checksum reads."""


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
