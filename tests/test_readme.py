# SPDX-License-Identifier: Apache-2.0
"""The examples of the README, of the guide and of docs/extending.md run as printed, in a folder of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


PREPARED = """
import timm, torch
model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32)
batches = [torch.randn(4, 3, 32, 32)]
"""


SMALLER = """
import functools, timm
timm.create_model = functools.partial(timm.create_model, depth=2)  # of twelve blocks, which take minutes
"""


def python_blocks(page: str = "README.md") -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)


def run(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_examples_run_as_printed(tmp_path: Path) -> None:
    first, *others = python_blocks()
    assert "params" in run(first, tmp_path)
    for example in others:
        run(example if "import" in example else "import timm, gohsp\n" + example, tmp_path)
    for folder in ("deit-pruned", "deit-pruned-and-tuned"):
        assert {p.name for p in (tmp_path / folder).iterdir()} == {"plan.json", "model.safetensors"}


@pytest.mark.slow
def test_the_guide_runs_as_printed_from_the_first_block_to_the_last(tmp_path: Path) -> None:
    told = run("".join([SMALLER, *python_blocks("docs/guide.md")]), tmp_path)
    assert "of the parameters" in told
    assert {p.name for p in (tmp_path / "small-model").iterdir()} == {"plan.json", "model.safetensors"}


@pytest.mark.slow
def test_the_example_of_digits_runs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    told = run((ROOT / "examples" / "digits.py").read_text(), tmp_path)
    (dense, parameters), *_, (frozen, left) = re.findall(r"(\d+) parameters .* top-1 ([\d.]+)%", told)
    assert int(frozen) <= 0.5 * int(dense)
    assert float(parameters) > 80 and float(left) > float(parameters) - 3


def test_the_criterion_of_the_page_on_extending_prunes(tmp_path: Path) -> None:
    (example,) = python_blocks("docs/extending.md")
    shown = "print(result.report.method, result.report.pruned.params <= 0.65 * result.report.dense.params)"
    assert run(PREPARED + example + shown, tmp_path) == "weight-times-deviation True\n"
