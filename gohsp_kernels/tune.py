# SPDX-License-Identifier: Apache-2.0
"""Measures tiles of the Triton kernels on the GPU at hand: ``python -m gohsp_kernels.tune``.

The fastest tile of each shape goes into a file of the user's cache (:mod:`gohsp_kernels.triton.tuned`), which later
processes read before the default rule. Nothing is measured outside this command. Without a GPU it lists what it would
try.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from .triton import tuned
from .triton.attention import HeadLayout, attention, padded_width
from .triton.config import AttentionTile, Target, Tile, attention_tile, linear_tile
from .triton.packing import pack_linear

Run = Callable[[], object]

SHARED_KIB = {80: 163, 90: 227, 100: 227, 103: 227}
"""KiB of shared memory that a program may have; 99 on graphics cards, and 64 of local memory on AMD."""


@dataclass(frozen=True)
class LinearShape:
    """A packed linear layer: LayerNorm and an activation, or a residual."""

    rows: int
    inputs: int
    outputs: int
    norm: bool

    def key(self, dtype: torch.dtype) -> str:
        return tuned.linear_key(dtype, self.rows, self.outputs, self.inputs, False)

    def default(self, target: Target, dtype: torch.dtype) -> Tile:
        return linear_tile(target, dtype, self.rows, self.outputs, self.inputs, False)

    def candidates(self, target: Target, dtype: torch.dtype) -> Iterator[Tile]:
        """Tiles whose operands fit in shared memory and whose accumulators fit in registers."""
        shared = 64 if target.vendor == "hip" else SHARED_KIB.get(int(target.arch), 99)
        for m, n, k, warps, stages in product((16, 32, 64, 128), (32, 64, 128, 256), (32, 64), (4, 8), (2, 3, 4)):
            fits = (m + n) * k * stages * dtype.itemsize <= shared * 1024
            if fits and m * n <= 128 * 32 * warps and m <= max(16, 2 * self.rows) and k <= max(32, self.inputs):
                yield Tile(m, n, k, warps, stages)

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Callable[[Any], Run]:
        """What to time for a tile, on random numbers."""
        x = torch.randn(self.rows, self.inputs, dtype=dtype, device=device)
        residual = None if self.norm else x.new_zeros(self.rows, self.outputs)
        linear = pack_linear(
            torch.randn(self.outputs, self.inputs, device=device) / self.inputs**0.5,
            torch.zeros(self.outputs, device=device),
            dtype,
            features=self.inputs,
            out_features=self.outputs,
            norm_eps=1e-6 if self.norm else None,
            activation="gelu" if self.norm else "identity",
        )
        return lambda tile: lambda: linear(x, residual, tile=tile)


@dataclass(frozen=True)
class AttentionShape:
    """Attention over heads of one width."""

    batch: int
    tokens: int
    heads: int
    width: int

    def key(self, dtype: torch.dtype) -> str:
        return tuned.attention_key(dtype, self.tokens, self.tokens, padded_width(self.width), True)

    def default(self, target: Target, dtype: torch.dtype) -> AttentionTile:
        return attention_tile(target, dtype, self.tokens, self.tokens, padded_width(self.width), True)

    def candidates(self, target: Target, dtype: torch.dtype) -> Iterator[AttentionTile]:
        """Tiles whose accumulators and scores fit in registers."""
        for m, n, warps, stages in product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3)):
            if m * (n + padded_width(self.width)) <= 128 * 32 * warps:
                yield AttentionTile(m, n, warps, stages)

    def prepare(self, dtype: torch.dtype, device: torch.device) -> Callable[[Any], Run]:
        """What to time for a tile, on random numbers."""
        widths = (self.width,) * self.heads
        layout = HeadLayout.of(widths, widths, device)
        qkv = torch.randn(self.batch, self.tokens, layout.qkv_channels, dtype=dtype, device=device)
        return lambda tile: lambda: attention(qkv, layout, self.width**-0.5, self.tokens, tile=tile)


Shape = LinearShape | AttentionShape

DTYPES = (torch.float16, torch.bfloat16)


def shapes(batches: Sequence[int] = (1, 8, 64)) -> Iterator[Shape]:
    """Linear layers and attention of DeiT-Tiny, Small and Base, whole and pruned to their presets, at 224 pixels."""
    for features, heads, kept_heads, hidden in ((192, 3, 3, 384), (384, 6, 4, 960), (768, 12, 8, 1920)):
        for batch, (h, neurons) in product(batches, ((heads, 4 * features), (kept_heads, hidden))):
            rows, width = 197 * batch, 64
            yield LinearShape(rows, features, 3 * h * width, True)
            yield AttentionShape(batch, 197, h, width)
            yield LinearShape(rows, h * width, features, False)
            yield LinearShape(rows, features, neurons, True)
            yield LinearShape(rows, neurons, features, False)


def distinct(todo: Sequence[Shape], dtype: torch.dtype) -> dict[str, Shape]:
    """Shapes by key, the first of each."""
    found: dict[str, Shape] = {}
    for shape in todo:
        found.setdefault(shape.key(dtype), shape)
    return found


def best(shape: Shape, target: Target, dtype: torch.dtype, device: torch.device, time: Callable[[Run], float]) -> Any:
    """The tile with the least time; the default one where none is faster.

    Args:
        shape: what runs.
        target: of ``device``.
        dtype: of the activations.
        device: where it runs.
        time: milliseconds of a call.
    """
    run = shape.prepare(dtype, device)
    fastest = shape.default(target, dtype)
    least = time(run(fastest))
    for tile in shape.candidates(target, dtype):
        try:
            milliseconds = time(run(tile))
        except (OutOfResources, CompilationError):  # the estimate of what fits is coarse
            continue
        if milliseconds < least:
            fastest, least = tile, milliseconds
    return fastest


def milliseconds(run: Run) -> float:
    """Median of some 20 ms of calls, with the caches cleared before each: short, as there are thousands of tiles."""
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


def tune(
    todo: Sequence[Shape],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = DTYPES,
    time: Callable[[Run], float] = milliseconds,
    write: Callable[[str], object] = print,
) -> None:
    """Measure every shape and save its fastest tile, one after the other.

    Args:
        todo: shapes; of those that share a key the first is measured.
        device: a GPU.
        dtypes: of the activations.
        time: milliseconds of a call.
        write: takes a line for each shape.
    """
    target = Target.of(device)
    about = {"triton": triton.__version__, "torch": torch.__version__}
    for dtype in dtypes:
        for key, shape in distinct(todo, dtype).items():
            tile = best(shape, target, dtype, device, time)
            path = tuned.save(target.name, {key: asdict(tile)}, about)  # at once: the rest may take an hour
            write(f"{key}: {tile}, in {path.name}")
    linear_tile.cache_clear()
    attention_tile.cache_clear()


def plan(target: Target, write: Callable[[str], object] = print) -> None:
    """Write what would be tried on ``target``."""
    for dtype in DTYPES:
        for key, shape in distinct(list(shapes()), dtype).items():
            write(f"{key}: {len(list(shape.candidates(target, dtype)))} tiles, by rule {shape.default(target, dtype)}")


def main() -> None:
    """Tune on the first GPU, or say what would be tried on an H100."""
    if torch.cuda.is_available():
        tune(list(shapes()), torch.device("cuda", 0))
        return
    print("No GPU here, so nothing is measured. On an H100 this would try, for each shape:")
    plan(Target("cuda", 90, 132))


if __name__ == "__main__":
    main()
