# SPDX-License-Identifier: Apache-2.0
"""Which tile sizes a launch uses: a rule of shape and device alone, so that a run can be repeated.

The ladders hold every configuration that the rule can choose; the tests compile each for each architecture. A file of
measured choices (:mod:`gohsp_kernels.tune`) overrides the rule; nothing is ever measured during a call.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass

import torch

from ._launch import interpreted


@dataclass(frozen=True)
class Target:
    """What the rule knows of a device: "cuda" with a compute capability as 80, 90, 100, or "hip" with a gfx name."""

    vendor: str
    arch: int | str
    processors: int

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Target:
        """Target of a GPU. The interpreter takes CPU tensors and behaves like an A100."""
        if device.type == "cpu" and interpreted():
            return Target("cuda", 80, 108)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
        return Target("cuda", properties.major * 10 + properties.minor, properties.multi_processor_count)


    @property
    def roomy(self) -> bool:
        """Whether operands of the tensor cores stay in shared memory, of which there are 228 KiB: Hopper and Blackwell."""
        return self.arch in (90, 100, 103)


@dataclass(frozen=True)
class Tile:
    """Tile of a matrix product and how it is executed: rows, columns, depth of a step, warps, steps in flight."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int

    @functools.cached_property
    def meta(self) -> dict[str, int]:
        return asdict(self)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile_ladder(target: Target, itemsize: int) -> tuple[Tile, ...]:
    """Tiles from the largest to the smallest, for elements of ``itemsize`` bytes."""
    if itemsize == 4:
        return Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3)
    # On AMD two stages are one buffer in local memory, of which a compute unit has 64 KiB.
    stages = 2 if target.vendor == "hip" else 3
    largest = Tile(128, 128, 64, 8, stages) if target.roomy or target.vendor == "hip" else Tile(128, 128, 32, 8, 4)
    return largest, Tile(128, 64, 64, 8, stages), *(Tile(m, 64, 64, 4, stages) for m in (64, 32, 16))


@functools.lru_cache(maxsize=4096)
def linear_tile(target: Target, itemsize: int, rows: int, outputs: int, indexed: bool = False) -> Tile:
    """The largest tile that still gives every multiprocessor a program; the smallest where none does.

    A launch that gathers or scatters columns holds an address for each element, which the registers of the largest tile
    have no room for: it begins with the second.
    """
    ladder = tile_ladder(target, itemsize)
    if indexed and itemsize < 4:
        ladder = ladder[1:]
    for tile in ladder:
        if cdiv(rows, tile.BLOCK_M) * cdiv(outputs, tile.BLOCK_N) >= target.processors:
            return tile
    return ladder[-1]


def weight_gradient_tile(target: Target, itemsize: int) -> Tile:
    """Tile of the weight's gradient: outputs, inputs, and rows of a step."""
    return Tile(64, 64, 32 if itemsize == 4 else 64, 4, 2 if target.vendor == "hip" or itemsize == 4 else 3)


def rows_per_range(target: Target, rows: int, tiles: int, step: int) -> int:
    """How many rows one program sums, so that ``tiles`` times the ranges come to two programs a multiprocessor."""
    ranges = max(1, 2 * target.processors // max(tiles, 1))
    return cdiv(cdiv(max(rows, 1), ranges), step) * step


WIDTHS = (16, 32, 64, 128)
"""Widths that heads are padded to in registers. A tensor core takes no less than 16."""


@dataclass(frozen=True)
class AttentionTile:
    """Tile of an attention kernel: queries, keys of a step, warps, steps in flight."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    @functools.cached_property
    def meta(self) -> dict[str, int]:
        return asdict(self)


@functools.lru_cache(maxsize=4096)
def attention_tile(itemsize: int, queries: int, tokens: int, aligned: bool) -> AttentionTile:
    """16 queries a program for class tokens, else 64; the step of 32 or 64 keys that pads the tokens less, or 64.

    float32 takes half. Channels that are not ``aligned`` are loaded one by one: more threads hold their addresses.
    """
    block_m = 16 if queries <= 16 else 32 if itemsize == 4 else 64
    if itemsize == 4 or not aligned:
        return AttentionTile(block_m, 32, 4 if aligned else 8, 2)
    return AttentionTile(block_m, 64 if cdiv(tokens, 64) * 2 <= cdiv(tokens, 32) else 32, 4, 2)


def attention_gradient_tile(itemsize: int, widest: int, aligned: bool) -> AttentionTile:
    """Tile of both kernels of the attention's gradient. They hold four operands of a head, the forward kernel two."""
    small = itemsize == 4 or widest == 128 or not aligned
    return AttentionTile(32, 32, 4, 1) if small else AttentionTile(64, 64, 4, 1)


@dataclass(frozen=True)
class MlpTile:
    """Tile of the fused MLP: the two panels of features, rows, hidden neurons of a step, warps, steps in flight."""

    PANEL_A: int
    PANEL_B: int
    BLOCK_M: int
    BLOCK_H: int
    num_warps: int
    num_stages: int

    @functools.cached_property
    def meta(self) -> dict[str, int]:
        return asdict(self)


def panels(features: int) -> tuple[int, int]:
    """128 and the power of two from 16 on that holds the rest of ``features``, or 0 where there is none."""
    rest = features - 128
    return 128, 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())


@functools.lru_cache(maxsize=4096)
def fused_mlp_tile(target: Target, itemsize: int, rows: int, features: int) -> MlpTile | None:
    """The tile of the one-launch MLP, or None where two launches are better.

    One launch moves the rows in and out and nothing else, but each program reads all weights, and rows are all that it
    can be divided by. So: 16 bit; 128 to 256 features (above, a tile of rows does not fit in registers; below, launches
    are too short to matter); and at least one tile of rows for every multiprocessor.
    """
    wide = target.roomy or target.vendor == "hip"
    tile = MlpTile(*panels(features), 64, 32, 8, 2) if wide else MlpTile(*panels(features), 32, 32, 4, 2)
    if itemsize == 2 and 128 <= features <= 256 and cdiv(rows, tile.BLOCK_M) >= target.processors:
        return tile
    return None
