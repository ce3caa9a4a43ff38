# SPDX-License-Identifier: Apache-2.0
"""The CUDA build: its switch where there is no nvcc, the GPUs it compiles for, and which file sees which headers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
TOOLS = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
CMAKE = shutil.which("cmake", path=TOOLS)


@pytest.mark.slow
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


@pytest.mark.skipif(CMAKE is None, reason="no cmake")
@pytest.mark.parametrize(
    ("nvcc", "archs"),
    [
        ("12.4.131", "80-real;90"),
        ("12.8.61", "80-real;90-real;100;120-real"),
        ("13.0.88", "80-real;90-real;100;120-real"),
    ],
)
def test_gpus_that_an_nvcc_knows(tmp_path: Path, nvcc: str, archs: str) -> None:
    script = tmp_path / "ask.cmake"
    rule = ROOT / "csrc" / "cuda" / "archs.cmake"
    script.write_text(f'include({rule.as_posix()})\ngohsp_cuda_archs({nvcc} found)\nmessage("found ${{found}}")\n')
    done = subprocess.run([str(CMAKE), "-P", str(script)], capture_output=True, text=True, check=True)
    assert f"found {archs}\n" in done.stderr


def configured(folder: Path, *options: str) -> str:
    """What CMake says when it configures a build tree in ``folder``; it may look for nvcc wherever it likes."""
    command = [str(CMAKE), "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run([*command, *options], env={**os.environ, "PATH": TOOLS}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.nvcc
@pytest.mark.skipif(CMAKE is None or shutil.which("nvcc") is None, reason="no cmake or no nvcc")
def test_gpus_that_are_named_and_warnings_that_are_errors(tmp_path: Path) -> None:
    if "CUDA kernels left out" in (said := configured(tmp_path)):
        pytest.skip(said)
    build = tmp_path / "build.ninja"
    assert "code=[sm_90]" in build.read_text() and "-Werror" not in build.read_text()
    assert "CUDA kernels for 86-real, " in configured(tmp_path, "-DGOHSP_CUDA_ARCHS=86-real", "-DGOHSP_WERROR=ON")
    assert "code=[sm_86]" in build.read_text() and "code=[sm_90]" not in build.read_text()
    assert "-Werror=all-warnings" in build.read_text()


@pytest.mark.slow
@pytest.mark.skipif(CMAKE is None, reason="no cmake")
def test_torch_and_pybind11_do_not_meet(tmp_path: Path) -> None:
    """Some releases of torch carry a pybind11 that refuses the definitions of the stable ABI."""
    configured(tmp_path, "-DGOHSP_CUDA=OFF", "-DGOHSP_CHECKS=ON")
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    (checks,) = (c["command"] for c in commands if c["file"].endswith("csrc/cuda/emulate/checks.cpp"))
    (operators,) = (c["command"] for c in commands if c["file"].endswith("csrc/torch/cuda_ops.cpp"))
    for part in ("TORCH_STABLE_ONLY", "torch/include"):
        assert part not in checks
        assert part in operators
