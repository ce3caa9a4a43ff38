# SPDX-License-Identifier: Apache-2.0
"""Attention and MLP sublayers alone: norm, gather, matrices, scatter and residual addition.

One function runs the attention (or the MLP) sublayers of all blocks, one after the other, so that each finds its
weights where a whole model leaves them and not in the nearest cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import gohsp_kernels as gk
from bench.harness import cases
from bench.harness.cases import SEED, Case, Workload
from bench.harness.compare import BASELINE, Place, ReadyContender, compare
from bench.harness.environment import Settings, version_of

Step = Callable[[Tensor], Tensor]

PARTS = ("attention", "mlp")


def run(todo: Sequence[Case], batches: Sequence[int], settings: Settings) -> list[str]:
    """Compare gohsp with the sliced modules in PyTorch, for each case, batch and kind of sublayer.

    Returns:
        Names of the contenders that were refused for a wrong result.
    """
    refused: list[str] = []
    for case in todo:
        work = cases.load(case)
        for batch in batches:
            x = tokens(work, batch)
            for part in PARTS:
                place = Place("sublayers", case.label, part, batch, x.shape[1])
                heading = f"{case.label}: {part} sublayers of {len(work.dense.blocks)} blocks, batch {batch}"
                refused += compare(place, contenders(work, part, x, settings), settings, heading).refused
    return refused


def tokens(work: Workload, batch: int) -> Tensor:
    """Return a random residual stream [batch, tokens, features]."""
    shape = (batch, work.count.tokens, work.mask.geometry.dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def contenders(work: Workload, part: str, x: Tensor, settings: Settings) -> list[ReadyContender]:
    """Return PyTorch's and gohsp's sublayers of one kind; gohsp's kernels only where they can run."""
    double = [plain(block, part) for block in work.masked_in_double().blocks]
    expected = chain(double, x.double())()
    torch_version, own_version = torch.__version__, version_of("gohsp")
    result = [
        ReadyContender(
            "sliced", chain([plain(block, part) for block in work.sliced.blocks], x), expected, torch_version
        ),
        ReadyContender("gohsp-reference", compact(work, part, x, "reference"), expected, own_version),
    ]
    support = gk.can_run("cpu")
    if not support:
        settings.report_left_out(BASELINE, support.reason)
        return result
    return [*result, ReadyContender(BASELINE, compact(work, part, x, "cpu"), expected, own_version)]


def plain(block: Any, part: str) -> Step:
    """Return one half of a timm block."""
    if part == "attention":
        return lambda x: x + block.ls1(block.attn(block.norm1(x)))
    return lambda x: x + block.ls2(block.mlp(block.norm2(x)))


def fused(block: Any, part: str) -> Step:
    """Return one half of a compressed block."""
    return block.sublayers()[PARTS.index(part)]


def compact(work: Workload, part: str, x: Tensor, backend: str) -> Callable[[], Tensor]:
    """Return a function that runs gohsp's sublayers of one kind on a backend."""
    steps = chain([fused(block, part) for block in work.compressed.blocks], x)

    def run() -> Tensor:
        with gk.use_backend(backend):
            return steps()

    return run


def chain(steps: Iterable[Step], x: Tensor) -> Callable[[], Tensor]:
    """Return a function that applies all steps to x, each to the result of the one before, without autograd."""
    steps = list(steps)

    def run() -> Tensor:
        with torch.inference_mode():
            y = x
            for step in steps:
                y = step(y)
            return y

    return run
