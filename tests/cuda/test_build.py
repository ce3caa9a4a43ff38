# SPDX-License-Identifier: Apache-2.0
"""The switch of the CUDA build where there is no nvcc: left out and said so, or refused where it was required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
CMAKE = shutil.which("cmake", path=TOOLS)


@pytest.mark.skipif(CMAKE is None, reason="no cmake")
@pytest.mark.parametrize("wanted", ["AUTO", "ON", "OFF"])
def test_without_nvcc(tmp_path: Path, wanted: str) -> None:
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja", f"-DGOHSP_CUDA={wanted}"]
    # CMake believes CUDACXX, and so looks for nvcc nowhere else.
    environment = {**os.environ, "PATH": TOOLS, "CUDACXX": str(tmp_path / "nvcc")}
    command.append(f"-DPython_EXECUTABLE={sys.executable}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == (wanted != "ON"), done.stdout + done.stderr
    if wanted == "AUTO":
        assert "CUDA kernels left out: no nvcc was found" in done.stdout
    if wanted == "ON":
        assert "GOHSP_CUDA=ON, but no nvcc was found" in done.stderr
    else:
        assert "_C_cuda.so" not in (tmp_path / "build.ninja").read_text()
