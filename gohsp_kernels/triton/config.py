# SPDX-License-Identifier: Apache-2.0
"""Which tile sizes a launch uses: a rule of shape and device alone, so that a run can be repeated.

The tests compile everything that the rule can choose for each architecture. What was measured on a device
(:mod:`gohsp_kernels.tune`) goes before the rule; nothing is ever measured during a call.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, fields

import torch

from .._gpu import WIDEST_HEAD
from . import tuned
from .support import interpreting


@dataclass(frozen=True)
class Target:
    """What the rule knows of a device.

    Attributes:
        vendor: "cuda" or "hip".
        arch: compute capability as 80, 90, 100; or gfx name.
        processors: number of multiprocessors or compute units.
        name: of the device, under which measured choices are kept.
    """

    vendor: str
    arch: int | str
    processors: int
    name: str = ""

    @staticmethod
    @functools.cache
    def of(device: torch.device) -> Target:
        """Target of a GPU. The interpreter takes CPU tensors and behaves like an A100."""
        if device.type == "cpu" and interpreting():
            return Target("cuda", 80, 108)
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            gfx = properties.gcnArchName.split(":")[0]
            return Target("hip", gfx, properties.multi_processor_count, properties.name)
        capability = properties.major * 10 + properties.minor
        return Target("cuda", capability, properties.multi_processor_count, properties.name)

    @property
    def roomy(self) -> bool:
        """Hopper and Blackwell: tensor cores read operands from shared memory, and there are 228 KiB of it."""
        return self.arch in (90, 100, 103)


def read_from_shared(target: Target, block_m: int) -> bool:
    """Whether a product reads its operands from shared memory while the program runs on: Hopper's, from 64 rows on.

    A kernel that also sums such an operand must load it a second time for that, by :func:`.rows.load_again`.
    Blackwell's products do so too, but there the compiler counts the slots right.
    """
    return target.arch == 90 and block_m >= 64


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


TILE_FIELDS = tuple(field.name for field in fields(Tile))


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def tile_ladder(target: Target, itemsize: int) -> tuple[Tile, ...]:
    """Tiles from the largest to the smallest, for elements of ``itemsize`` bytes."""
    if itemsize == 4:
        ladder = Tile(64, 64, 32, 4, 3), Tile(32, 64, 32, 4, 3), Tile(16, 64, 32, 4, 3)
        # Three products of tf32 hold each operand twice, and the largest tile spills where both are in registers.
        return ladder if target.roomy or target.vendor == "hip" else ladder[1:]
    # On AMD two stages are one buffer in local memory, of which a compute unit has 64 KiB.
    stages = 2 if target.vendor == "hip" else 3
    largest = Tile(128, 128, 64, 8, stages) if target.roomy or target.vendor == "hip" else Tile(128, 128, 32, 8, 4)
    return largest, Tile(128, 64, 64, 8, stages), *(Tile(m, 64, 64, 4, stages) for m in (64, 32, 16))


@functools.lru_cache(maxsize=4096)
def linear_tile(target: Target, dtype: torch.dtype, rows: int, outputs: int, inputs: int, indexed: bool) -> Tile:
    """The largest tile that still gives every multiprocessor a program; the smallest where none does.

    A launch that gathers or scatters columns (``indexed``) holds an address for each element, which the registers of
    the largest tile have no room for: it begins with the second.
    """
    key = tuned.linear_key(dtype, rows, outputs, inputs, indexed)
    if measured := tuned.lookup(target.name, key, TILE_FIELDS):
        return Tile(**measured)
    ladder = tile_ladder(target, dtype.itemsize)
    if indexed and dtype.itemsize < 4:
        ladder = ladder[1:]
    for tile in ladder:
        if cdiv(rows, tile.BLOCK_M) * cdiv(outputs, tile.BLOCK_N) >= target.processors:
            return tile
    return ladder[-1]


WEIGHT_GRADIENT_TILE = Tile(64, 64, 32, 4, 3)
"""Tile of the weight's gradient: outputs, inputs, and rows of a step. Ranges of rows fill the device, not tiles."""


def rows_per_range(target: Target, rows: int, tiles: int, step: int) -> int:
    """How many rows one program sums, so that ``tiles`` times the ranges come to two programs a multiprocessor."""
    ranges = max(1, 2 * target.processors // max(tiles, 1))
    return cdiv(cdiv(max(rows, 1), ranges), step) * step


WIDTHS = (16, 32, 64, WIDEST_HEAD)
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


ATTENTION_TILE_FIELDS = tuple(field.name for field in fields(AttentionTile))


@functools.lru_cache(maxsize=4096)
def attention_tile(
    target: Target, dtype: torch.dtype, queries: int, tokens: int, widest: int, aligned: bool
) -> AttentionTile:
    """16 queries a program for class tokens, else 64; steps of 64 keys, or of 32 where those pad a tenth less.

    float32 takes half. Eight warps where four would spill: on Blackwell, whose accumulators come back from a memory of
    their own, and with channels that are not ``aligned``, so that each element is loaded by an address of its own.
    """
    key = tuned.attention_key(dtype, queries, tokens, widest, aligned)
    if measured := tuned.lookup(target.name, key, ATTENTION_TILE_FIELDS):
        return AttentionTile(**measured)
    block_m = 16 if queries <= 16 else 32 if dtype.itemsize == 4 else 64
    warps = 8 if not aligned or (target.arch in (100, 103) and block_m == 64) else 4
    narrow = dtype.itemsize == 4 or not aligned or 10 * cdiv(tokens, 64) * 64 > 11 * cdiv(tokens, 32) * 32
    return AttentionTile(block_m, 32 if narrow else 64, warps, 2)


def attention_gradient_tile(target: Target, itemsize: int, widest: int, aligned: bool) -> AttentionTile:
    """Tile of both kernels of the attention's gradient. They hold four operands of a head, the forward kernel two.

    In float32 on NVIDIA's GPUs each of those is held twice, for three products of tf32.
    """
    if itemsize == 4 and target.vendor == "cuda":
        return AttentionTile(16, 16, 8, 1) if widest == 128 else AttentionTile(16, 32 if aligned else 16, 4, 1)
    small = itemsize == 4 or widest == 128 or not aligned
    return AttentionTile(32 if small else 64, 32, 4, 1)


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
