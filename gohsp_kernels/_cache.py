# SPDX-License-Identifier: Apache-2.0
"""Prepared weights, kept beside the parameters they were made from and made again when one of those has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Packed = TypeVar("Packed")


@dataclass(frozen=True)
class _Fingerprint:
    """What a packed weight was made from.

    The detached aliases keep the storage alive, so that no other tensor can take its address while the fingerprint
    lives; they share the version counter, so that any in-place change shows.
    """

    aliases: tuple[Tensor | None, ...]
    pointers: tuple[int, ...]
    versions: tuple[int, ...]
    constants: tuple[object, ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], constants: tuple[object, ...]) -> _Fingerprint:
        present = [t for t in tensors if t is not None]
        return cls(
            tuple(None if t is None else t.detach() for t in tensors),
            tuple(t.data_ptr() for t in present),
            tuple(t._version for t in present),
            constants,
        )

    def matches(self, tensors: Sequence[Tensor | None], constants: tuple[object, ...]) -> bool:
        if constants != self.constants:
            return False
        pointers, versions, i = self.pointers, self.versions, 0
        for tensor, alias in zip(tensors, self.aliases, strict=True):
            if tensor is None or alias is None:
                if tensor is not alias:
                    return False
                continue
            if tensor.data_ptr() != pointers[i] or tensor._version != versions[i] or tensor.shape != alias.shape:
                return False
            i += 1
        return True


_keepers: list[list[object]] = []


@contextmanager
def keeping() -> Iterator[list[object]]:
    """A list of everything that caches give out in the ``with`` block, for what goes on reading it afterwards."""
    kept: list[object] = []
    _keepers.append(kept)
    try:
        yield kept
    finally:
        _keepers.pop()


class PackedCache:
    """What one backend has prepared, by parameter. An entry goes when its key tensor goes."""

    def __init__(self) -> None:
        self._entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

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
        if key.is_inference():
            # Such a tensor keeps no version counter, so a change could not be seen.
            return pack()
        entry: tuple[_Fingerprint, Any] | None = self._entries.get(key)
        if entry is None or not entry[0].matches(tensors, constants):
            entry = self._entries[key] = (_Fingerprint.of(tensors, constants), pack())
        for kept in _keepers:
            kept.append(entry[1])
        return entry[1]
