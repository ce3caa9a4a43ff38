# SPDX-License-Identifier: Apache-2.0
"""What pruning itself takes: gohsp.prune on random weights and images, quiet and beside other work."""

from __future__ import annotations

import time
from collections.abc import Sequence

import timm
import torch
from rich.progress import track
from torch import Tensor, nn

import gohsp
from bench.harness import results
from bench.harness.cases import SEED
from bench.harness.compare import Place, numbers_table, row
from bench.harness.environment import Settings, version_of
from bench.routines.contention import busy_core
from gohsp.models.registry import family_of

TARGET = {"params": 0.6}
WAYS = {"heads, hidden": ("heads", "hidden"), "the default": None}


def run(models: Sequence[str], images: int, image_size: int | None, settings: Settings) -> list[str]:
    """Time pruning to 60 % of the parameters, with heads and neurons alone and with all that goes by default.

    Args:
        models: timm's names.
        images: How many calibration images.
        image_size: Side of them; None takes the model's own.
        settings: Of the run.

    Returns:
        No names: there is nothing that could be refused.
    """
    for name in models:
        options = {} if image_size is None else {"img_size": image_size}
        model = timm.create_model(name, **options).eval()
        shape = family_of(model).image_shape(model) or (3, 224, 224)
        data = torch.randn(images, *shape, generator=torch.Generator().manual_seed(SEED)).split(32)
        place = Place("pruning", f"{name}@{shape[1]}", "prune", images, gohsp.count(model).tokens)
        seconds = {way: _seconds(model, data, groups, settings, way) for way, groups in WAYS.items()}
        with busy_core():
            beside = {
                way: _seconds(model, data, groups, settings, f"{way}, a core busy") for way, groups in WAYS.items()
            }
        table = numbers_table(f"{place.case}, {images} images", "groups", ("quiet s", "beside s", "growth"))
        rows = []
        for way in WAYS:
            for metric, values in (("quiet", seconds[way]), ("beside", beside[way])):
                rows.append(row(place, way, metric, values, "s", settings, version=version_of("gohsp")))
            quiet, busy = (sorted(values)[len(values) // 2] for values in (seconds[way], beside[way]))
            table.add_row(way, f"{quiet:.1f}", f"{busy:.1f}", f"{busy / quiet:.2f}")
        results.append(settings.out, rows)
        settings.console.print(table)
    return []


def _seconds(
    model: nn.Module,
    data: Sequence[Tensor],
    groups: tuple[str, ...] | None,
    settings: Settings,
    about: str,
) -> list[float]:
    found = []
    for _ in track(range(settings.rounds), about, console=settings.console, transient=True):
        start = time.perf_counter()
        gohsp.prune(model, data, TARGET, groups=groups)
        found.append(time.perf_counter() - start)
    return found
