# SPDX-License-Identifier: Apache-2.0
"""Whole models, from images to logits."""

from __future__ import annotations

from collections.abc import Sequence

from bench.harness import cases, contenders
from bench.harness.cases import Case, Workload
from bench.harness.compare import Place, compare
from bench.harness.environment import Settings


def run(todo: Sequence[Case], batches: Sequence[int], names: Sequence[str], settings: Settings) -> list[str]:
    """Compare contenders on each case at each batch size.

    Returns:
        Names of the contenders that were refused for a wrong result.
    """
    refused: list[str] = []
    for case in todo:
        work = cases.load(case)
        for batch in batches:
            with contenders.ready(names, work, work.images(batch), settings) as ready:
                place = Place("end-to-end", case.label, "model", batch, work.count.tokens)
                refused += compare(place, ready, settings, title(work, batch)).refused
    return refused


def title(work: Workload, batch: int) -> str:
    """Return the heading of a table: the case, its size and the batch."""
    params, macs = work.count.params, work.count.macs
    size = f"{params / 1e6:.2f} M params ({params / work.dense_count.params:.0%})"
    return f"{work.case.label}: {size}, {macs / 1e9:.2f} GMACs ({macs / work.dense_count.macs:.0%}), batch {batch}"
