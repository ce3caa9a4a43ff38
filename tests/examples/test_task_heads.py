# SPDX-License-Identifier: Apache-2.0
"""The examples of other tasks than classification run, on random weights."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gohsp_kernels as gk

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


def output_of(name: str, *arguments: str) -> str:
    run = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_maps_of_features() -> None:
    text = output_of("dense_features.py", "test_vit", "--count", "8")
    maps = re.findall(r"map \[1, 64, 10, 10\], cosine to the dense one (\d\.\d+)", text)
    assert len(maps) == 6 and all(float(alike) > 0.5 for alike in maps)
    assert re.search(r"dense: [\d.]+ ms an image\npruned: [\d.]+ ms an image", text)


def test_zero_shot() -> None:
    pytest.importorskip("transformers")
    text = output_of("zero_shot.py")
    same = re.search(r"same label: ([\d.]+)% of 64 images", text)
    assert same is not None and float(same[1]) > 50
    assert "pruned: " in text
