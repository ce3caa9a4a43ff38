# SPDX-License-Identifier: Apache-2.0
"""A small model that timm knows by name, and a folder and a seed for each test that draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from timm.models import _registry, register_model

from tests.gohsp.runs.test_commands import NAME, commands_vit_tiny


@pytest.fixture(scope="session", autouse=True)
def _small_model_in_timm() -> Iterator[None]:
    register_model(commands_vit_tiny)
    yield
    _registry._model_entrypoints.pop(NAME, None)


@pytest.fixture
def seed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> int:
    """Work in a folder of the test's own; the seed is printed with the counts."""
    monkeypatch.chdir(tmp_path)
    return random.SystemRandom().randrange(2**32)
