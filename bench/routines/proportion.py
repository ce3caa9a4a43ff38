# SPDX-License-Identifier: Apache-2.0
"""Whether time falls with the multiply-accumulates that are removed, as a straight line, or stays behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import gohsp
from bench.harness import cases, contenders, results
from bench.harness.cases import Case, Workload
from bench.harness.compare import BASELINE, TOLERANCE, Place, check, milliseconds, numbers_table, row
from bench.harness.environment import Settings
from bench.harness.timing import time_in_turns
from bench.routines import roofline
from gohsp.timing import Timing

DENSE = "dense"
GEMM = "gemm"


def run(model: str, presets: Sequence[str], batches: Sequence[int], settings: Settings) -> list[str]:
    """Time gohsp on a model whole and cut in several ways, beside torch's own matrix product, all in turns.

    The straight line starts at the whole model's time and falls by what the removed multiply-accumulates would take at
    the rate of that product. A model above it has lost a part of what pruning promises.

    Args:
        model: timm's name.
        presets: Ways to cut it; "dense" is added.
        batches: Images at a time.
        settings: Rounds, threads, file and console.

    Returns:
        The presets that were refused for a wrong result: then nothing is timed.
    """
    works = {preset: cases.load(Case(model, preset)) for preset in dict.fromkeys((DENSE, *presets))}
    refused: list[str] = []
    for batch in batches:
        images = works[DENSE].images(batch)
        wrong = [preset for preset, work in works.items() if not _agrees(work, images, settings)]
        refused += wrong
        if not wrong:
            _measure(model, works, images, settings)
    return refused


def _agrees(work: Workload, images: Tensor, settings: Settings) -> bool:
    with contenders.ready([BASELINE], work, images, settings) as ready:
        return all(error <= TOLERANCE for error in check(ready).values())


def _measure(model: str, works: dict[str, Workload], images: Tensor, settings: Settings) -> None:
    batch = len(images)
    functions: dict[str, Callable[[], object]] = {name: _runner(work, images) for name, work in works.items()}
    functions[GEMM] = roofline.matrix_product()
    title = f"{model}, batch {batch}"
    timings = time_in_turns(functions, settings.rounds, settings.console, title)
    table = numbers_table(f"{title}: gohsp against the straight line", "preset", ("MACs", "ms", "line ms", "off by"))
    rows = []
    for preset, work in works.items():
        off = deviations(timings, preset, batch * (works[DENSE].count.macs - work.count.macs))
        place = Place("proportion", work.case.label, "model", batch, work.count.tokens)
        rows.append(row(place, BASELINE, "time", milliseconds(timings[preset]), "ms", settings))
        rows.append(row(place, BASELINE, "off-line", off, "x", settings))
        share = work.count.macs / works[DENSE].count.macs
        time = 1e3 * timings[preset].median
        table.add_row(
            preset, f"{share:.0%}", f"{time:.4g}", f"{time / (1 + np.median(off)):.4g}", f"{np.median(off):+.1%}"
        )
    results.append(settings.out, rows)
    settings.console.print(table)


def _runner(work: Workload, images: Tensor) -> Callable[[], Tensor]:
    model = gohsp.freeze(work.compressed)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def deviations(timings: dict[str, Timing], preset: str, macs_removed: float) -> list[float]:
    """Return, round by round, by which share of the line's time a model is above the line (below: negative).

    Args:
        timings: Timings of all models and of the matrix product.
        preset: The model whose deviation is wanted.
        macs_removed: Multiply-accumulates that this model lacks.
    """
    dense, cut, gemm = (np.asarray(timings[name].seconds) for name in (DENSE, preset, GEMM))
    line = dense - macs_removed * gemm / roofline.GEMM_SIZE**3
    return [float(value) for value in cut / line - 1]
