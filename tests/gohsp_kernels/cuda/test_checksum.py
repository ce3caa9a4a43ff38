# SPDX-License-Identifier: Apache-2.0
"""The GPU's checksum of weights, in emulation: every bit of every piece counts, and nothing beside it is read."""

from __future__ import annotations

import pytest
import torch

from . import helpers  # noqa: F401 (registers the operators)

SIZES = (0, 1, 2, 15, 16, 17, 4095, 4096, 4097, 16411)


def checksum(memory: torch.Tensor, first: int, size: int) -> int:
    pieces = torch.tensor([[memory.data_ptr() + first, size]])
    return int(torch.ops.gohsp_kernels.cuda_checksum(pieces))


@pytest.mark.parametrize("first", [0, 2, 13])
@pytest.mark.parametrize("size", SIZES)
def test_every_changed_bit_shows(size: int, first: int) -> None:
    memory = torch.randint(
        0, 256, (first + size + 16,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)
    )
    before = checksum(memory, first, size)
    assert before == checksum(memory, first, size)
    for place in {0, 1, size // 2, size - 17, size - 1} & set(range(size)):
        for bit in (1, 128):
            memory[first + place] ^= bit
            assert checksum(memory, first, size) != before
            memory[first + place] ^= bit
    memory[first + size :] ^= 255
    memory[:first] ^= 255
    assert checksum(memory, first, size) == before


@pytest.mark.parametrize("size", [4096, 16411])
def test_words_that_change_places_show(size: int) -> None:
    memory = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    before = checksum(memory, 0, size)
    for changed in (memory.roll(4), memory.roll(16), memory.roll(4096 // 2), memory.flip(0), memory ^ 128, memory * 0):
        assert checksum(changed.contiguous(), 0, size) != before


def test_pieces_have_a_number_each() -> None:
    memory = torch.arange(64, dtype=torch.uint8)
    start = memory.data_ptr()
    whole = torch.ops.gohsp_kernels.cuda_checksum(torch.tensor([[start, 32], [start + 32, 32], [start, 32]])).tolist()
    assert whole == [checksum(memory, 0, 32), checksum(memory, 32, 32), checksum(memory, 0, 32)]
    assert whole[0] != whole[1]
