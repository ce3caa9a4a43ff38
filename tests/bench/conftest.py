# SPDX-License-Identifier: Apache-2.0
"""A model small enough that a benchmark of it takes a second, known to timm by name as all others are."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from timm.models import _registry, register_model
from timm.models.vision_transformer import VisionTransformer

from bench.harness.cases import Case, Workload, load
from bench.harness.environment import Settings
from bench.harness.results import Row

TINY = "bench_vit_tiny"


def bench_vit_tiny(pretrained: bool = False, img_size: int = 32, **timm_options: Any) -> VisionTransformer:
    """Two blocks of 3 heads x 64 on 192 features, images of 32 pixels: 5 tokens."""
    return VisionTransformer(img_size=img_size, embed_dim=192, depth=2, num_heads=3, num_classes=10)


@pytest.fixture(scope="session", autouse=True)
def _tiny_model_in_timm() -> Iterator[None]:
    register_model(bench_vit_tiny)
    yield
    del _registry._model_entrypoints[TINY]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def ragged_work(_tiny_model_in_timm: None) -> Workload:
    return load(Case(TINY, "ragged"))


@pytest.fixture(scope="session")
def uniform_work(_tiny_model_in_timm: None) -> Workload:
    return load(Case(TINY, "2x300"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two rounds on one thread; tables go to a string that :func:`printed` reads."""
    return Settings(1, 2, tmp_path / "results.csv", Console(file=io.StringIO(), width=120))


def printed(settings: Settings) -> str:
    assert isinstance(settings.console.file, io.StringIO)
    return settings.console.file.getvalue()


def make_row(**changes: Any) -> Row:
    """A row of a made-up measurement."""
    columns: dict[str, Any] = {
        "routine": "end-to-end",
        "case": "vit/4x960",
        "part": "model",
        "batch": 1,
        "tokens": 197,
        "contender": "gohsp",
        "metric": "time",
        "dtype": "float32",
        "threads": 2,
        "cpu": "Some CPU, of 2 GHz",
        "isa": "avx2",
        "torch": "2.14.1",
        "timm": "1.0.31",
        "version": "0.1.0",
        "commit": "0123456789ab",
        "value": 30.0,
        "p20": 29.5,
        "p80": 31.25,
        "unit": "ms",
        "rounds": 20,
        "run": "2026-01-01T00:00:00Z",
    }
    return Row(**{**columns, **changes})


@pytest.fixture(scope="session")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images: two classes, dark and light noise, as train/ and test/."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 12), ("test", 4)):
        for name, level in (("dark", 60), ("light", 190)):
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = level + torch.randint(-50, 50, (32, 32, 3), generator=generator)
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(root / part / name / f"{index}.png")
    return root
