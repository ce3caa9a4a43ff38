# SPDX-License-Identifier: Apache-2.0
"""What a model that is not frozen pays for reading its weights at each call, to tell whether they have changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

import gohsp
from bench.harness import cases
from bench.harness.cases import Case, Workload
from bench.harness.compare import BASELINE, Place, ReadyContender, compare, row
from bench.harness.environment import Settings, version_of
from bench.harness.results import append
from bench.routines.end_to_end import title
from gohsp_kernels._stamp import trusting

COMPRESSED = "gohsp-compressed"
UNREAD = "gohsp-compressed, weights not read"


def run(todo: Sequence[Case], batches: Sequence[int], settings: Settings) -> list[str]:
    """Time the compressed model as it is, the same without the reading, and the frozen model, in turns.

    Returns:
        Names of the contenders that were refused for a wrong result.
    """
    refused: list[str] = []
    for case in todo:
        work = cases.load(case)
        size = sum(p.numel() * p.element_size() for p in work.compressed.parameters()) / 1e6
        for batch in batches:
            place = Place("content", case.label, "model", batch, work.count.tokens)
            heading = f"{size:.1f} MB of weights, {title(work, batch)}"
            result = compare(place, contenders(work, work.images(batch)), settings, heading)
            refused += result.refused
            if not result.refused:
                read, unread = (np.asarray(result.timings[name].seconds) for name in (COMPRESSED, UNREAD))
                cost = list(read / unread - 1)
                append(settings.out, [row(place, COMPRESSED, "cost-of-reading", cost, "x", settings)])
                settings.console.print(f"reading the weights: {np.median(cost):+.1%} of the call", highlight=False)
    return refused


def contenders(work: Workload, images: Tensor) -> list[ReadyContender]:
    """Return the three ways; all compute the same logits."""
    with torch.inference_mode():
        expected = work.masked_in_double()(images.double())
    ways: dict[str, tuple[nn.Module, Callable[[], AbstractContextManager[None]]]] = {
        BASELINE: (gohsp.freeze(work.compressed), nullcontext),
        COMPRESSED: (work.compressed, nullcontext),
        UNREAD: (work.compressed, trusting),
    }

    def runner(model: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.inference_mode(), context():
                return model(images)

        return run

    return [ReadyContender(name, runner(*way), expected, version_of("gohsp")) for name, way in ways.items()]
