# SPDX-License-Identifier: Apache-2.0
"""What the commands rank, prune, train and evaluate do, once their options are a recipe and a directory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

import gohsp
from gohsp import serialization
from gohsp.files import write_json
from gohsp.models.registry import is_compressed
from gohsp.pruning.latency import LatencyTable
from gohsp.recipe import Recipe
from gohsp.runs.datasets import Images, open_images
from gohsp.runs.directory import (
    HEAD_BATCH,
    RANKING,
    RunDirectory,
    find_scores,
    load_mask,
    open_model,
    ranking_of,
    read_scores,
    set_classifier,
    write_scores,
)
from gohsp.runs.progress import Steps, each
from gohsp.training.evaluation import evaluate as measure
from gohsp.training.train import make_accelerator

CALIBRATION_BATCH = 32
TEST_BATCH = 64


@dataclass(frozen=True)
class Work:
    """A command at work: where, on what, and how it tells."""

    run: RunDirectory
    recipe: Recipe
    console: Console

    def open(self) -> tuple[nn.Module, Images]:
        """Return the recipe's model, with its classifier, and its images."""
        recipe, steps = self.recipe, Steps(self.console)
        with steps.step(f"open {recipe.model.name} and {recipe.data.source}"):
            model = open_model(recipe.model, recipe.seed)
            images = open_images(recipe.data, model, recipe.augment, recipe.seed)
        batches = math.ceil((recipe.model.fit_head or 0) / HEAD_BATCH)
        progress = steps.step("classifier", batches) if batches else nullcontext(lambda: None)
        with progress as advance:
            note = set_classifier(model, recipe.model, images, self.run.head, advance)
        if note:
            self.console.print(f"[dim]{note}[/]")
        return model, images


def rank(work: Work) -> None:
    """Rank the heads and write scores.json."""
    model, images = work.open()
    count = work.recipe.prune.images
    options = {name: value for name, value in work.recipe.prune.options.items() if name in RANKING}
    with Steps(work.console).step("rank the heads", math.ceil(count / CALIBRATION_BATCH)) as advance:
        scores = gohsp.rank_heads(model, each(images.calibration(count, CALIBRATION_BATCH), advance), **options)
    write_scores(work.run.scores, scores, ranking_of(work.recipe, model))
    _show_scores(scores, work.console)
    work.console.print(f"wrote {work.run.scores}; next: [bold]gohsp prune --out {work.run.directory}[/]")


def prune(work: Work) -> None:
    """Prune without training; write mask.json, scores.json (unless this model was ranked so already) and pruned/."""
    model, images = work.open()
    settings, run = work.recipe.prune, work.run
    ranked = ranking_of(work.recipe, model)
    scores = find_scores(run.scores, ranked)
    latency = _latency(model, work) if "ms" in settings.target else None
    with Steps(work.console).step("prune, without training") as advance:
        result = gohsp.prune(
            model,
            images.calibration(settings.images, CALIBRATION_BATCH),
            settings.target,
            settings.method,
            groups=settings.groups,
            latency=latency,
            importance=scores,
            on_progress=advance,
            **{"seed": work.recipe.seed, **settings.options},
        )
    result.mask.save(run.mask)
    if scores is None:
        write_scores(run.scores, result.report.importance, ranked)
    gohsp.save(gohsp.compress(result.model, result.mask), run.pruned)
    dense, pruned = result.report.dense, result.report.pruned
    work.console.print(result.mask.summary(model), highlight=False, soft_wrap=True)
    work.console.print(
        f"{pruned.params / dense.params:.1%} of the parameters, {pruned.macs / dense.macs:.1%} of the MACs"
    )
    work.console.print(f"wrote {run.mask} and {run.pruned}; next: [bold]gohsp train --out {run.directory}[/]")


def _latency(model: nn.Module, work: Work) -> LatencyTable:
    """Return the run's table of times, measured where it is not there yet."""
    if not work.run.latency.is_file():
        with Steps(work.console).step("measure what heads and neurons cost here"):
            LatencyTable.measure(model).save(work.run.latency)
        work.console.print(f"wrote {work.run.latency}")
    return LatencyTable.load(work.run.latency)


def train(work: Work) -> None:
    """Train what was pruned (pruning first where that was not done), or prune while training; write model/."""
    state, run, recipe = make_accelerator(), work.run, work.recipe
    if state.is_main_process and not _is_saved(run.pruned):
        prune(work)
    state.wait_for_everyone()  # the first process prunes, for all
    model, images = work.open()
    start = model if recipe.admm is not None else gohsp.load(run.pruned)
    while_pruning: dict[str, Any] = {}
    if recipe.admm is not None:
        while_pruning = {"admm": recipe.admm, "plan": load_mask(run), "importance": read_scores(run.scores)}
    with _training_bar(work.console) as on_step:
        result = gohsp.train(
            start,
            images.train,
            fit=recipe.fit,
            distill=recipe.distill,
            teacher=model if recipe.distill is not None else None,
            test=images.test,
            directory=run.directory,
            workers=recipe.data.workers,
            seed=recipe.seed,
            on_step=on_step,
            **while_pruning,
        )
    if state.is_main_process:
        for row in result.history:
            work.console.print(
                f"{row['stage']:9} epoch {row['epoch']:3}  loss {row['loss']:.4f}  top-1 {row['top1']:.2%}",
                highlight=False,
            )
        gohsp.save(result.model.cpu(), run.model)
        work.console.print(f"wrote {run.model}; next: [bold]gohsp evaluate --out {run.directory}[/]")
    state.wait_for_everyone()


def evaluate(work: Work) -> None:
    """Measure top-1 of the run's trained model, else of its pruned, else of its dense one; write evaluation.json."""
    model, images = work.open()
    found = next((folder for folder in (work.run.model, work.run.pruned) if _is_saved(folder)), None)
    if found is not None:
        model = gohsp.load(found)
    with Steps(work.console).step("test images", len(images.test)) as advance:
        total = 0

        def count(more: int) -> None:
            nonlocal total
            total += more
            advance(total, len(images.test))

        result = measure(model, images.test, batch_size=TEST_BATCH, workers=work.recipe.data.workers, on_batch=count)
    size = gohsp.count(model)
    what = found.name if found is not None else "compressed" if is_compressed(model) else "dense"
    row = {"what": what, "params": size.params, "macs": size.macs, **result}
    write_json(work.run.evaluation, row)
    work.console.print(
        f"{what}: top-1 {result['top1']:.2%} on {result['images']} images, {size.params / 1e6:.2f} M parameters, "
        f"{size.macs / 1e9:.3f} GMACs",
        highlight=False,
    )


def _is_saved(folder: Any) -> bool:
    return (folder / serialization.PLAN).is_file()


def _show_scores(scores: Any, console: Console) -> None:
    for index, block in enumerate(scores):
        console.print(f"block {index:2}: " + "  ".join(f"{float(score):.3f}" for score in block), highlight=False)


@contextmanager
def _training_bar(console: Console) -> Iterator[Any]:
    """A bar for each stage, with the loss of the last step."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), TextColumn("loss {task.fields[loss]:.3f}"), console=console) as bar:
        tasks: dict[str, Any] = {}

        def on_step(stage: str, step: int, total: int, loss: float) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, loss=loss)
            bar.update(tasks[stage], completed=step, loss=loss)

        yield on_step
