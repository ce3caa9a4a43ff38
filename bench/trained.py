# SPDX-License-Identifier: Apache-2.0
"""What pruned models are worth after light training: one model a method and seed, all trained by the same loop.

A run is a folder with the checkpoint of its training and, when it has ended, result.json; so a study that was killed
goes on in the middle of a training run, and processes with other methods or seeds can share the folder of all runs. The
table holds all results there are.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import gohsp
from bench.accuracy import write
from gohsp.artefacts import open_model, set_classifier
from gohsp.data import Images, open_images
from gohsp.files import write_json
from gohsp.recipe import Fit, Recipe, make_recipe
from gohsp.train import make_accelerator
from gohsp.training.evaluation import evaluate
from gohsp.training.loop import Loop, Stage

BATCH = 32
RECIPE = Path("recipes/vit_small_cifar10_40_cpu.yaml")
WORK = Path("build/trained")


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        method: A key of :data:`METHODS`.
        seed: Of the images that are taken, the pruning and the training.
        params_m: Millions of parameters.
        before, top1: Share of test images that are classified right, just after pruning and after all training.
        curve: The same after each epoch.
        images, test_images, epochs, lr, precision: Of the training.
        prune_seconds, epoch_seconds: On the machine and in the company that the run had.
    """

    method: str
    seed: int
    params_m: float
    before: float
    top1: float
    curve: str
    images: int
    test_images: int
    epochs: int
    lr: float
    precision: str
    prune_seconds: float
    epoch_seconds: float


COLUMNS = tuple(f.name for f in fields(Result))


def _ours(method: str, optimiser: str) -> Callable[[Any, Images, Recipe], nn.Module]:
    def prune(model: Any, images: Images, recipe: Recipe) -> nn.Module:
        settings = recipe.prune
        batches = images.calibration(settings.images, BATCH)
        result = gohsp.prune(model, batches, settings.target, method, optimiser=optimiser, seed=recipe.seed)
        return gohsp.compress(result.model, result.mask)

    return prune


def _torch_pruning(model: Any, images: Images, recipe: Recipe) -> nn.Module:
    """Prune as Torch-Pruning's own example for timm's ViT does: first-order Taylor, one ratio for all layers, widths of
    the residual stream and of the heads included. The ratio is the one that leaves the wanted parameters."""
    wanted = recipe.prune.target["params"] * _params(model)
    low, high = 0.0, 1.0
    for _ in range(8):
        ratio = (low + high) / 2
        pruned = _at_ratio(model, images, recipe, ratio)
        low, high = (ratio, high) if _params(pruned) > wanted else (low, ratio)
    return _at_ratio(model, images, recipe, high)


def _at_ratio(model: Any, images: Images, recipe: Recipe, ratio: float) -> nn.Module:
    import torch_pruning as tp

    model = copy.deepcopy(model).requires_grad_(True)
    attentions = [block.attn for block in model.blocks]
    pruner = tp.pruner.MetaPruner(
        model,
        torch.zeros(1, *images.plain[0][0].shape),
        importance=tp.importance.GroupTaylorImportance(),
        pruning_ratio=ratio,
        ignored_layers=[model.head],
        num_heads={attn.qkv: attn.num_heads for attn in attentions},
        prune_head_dims=True,
        round_to=2,
    )
    for batch, labels in _labelled(images, recipe.prune.images):
        F.cross_entropy(model(batch), labels).backward()
    for group in pruner.step(interactive=True):
        group.prune()
    for attn in attentions:
        attn.num_heads = pruner.num_heads[attn.qkv]
        attn.attn_dim = attn.qkv.out_features // 3
        attn.head_dim = attn.attn_dim // attn.num_heads
    model.zero_grad(set_to_none=True)
    return model


def _labelled(images: Images, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, count, BATCH):
        pairs = [images.plain[index] for index in range(start, min(start + BATCH, count))]
        yield torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


@dataclass(frozen=True)
class Method:
    """How a model is made smaller, and after how many epochs of training."""

    prune: Callable[[Any, Images, Recipe], nn.Module]
    after: int = 0


METHODS = {
    "dense": Method(lambda model, images, recipe: model),
    "gohsp": Method(_ours("gohsp", "ridge")),
    "gohsp-after-1": Method(_ours("gohsp", "ridge"), after=1),
    "l2": Method(_ours("l2", "drop")),
    "taylor": Method(_ours("taylor", "drop")),
    "torch-pruning": Method(_torch_pruning),
}
"""All see the same images in as many epochs. gohsp-after-1 is dense in the first of them, so that what is pruned knows
the task. l2 and taylor are gohsp's criteria of these names and gohsp's way to share a budget out, without compensation:
what remains keeps its weights, as other tools leave it."""


def changed(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Return a recipe with other values, given by section and name.

    Raises:
        ValueError: A value is not what it has to be.
    """
    values = recipe.model_dump()
    for section, named in changes.items():
        values[section].update(named)
    return make_recipe(values)


def run(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], work: Path, out: Path) -> None:
    """Do the runs that have no result yet, seed by seed, and write the table.

    Args:
        recipe: Model, images, how much is pruned and how is trained. Its seed is replaced.
        methods: Keys of :data:`METHODS`.
        seeds: One run each.
        work: Folder of the runs.
        out: CSV file of the table.

    Raises:
        ValueError: There is no method of that name.
    """
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"methods: wanted some of {', '.join(METHODS)}; got {', '.join(unknown)}")
    console = Console()
    for seed in seeds:
        for method in methods:
            folder = work / f"{method}-{seed}"
            if not (folder / "result.json").is_file():
                folder.mkdir(parents=True, exist_ok=True)
                result = _run_one(recipe.model_copy(update={"seed": seed}), method, folder)
                write_json(folder / "result.json", asdict(result))
                console.print(f"{method}, seed {seed}: {result.before:.2%} -> {result.curve}", highlight=False)
            results = [json.loads(path.read_text()) for path in sorted(work.glob("*/result.json"))]
            write(out, COLUMNS, sorted(results, key=lambda r: (list(METHODS).index(r["method"]), r["seed"])))


def _run_one(recipe: Recipe, method: str, folder: Path) -> Result:
    model = open_model(recipe.model, recipe.seed)
    images = open_images(recipe.data, model, recipe.augment, recipe.seed)
    set_classifier(model, recipe.model, images, folder.parent / f"head-{recipe.seed}.safetensors", lambda: None)
    whole, own = recipe.fit, METHODS[method]
    history: list[dict[str, Any]] = []
    if own.after:
        first = whole.model_copy(update={"epochs": own.after, "scheduler": "constant"})
        history += _train(model, images, recipe, first, folder / "before")
        whole = whole.model_copy(update={"epochs": whole.epochs - own.after, "warmup_epochs": 0.1})
    started = time.perf_counter()
    model = own.prune(model, images, recipe)
    pruned = time.perf_counter() - started
    before = evaluate(model, images.test)["top1"]
    history += _train(model, images, recipe, whole, folder)
    top1 = [row["top1"] for row in history]
    return Result(
        method=method,
        seed=recipe.seed,
        params_m=round(_params(model) / 1e6, 3),
        before=before,
        top1=top1[-1],
        curve=" ".join(f"{share:.4f}" for share in top1),
        images=len(images.train),
        test_images=len(images.test),
        epochs=recipe.fit.epochs,
        lr=recipe.fit.lr,
        precision=recipe.fit.precision,
        prune_seconds=round(pruned, 1),
        epoch_seconds=round(sorted(row["seconds"] for row in history)[len(history) // 2], 1),
    )


def _train(model: nn.Module, images: Images, recipe: Recipe, fit: Fit, folder: Path) -> list[dict[str, Any]]:
    """Train in place. The loop of :func:`gohsp.train`, which itself takes no model of another tool."""
    loop = Loop(
        accelerator=make_accelerator(),
        data=images.train,
        test=images.test,
        fit=fit,
        seed=recipe.seed,
        settings=recipe.model_dump(mode="json"),
        directory=folder,
        workers=recipe.data.workers,
    )
    loop.run(Stage("finetune", fit.epochs, fit.lr), model, loop.find_checkpoint())
    return loop.history


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
