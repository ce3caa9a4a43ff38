# SPDX-License-Identifier: Apache-2.0
"""The wheel with the CUDA kernels: built, tagged, small, and run where nothing else of the project is."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(importlib.util.find_spec("auditwheel") is None, reason="no auditwheel")
def test_the_wheel_installs_and_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "build_wheel.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "CPU kernels run; CUDA library loads" in done.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("gohsp-") and "-py3-none-manylinux_2_" in wheel.name
