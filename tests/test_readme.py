# SPDX-License-Identifier: Apache-2.0
"""The example of the README runs as printed, in a folder of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)


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
