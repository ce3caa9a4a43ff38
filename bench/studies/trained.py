# SPDX-License-Identifier: Apache-2.0
"""What pruned models are worth after light training: one model a method and seed, all trained by the same loop.

In the first study the model as it was downloaded is pruned and learns the task afterwards. In the second (``again``)
it has learnt the task already: all methods start from the dense model that the first study ended with, and train for as
many epochs again; in the third (``again`` twice) from the dense model of the second, and so on.

A run is a folder with the checkpoint of its training and, when it has ended, result.json; so a study that was killed
goes on in the middle of a training run. A run that is there with other settings is refused, so that no table takes it
for what was asked. Processes with other methods or seeds can share the folder of all runs. The table holds all results
that there are.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import gohsp
from bench.harness.results import write_table
from bench.harness.timing import TIMES, time_against
from gohsp.files import read_json, write_json
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import is_compressed
from gohsp.recipe import Admm, Distillation, Recipe, make_recipe
from gohsp.runs.datasets import Images, open_images
from gohsp.runs.directory import open_model, set_classifier
from gohsp.training import checkpoint
from gohsp.training.evaluation import evaluate
from gohsp.training.loop import CHECKPOINT, Loop, Stage
from gohsp.training.losses import Distilled
from gohsp.training.soft_mask_admm import ADMM_GROUPS
from gohsp.training.train import make_accelerator

BATCH = 32
CHECKPOINT_STEPS = 250  # some minutes of work, which a killed run repeats
RECIPE = Path("recipes/vit_small_cifar10_40_cpu.yaml")
WORK = Path("build/trained")
START, RESULT = "start.json", "result.json"  # of a run
_WAYS_OUT = "give the settings that it had, name another --work, or remove the folder"
AGAIN = 1000  # added to the seed of training, so that each study draws other things than the one before
ANSWERS = Distillation(kind="soft", weight=0.5, temperature=2.0)
FEATURES = Distillation(kind="soft", weight=0.7, temperature=2.0, features=4.0)
SHORT = Admm(epochs=2, rho=500, rho_max=10_000, projections=10)  # strong, for it has a few hundred steps


@dataclass(frozen=True)
class Result:
    """What a run gave.

    Attributes:
        method: A key of :data:`METHODS`.
        seed: Seed of the choice of images, the pruning and the training.
        params_m: Millions of parameters.
        before, top1: Share of test images that are classified right, just after pruning without training and after all
            training.
        curve: The same share after each epoch.
        images, test_images, epochs, lr, precision: Settings of the training.
        prune_seconds, epoch_seconds: Times on the machine and in the company that the run had.
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


def _ours(
    method: str, optimiser: str, groups: Sequence[str] | None = ADMM_GROUPS
) -> Callable[[Any, Images, Recipe], nn.Module]:
    def prune(model: Any, images: Images, recipe: Recipe) -> nn.Module:
        settings = recipe.prune
        batches = images.calibration(settings.images, BATCH)
        result = gohsp.prune(
            model, batches, settings.target, method, groups=groups, optimiser=optimiser, seed=recipe.seed
        )
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
    """How a model is made smaller, and what else happens while it trains.

    Attributes:
        prune: Gives the small model, from the dense one.
        distill: It learns from the dense model as well.
        admm: The dense model is pruned anew while it trains, to the counts of the small one.
    """

    prune: Callable[[Any, Images, Recipe], nn.Module]
    distill: Distillation | None = None
    admm: Admm | None = None


_GOHSP = _ours("gohsp", "ridge")

METHODS = {
    "dense": Method(lambda model, images, recipe: model),
    "gohsp": Method(_GOHSP),
    "gohsp-distilled": Method(_GOHSP, ANSWERS),
    "gohsp-features": Method(_GOHSP, FEATURES),
    "gohsp-channels": Method(_ours("gohsp", "ridge", groups=None), FEATURES),
    "gohsp-admm": Method(_GOHSP, admm=SHORT),
    "l2": Method(_ours("l2", "drop")),
    "taylor": Method(_ours("taylor", "drop")),
    "torch-pruning": Method(_torch_pruning),
}
"""All see the same images in as many epochs. gohsp-distilled learns from the answers of the study's dense model,
trained to its end, as well as from labels; gohsp-features from its residual stream, too. These prune heads and neurons;
gohsp-channels is gohsp-features with gohsp.prune's own default, channels in principal axes as well. gohsp-admm is
GOHSP's own order: soft-mask ADMM on the dense model, hard pruning, fine-tuning of what is left. l2 and taylor are
gohsp's criteria of these names and gohsp's way to share a budget out, without compensation: what remains keeps its
weights, as other tools leave it."""


def changed(recipe: Recipe, changes: Mapping[str, Mapping[str, Any]]) -> Recipe:
    """Return a recipe with other values, given by section and name.

    Raises:
        ValueError: A value is not what it has to be.
    """
    values = recipe.model_dump()
    for section, named in changes.items():
        values[section].update(named)
    return make_recipe(values)


def run(recipe: Recipe, methods: Sequence[str], seeds: Sequence[int], work: Path, out: Path, *, again: int = 0) -> None:
    """Do the runs that have no result yet, seed by seed, and write the table.

    Args:
        recipe: Model, images, how much is pruned and how is trained. Its seed is replaced.
        methods: Keys of :data:`METHODS`.
        seeds: One run each.
        work: Folder of the runs.
        out: CSV file of the table.
        again: 0 for the first study, 1 for the second, and so on. The runs of one are in a folder within those of the
            one before, with whose dense models they start.

    Raises:
        FileNotFoundError: A dense model of a seed is wanted, to start from or to learn from, and has not been trained.
        ValueError: There is no method of that name, ADMM has too few epochs, or a run is there with other settings.
    """
    _check(methods)
    console = Console()
    runs = _runs(work, again)
    for seed in seeds:
        seeded = recipe.model_copy(update={"seed": seed})
        for method in methods:
            folder = runs / f"{method}-{seed}"
            start = _read_start(folder, seeded)
            if not (folder / RESULT).is_file():
                folder.mkdir(parents=True, exist_ok=True)
                result = _run_one(seeded, method, work, folder, again, start)
                write_json(folder / RESULT, asdict(result))
                console.print(f"{method}, seed {seed}: {result.before:.2%} -> {result.curve}", highlight=False)
            results = [read_json(path) for path in sorted(runs.glob(f"*/{RESULT}"))]
            write_table(out, COLUMNS, sorted(results, key=lambda r: (list(METHODS).index(r["method"]), r["seed"])))


def _trained_dense(runs: Path, seed: int) -> dict[str, Tensor]:
    """Return the weights that the dense model of a study ended with."""
    folder = runs / f"dense-{seed}"
    if not (folder / RESULT).is_file():
        raise FileNotFoundError(f"{folder}: wanted the dense model, trained to its end; run that method first")
    return checkpoint.read(folder / CHECKPOINT).part("model")


def add_times(recipe: Recipe, methods: Sequence[str], work: Path, out: Path, *, again: int = 0) -> None:
    """Measure what one image takes on gohsp's kernels (frozen, fp32), the models of all methods in turns with the dense
    one in plain PyTorch, and write a table. Training changes no shape, so the models are made anew and not trained.

    Args:
        recipe, methods, work, again: See :func:`run`.
        out: CSV file of the table.
    """
    _check(methods)
    model, images = _open(recipe, work, again)
    students: dict[Any, nn.Module] = {}
    for prune in dict.fromkeys(METHODS[method].prune for method in methods):  # which some methods share
        student = prune(model, images, recipe)
        if not is_compressed(student):
            student = gohsp.compress(student, ModelMask.full(student))
        students[prune] = gohsp.freeze(student.eval())
    image = images.test[0][0][None]
    times = time_against(model, students, image, rounds=30)
    write_table(out, ("method", *TIMES), [{"method": method, **times[METHODS[method].prune]} for method in methods])


def _check(methods: Sequence[str]) -> None:
    if unknown := [name for name in methods if name not in METHODS]:
        raise ValueError(f"methods: wanted some of {', '.join(METHODS)}; got {', '.join(unknown)}")


def _open(recipe: Recipe, work: Path, again: int) -> tuple[Any, Images]:
    """Return the dense model that a run starts from, and its images."""
    model = open_model(recipe.model, recipe.seed)
    images = open_images(recipe.data, model, recipe.augment, recipe.seed)
    set_classifier(model, recipe.model, images, work / f"head-{recipe.seed}.safetensors", lambda: None)
    if again:
        model.load_state_dict(_trained_dense(_runs(work, again - 1), recipe.seed))
    return model, images


def _runs(work: Path, again: int) -> Path:
    return work.joinpath(*["again"] * again)


@dataclass(frozen=True)
class Start:
    """What a run knows before it trains, kept in its folder as start.json.

    Attributes:
        settings: The recipe as plain values.
        before, prune_seconds: See :class:`Result`.
    """

    settings: dict[str, Any]
    before: float
    prune_seconds: float


def _settings(recipe: Recipe) -> dict[str, Any]:
    return recipe.model_dump(mode="json")


def _read_start(folder: Path, recipe: Recipe) -> Start | None:
    """Return how the run in a folder began; None if it has not, or has trained nothing yet with other settings.

    Raises:
        ValueError: It has other settings, or it ended and does not say with which.
    """
    path = folder / START
    if not path.is_file():
        if (folder / RESULT).is_file():  # a killed run without it is up to the settings in its checkpoint
            raise ValueError(f"{folder}: wanted {START} with the settings of this result, found none; {_WAYS_OUT}")
        return None
    start = Start(**read_json(path))
    if other := sorted(name for name, value in _settings(recipe).items() if start.settings.get(name) != value):
        if not any((folder / name).is_file() for name in (CHECKPOINT, RESULT)):
            return None
        raise ValueError(f"{folder}: belongs to a run with another {', '.join(other)}; {_WAYS_OUT}")
    return start


def _run_one(recipe: Recipe, method: str, work: Path, folder: Path, again: int, start: Start | None) -> Result:
    model, images = _open(recipe, work, again)
    started = time.perf_counter()
    own = METHODS[method]
    student = own.prune(model, images, recipe)
    pruned = time.perf_counter() - started
    if start is None:
        start = Start(_settings(recipe), evaluate(student, images.test)["top1"], round(pruned, 1))
        write_json(folder / START, asdict(start))
    distilled = None
    if own.distill is not None:
        teacher = copy.deepcopy(model)
        teacher.load_state_dict(_trained_dense(folder.parent, recipe.seed))
        distilled = partial(Distilled, teacher=teacher, settings=own.distill)
    seed = recipe.seed + AGAIN * again
    if own.admm is None:
        history = _train(student, distilled, images, recipe, seed, folder)
    else:
        student, history = _prune_while_training(model, ModelMask.of(student), own.admm, images, recipe, seed, folder)
    top1 = [row["top1"] for row in history]
    return Result(
        method=method,
        seed=recipe.seed,
        params_m=round(_params(student) / 1e6, 3),
        before=start.before,
        top1=top1[-1],
        curve=" ".join(f"{share:.4f}" for share in top1),
        images=len(images.train),
        test_images=len(images.test),
        epochs=recipe.fit.epochs,
        lr=recipe.fit.lr,
        precision=recipe.fit.precision,
        prune_seconds=start.prune_seconds,
        epoch_seconds=round(sorted(row["seconds"] for row in history)[len(history) // 2], 1),
    )


def _train(
    model: nn.Module,
    distilled: Callable[[nn.Module], Distilled] | None,
    images: Images,
    recipe: Recipe,
    seed: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """Train in place. The loop of :func:`gohsp.train`, which itself takes no model of another tool."""
    loop = Loop(
        accelerator=make_accelerator(),
        data=images.train,
        test=images.test,
        fit=recipe.fit,
        seed=seed,
        settings=_settings(recipe),
        distilled=distilled,
        directory=folder,
        workers=recipe.data.workers,
        checkpoint_steps=CHECKPOINT_STEPS,
    )
    loop.run(Stage("finetune", recipe.fit.epochs, recipe.fit.lr), model, loop.find_checkpoint())
    return loop.history


def _prune_while_training(
    model: Any, plan: ModelMask, admm: Admm, images: Images, recipe: Recipe, seed: int, folder: Path
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Spend the first of the epochs on ADMM; returns the small model and the history."""
    if recipe.fit.epochs < admm.epochs:
        raise ValueError(f"fit.epochs: wanted at least the {admm.epochs} of ADMM, got {recipe.fit.epochs}")
    result = gohsp.train(
        model,
        images.train,
        fit=recipe.fit.model_copy(update={"epochs": recipe.fit.epochs - admm.epochs}),
        admm=admm,
        plan=plan,
        importance=gohsp.rank_heads(model, images.calibration(recipe.prune.images, BATCH)),
        test=images.test,
        directory=folder,
        workers=recipe.data.workers,
        checkpoint_steps=CHECKPOINT_STEPS,
        seed=seed,
    )
    return result.model, result.history


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
