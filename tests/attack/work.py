# SPDX-License-Identifier: Apache-2.0
"""Work that writes files, small enough to be done over and over: each command, and writers of the library."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  here once, and not in each fork
import sklearn.datasets  # noqa: F401
import torch
import yaml
from timm.models.vision_transformer import VisionTransformer

import gohsp
import gohsp.training.loop
from bench.harness import results
from bench.studies import trained
from gohsp.demo import measure
from gohsp.demo import run as demo
from gohsp.recipe import read_recipe
from gohsp.runs import img_focus
from gohsp_command.cli import app
from tests.bench.conftest import make_row
from tests.gohsp.runs.test_commands import NAME, commands_vit_tiny

from .kills import calls_in, contents, in_child

RECIPE = {
    "model": {"name": NAME, "pretrained": False, "fit_head": 32},
    "data": {"source": "digits", "train_images": 32, "test_images": 20, "workers": 0},
    "prune": {"target": {"params": 0.7}, "images": 16},
    "augment": None,
    "fit": {"epochs": 2, "batch_size": 16, "lr": 1e-3, "warmup_epochs": 0, "mixup": 0, "cutmix": 0},
}


@dataclass(frozen=True)
class Piece:
    """Something that writes files into the folder it is started in, and what has to be there before."""

    work: Callable[[], object]
    before: Callable[[], object] = lambda: None


def command(*arguments: object) -> Callable[[], None]:
    """Return the command line with some arguments; it ends by sys.exit."""
    return partial(app, [str(argument) for argument in arguments])


def in_turn(*works: Callable[[], object]) -> Callable[[], None]:
    def all_of_it() -> None:
        for work in works:
            try:
                work()
            except SystemExit as end:
                assert end.code == 0

    return all_of_it


PRUNE = command("prune", "--recipe", "../recipe.yaml", "--out", "run")
EVALUATE = command("evaluate", "--out", "run")
REPORT = command("report", "run", "--rounds", 0, "--out", "report.md", "--picture", "report.png")


def prune_in_time() -> None:
    size = {"dim": 32, "num_heads": 4, "head_dim": 8, "hidden": 128, "batch": 1, "threads": 1, "outside": 0.5}
    steps = {"attention": (1.0, 2.0, 3.0, 4.0), "neurons": (32, 64, 96, 128), "mlp": (1.0, 2.0, 3.0, 4.0)}
    gohsp.LatencyTable.measure = lambda model: gohsp.LatencyTable.model_validate(size | steps)  # type: ignore
    command("prune", "--recipe", "../recipe.yaml", "--out", "run", "--target", "ms=0.6")()


def small_demo() -> None:
    """The demo on a model of two blocks."""

    def small(image_size: int) -> VisionTransformer:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"patch_size": 14, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
        return VisionTransformer(img_size=image_size, global_pool="", **sizes).eval()

    img_focus.load_backbone = small  # type: ignore[assignment]
    measure.ROUNDS = {1: 2, 8: 2}
    settings = demo.Settings
    demo.Settings = lambda **given: settings(**given, image_size=28)  # type: ignore
    command("demo", "--out", "demo", "--images", 72)()


def append_results() -> None:
    for number in range(4):
        results.append(Path("bench/results.csv"), [make_row(batch=batch) for batch in range(number + 1)])


def study() -> None:
    recipe = trained.changed(read_recipe(Path("../recipe.yaml")), {"fit": {"epochs": 2}})
    trained.run(recipe, ["dense", "gohsp-features"], [0], Path("work"), Path("table.csv"))


def save_tables() -> None:
    """A mask and a table of times over those of other values."""
    mask = gohsp.ModelMask.full(commands_vit_tiny())
    sizes = {"dim": 32, "num_heads": 4, "head_dim": 8, "hidden": 128, "batch": 1, "threads": 1}
    for number in range(1, 5):
        mask.blocks[0].hidden[number] = False
        mask.save("mask.json")
        steps = {"attention": (1.0, 2.0, 3.0, 4.0), "neurons": (128,), "mlp": (float(number),)}
        gohsp.LatencyTable.model_validate({**sizes, "outside": 1.0, **steps}).save("latency.json")


PIECES = {
    "prune": Piece(PRUNE),
    "prune over another": Piece(command("prune", "--out", "run", "--target", "params=0.6", "--seed", 1), PRUNE),
    "prune in time": Piece(prune_in_time),
    "train": Piece(command("train", "--recipe", "../recipe.yaml", "--out", "run")),
    "train by ADMM": Piece(command("train", "--out", "run", "--admm-epochs", 2, "--distill", "soft"), PRUNE),
    "evaluate": Piece(EVALUATE, PRUNE),
    "report": Piece(REPORT, in_turn(PRUNE, EVALUATE)),
    "demo": Piece(small_demo),
    "bench results": Piece(append_results),
    "bench study": Piece(study),
    "mask and latency": Piece(save_tables),
    "models": Piece(command("models", "pit_ti_*", "--found", "found.jsonl", "--write", "models.md")),
}


class Stage:
    """A folder in which a piece of work is done over and over, from the same beginning."""

    def __init__(self, folder: Path, piece: Piece) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        self.folder, self.piece = folder, piece
        (folder / "before").mkdir()
        os.chdir(folder / "before")
        assert not in_child(piece.before)
        self.set()
        started = time.perf_counter()
        self.calls = calls_in(piece.work)
        self.takes = time.perf_counter() - started
        self.wanted = contents(self.here)
        self.sizes = sorted(path.stat().st_size for path in self.here.rglob("*") if path.is_file())

    @property
    def here(self) -> Path:
        return self.folder / "here"

    def set(self) -> None:
        """Begin again."""
        os.chdir(self.folder)
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree("before", self.here)
        os.chdir(self.here)
