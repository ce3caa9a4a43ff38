# SPDX-License-Identifier: Apache-2.0
"""What the commands rank, prune, train and evaluate do, once their options are a recipe and a directory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import gohsp
from gohsp import serialization
from gohsp.files import write_json
from gohsp.models.registry import is_compressed
from gohsp.progress import each
from gohsp.pruning.latency import LatencyTable
from gohsp.recipe import Recipe
from gohsp.runs.datasets import Images, image_shape, open_images
from gohsp.runs.directory import (
    HEAD_BATCH,
    RANKING,
    RunDirectory,
    check_labelled,
    evaluation_of,
    find_scores,
    load_mask,
    open_model,
    origin_of,
    pruning_of,
    ranking_of,
    read_scores,
    set_classifier,
    write_scores,
)
from gohsp.runs.progress import Steps
from gohsp.training.evaluation import evaluate as measure
from gohsp.training.soft_mask_admm import ADMM_GROUPS
from gohsp.training.train import make_accelerator
from gohsp_kernels.info import cpu_name, instruction_set

CALIBRATION_BATCH = 32
TEST_BATCH = 64


@dataclass(frozen=True)
class Work:
    """A command at work: where, on what, and how it tells."""

    run: RunDirectory
    recipe: Recipe
    console: Console

    def say(self, line: str) -> None:
        """Print a line as it is: names of files may look like markup."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def open(self) -> tuple[nn.Module, Images, dict[str, Any]]:
        """Return the recipe's model, with its classifier, its images, and what tells both from others."""
        recipe, steps = self.recipe, Steps(self.console)
        with steps.step(f"open {recipe.model.name} and {recipe.data.source}"):
            model = open_model(recipe.model, recipe.seed)
            images = open_images(recipe.data, model, recipe.augment, recipe.seed)
            origin = origin_of(recipe, model, images)
        batches = math.ceil((recipe.model.fit_head or 0) / HEAD_BATCH)
        progress = steps.step("classifier", batches) if batches else nullcontext(lambda: None)
        with progress as advance:
            note = set_classifier(model, recipe.model, images, self.run.head, advance)
        if note:
            self.say(note)
        return model, images, origin


def rank(work: Work) -> None:
    """Rank the heads and write scores.json."""
    model, images, origin = work.open()
    count = work.recipe.prune.images
    options = {name: value for name, value in work.recipe.prune.options.items() if name in RANKING}
    with Steps(work.console).step("rank the heads", math.ceil(count / CALIBRATION_BATCH)) as advance:
        scores = gohsp.rank_heads(model, each(images.calibration(count, CALIBRATION_BATCH), advance), **options)
    write_scores(work.run.scores, scores, ranking_of(work.recipe, origin))
    _show_scores(scores, work.console)
    work.say(f"wrote {work.run.scores}; next: gohsp prune --out {work.run.directory}")


def prune(work: Work) -> None:
    """Prune without training; write mask.json, scores.json (unless this model was ranked so already) and pruned/."""
    model, images, origin = work.open()
    settings, run = work.recipe.prune, work.run
    ranked = ranking_of(work.recipe, origin)
    scores = find_scores(run.scores, ranked)
    if scores is None and run.scores.is_file():
        work.say(f"{run.scores} is of another ranking: the heads are ranked anew")
    latency = _latency(model, work) if "ms" in settings.target else None
    with Steps(work.console).step("prune, without training") as advance:
        result = gohsp.prune(
            model,
            images.calibration(settings.images, CALIBRATION_BATCH),
            settings.target,
            settings.method,
            groups=settings.groups or (ADMM_GROUPS if work.recipe.admm else None),
            latency=latency,
            importance=scores,
            on_progress=advance,
            **{"seed": work.recipe.seed, **settings.options},
        )
    with run.made.making(run.pruned, pruning_of(work.recipe, origin)):
        result.mask.save(run.mask)
        if scores is None:
            write_scores(run.scores, result.report.importance, ranked)
        gohsp.save(gohsp.compress(result.model, result.mask), run.pruned)
    dense, pruned = result.report.dense, result.report.pruned
    work.say(result.mask.summary(model))
    work.say(f"{pruned.params / dense.params:.1%} of the parameters, {pruned.macs / dense.macs:.1%} of the MACs")
    if result.report.turned:
        channels = " and ".join(result.report.turned)
        work.say(f"{run.mask} means a model whose heads were turned ({channels}); its weights are in {run.pruned}")
    work.say(f"wrote {run.mask} and {run.pruned}; next: gohsp train --out {run.directory}")


def _latency(model: nn.Module, work: Work) -> LatencyTable:
    """Return the run's table of times, measured where there is none of this model, machine and number of threads."""
    path, made = work.run.latency, work.run.made
    made_from = {
        "model": hashlib.sha256(str(model).encode()).hexdigest(),
        "image_shape": list(image_shape(model)),
        "threads": torch.get_num_threads(),
        "processor": cpu_name(),
        "kernels": instruction_set(),
        "torch": torch.__version__,
    }
    reason = made.difference(path, made_from) if path.is_file() else None
    if reason:
        work.say(f"{path} is measured anew: {reason}")
    if reason or not path.is_file():
        with Steps(work.console).step("measure what heads and neurons cost here"), made.making(path, made_from):
            LatencyTable.measure(model).save(path)
        work.say(f"wrote {path}")
    return LatencyTable.load(path)


def _scores_to_train_with(work: Work, origin: Mapping[str, Any]) -> list[Any]:
    """Return the run's scores.

    Raises:
        ValueError: They are of another ranking.
    """
    run = work.run
    if run.made.of(run.pruned) is None:  # a run of an older version, whose scores say less of their ranking
        return read_scores(run.scores)
    scores = find_scores(run.scores, ranking_of(work.recipe, origin))
    if scores is None:
        raise ValueError(f"{run.scores}: is of another ranking; rank again (gohsp rank --out {run.directory})")
    return scores


def train(work: Work) -> None:
    """Train what was pruned (pruning first where that was not done), or prune while training; write model/."""
    state, run, recipe = make_accelerator(), work.run, work.recipe
    if state.is_main_process and not (_is_saved(run.pruned) and run.made.of(run.pruned) != {}):
        prune(work)
    state.wait_for_everyone()  # the first process prunes, for all
    model, images, origin = work.open()
    check_labelled(images, "training")
    made_from = _check_training(work, origin)
    start = model if recipe.admm is not None else gohsp.load(run.pruned)
    while_pruning: dict[str, Any] = {}
    if recipe.admm is not None:
        scores = _scores_to_train_with(work, origin)
        while_pruning = {"admm": recipe.admm, "plan": load_mask(run), "importance": scores}
    if state.is_main_process:
        run.made.record(run.checkpoint, made_from)
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
        **while_pruning,
    )
    if state.is_main_process:
        for row in result.history:
            work.console.print(
                f"{row['stage']:9} epoch {row['epoch']:3}  loss {row['loss']:.4f}  top-1 {row['top1']:.2%}",
                highlight=False,
            )
        with run.made.making(run.model, made_from):
            gohsp.save(result.model.cpu(), run.model)
        work.say(f"wrote {run.model}; next: gohsp evaluate --out {run.directory}")
    state.wait_for_everyone()


def _check_training(work: Work, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a training is made from.

    Raises:
        ValueError: What was pruned, or the training that was interrupted, is of another model, data or settings.
    """
    run, now = work.run, pruning_of(work.recipe, origin)
    # Runs of older versions have no records; what they were made from is theirs to know.
    if run.made.of(run.pruned) is not None and (reason := run.made.difference(run.pruned, now)):
        raise ValueError(
            f"{run.pruned}: {reason}; prune again (gohsp prune --out {run.directory}) or use another directory"
        )
    if run.checkpoint.is_file() and not _is_of_this_pruning(run, run.checkpoint):
        raise ValueError(
            f"{run.checkpoint}: is of a training that began with another {run.pruned.name}; remove it or use another "
            "directory"
        )
    settings = work.recipe.model_dump(mode="json", include={"fit", "admm", "distill", "augment"})
    return {"pruned": run.made.stamp(run.pruned), **settings}


def _is_of_this_pruning(run: RunDirectory, path: Path) -> bool:
    """Whether a trained model, or the state of its training, began with what is in pruned/ now."""
    record = run.made.of(path)
    # Neither has a record in the run of an older version.
    return ({"pruned": None} if record is None else record).get("pruned", "") == run.made.stamp(run.pruned)


def evaluate(work: Work) -> None:
    """Measure top-1 of the run's trained model, else of its pruned, else of its dense one; write evaluation.json."""
    model, images, origin = work.open()
    check_labelled(images, "top-1")
    found = _find_model(work, origin)
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
    with work.run.made.making(work.run.evaluation, evaluation_of(work.run, what)):
        write_json(work.run.evaluation, row)
    work.console.print(
        f"{what}: top-1 {result['top1']:.2%} on {result['images']} images, {size.params / 1e6:.2f} M parameters, "
        f"{size.macs / 1e9:.3f} GMACs",
        highlight=False,
    )


def _find_model(work: Work, origin: Mapping[str, Any]) -> Path | None:
    """Return the folder of the run's trained model, else of its pruned one, None if it has neither.

    Raises:
        ValueError: They were made from another model, or with images for training that are now for testing.
    """
    run = work.run
    trained = _is_saved(run.model) and _is_of_this_pruning(run, run.model)
    if _is_saved(run.model) and not trained:
        work.say(f"{run.model} was not trained from {run.pruned} as it is now: it is left out")
    found = run.model if trained else run.pruned if _is_saved(run.pruned) else None
    record = run.made.of(run.pruned)
    if found is None or record is None:
        return found
    names = ("weights", "image_shape", "seed")
    reason = run.made.difference(run.pruned, {**record, **{name: origin[name] for name in names}})
    if reason:
        raise ValueError(f"{found}: {reason}; prune again (gohsp prune --out {run.directory}) or use another directory")
    if reason := run.made.difference(run.pruned, {**record, "data": origin["data"]}):
        work.say(f"{found}: {reason}")
    return found


def _is_saved(folder: Any) -> bool:
    return (folder / serialization.PLAN).is_file()


def _show_scores(scores: Any, console: Console) -> None:
    for index, block in enumerate(scores):
        console.print(f"block {index:2}: " + "  ".join(f"{float(score):.3f}" for score in block), highlight=False)
