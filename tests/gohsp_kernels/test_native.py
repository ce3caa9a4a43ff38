# SPDX-License-Identifier: Apache-2.0
"""The torch-free library itself: accuracy of its functions for each instruction set, and its own C++ tests."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from gohsp_kernels import reference
from gohsp_kernels._native import numbers
from gohsp_kernels.activations import ACTIVATIONS
from gohsp_kernels.formats import FORMATS

checks = pytest.importorskip("gohsp_kernels._checks", reason="the checks module is not built")

INPUTS = np.concatenate(
    [np.linspace(-30, 30, 200_001), np.linspace(-1e-3, 1e-3, 20_001), [0.0, -0.0, 88.0, -87.0]]
).astype(np.float32)


@pytest.mark.parametrize("capability", checks.capabilities())
@pytest.mark.parametrize("name", [n for n in ACTIVATIONS if n != "identity"])
def test_activations(capability: str, name: str) -> None:
    result = checks.activate(capability, numbers("activations")[name], INPUTS)
    truth = reference.ACTIVATIONS[name](torch.from_numpy(INPUTS).double()).numpy()
    # As good as the same formula in fp32: relative to the input, of which the function is a fraction.
    assert np.max(np.abs(result - truth) / np.maximum(np.abs(INPUTS), 1e-30)) < 5e-7


@pytest.mark.parametrize("capability", checks.capabilities())
def test_exponential(capability: str) -> None:
    x = np.linspace(-87, 88, 300_001).astype(np.float32)
    assert np.max(np.abs(checks.exponential(capability, x) / np.exp(x.astype(np.float64)) - 1)) < 3e-7


@pytest.mark.parametrize("capability", checks.capabilities())
def test_exponential_at_the_ends(capability: str) -> None:
    low, high, nan = checks.exponential(capability, np.array([-np.inf, np.inf, np.nan], dtype=np.float32))
    assert 0 <= low < 1e-37 and 1e38 < high < np.inf and np.isnan(nan)


@pytest.mark.parametrize("capability", checks.capabilities())
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_nan_stays_nan(capability: str, name: str) -> None:
    assert np.isnan(
        checks.activate(capability, numbers("activations")[name], np.full(5, np.nan, dtype=np.float32))
    ).all()


def test_python_and_the_library_have_the_same_lists() -> None:
    assert set(numbers("activations")) == set(ACTIVATIONS)
    assert set(numbers("formats")) == set(FORMATS)


def test_unknown_capability_is_refused() -> None:
    with pytest.raises(ValueError, match="no 'mmx'"):
        checks.exponential("mmx", np.zeros(1, dtype=np.float32))


@pytest.mark.slow
def test_neon_under_emulation(tmp_path: Path) -> None:
    """The C++ tests, cross-compiled for AArch64 and run by QEMU, where both are installed."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no AArch64 cross compiler and emulator (Debian: g++-aarch64-linux-gnu, qemu-user)")
    csrc = Path(__file__).parents[2] / "csrc"
    lines = (csrc / "cpu" / "isa" / "isa.def").read_text().splitlines()
    sets = [line for line in lines if ", aarch64," in line or ", any," in line]
    (tmp_path / "isa_built.def").write_text("\n".join(sets))
    options = {csrc / "cpu" / "dispatch.cpp": "", csrc / "tests" / "test_cpu_kernels.cpp": ""}
    for line in sets:
        name, flags = line[len("GOHSP_ISA_SET(") :].split(",")[0], line.split('"')[-2]
        options[csrc / "cpu" / "isa" / f"{name}.cpp"] = flags
    flags = ["-std=c++20", "-O2", "-ffp-contract=fast", "-Wno-psabi", f"-I{tmp_path}"]
    for source, more in options.items():
        command = [compiler, *flags, *more.split(), "-c", str(source), "-o", str(tmp_path / f"{source.stem}.o")]
        built = subprocess.run(command, capture_output=True, text=True)
        assert built.returncode == 0, built.stderr[-3000:]
    program, objects = tmp_path / "test_cpu_kernels", map(str, tmp_path.glob("*.o"))
    subprocess.run([compiler, *objects, "-static", "-pthread", "-o", str(program)], check=True)
    run = subprocess.run([emulator, "-cpu", "max", str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
    assert {"neonbf16 done", "neondot done", "neon done"} <= set(run.stdout.splitlines()), run.stdout


@pytest.mark.slow
def test_cpp() -> None:
    tree = Path(__file__).parents[2] / "build" / "native"
    ctest = shutil.which("ctest")
    if ctest is None or not (tree / "CTestTestfile.cmake").exists():
        pytest.skip("no build tree with C++ tests here (make setup makes one)")
    run = subprocess.run([ctest, "--test-dir", str(tree), "--output-on-failure"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:]
    assert "No tests were found" not in run.stdout + run.stderr
