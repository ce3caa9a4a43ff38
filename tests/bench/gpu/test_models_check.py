# SPDX-License-Identifier: Apache-2.0
"""The part of the GPU check that runs whole models, on the CPU with a stand-in for CUDA graphs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.gpu import models_check
from bench.harness import cases
from gohsp_kernels.gpu_check import Scope
from gohsp_kernels.triton import config
from tests.gohsp_kernels.graph_stand_in import stand_in

SCOPE = Scope(torch.device("cpu"))
DENSE, SLICED = (["dense eager", "dense sdpa", "dense compile"], ["sliced eager", "sliced sdpa", "sliced compile"])
OURS = ["gohsp triton", "gohsp triton graph"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contender once; a compiler that is not there."""

    def once(run: Any, device: torch.device, rounds: int) -> float:
        run()
        return 2.0

    def fails(model: nn.Module) -> Any:
        raise RuntimeError("no compiler\nfound")

    stand_in(monkeypatch)
    # The fewer programs, the less the interpreter has to step through.
    monkeypatch.setattr(config, "linear_tile", lambda *_: config.Tile(64, 256, 256, 4, 1))
    monkeypatch.setattr(models_check, "milliseconds", once)
    monkeypatch.setattr(models_check, "compiled", fails)


@pytest.mark.interpreter
@pytest.mark.parametrize("preset", ["2x96", "ragged"])
def test_every_contender_has_a_row(preset: str) -> None:
    case = cases.Case("deit_tiny_patch16_224", preset, image_size=32)
    found = [(name, run()) for name, run in models_check.models(SCOPE, [case], [2])]
    rows = [row for _, row in found]
    assert all(name.endswith(f"{preset}, batch 2, {row['contender']}") for name, row in found)
    assert [row["contender"] for row in rows] == (DENSE if preset != "ragged" else []) + SLICED + OURS
    for row in rows:
        assert (row["model"], row["mask"], row["batch"]) == ("deit_tiny_patch16_224", preset, 2)
        if "compile" in row["contender"]:
            assert row["reason"] == "RuntimeError: no compiler" and row["ok"] is None
        else:
            assert row["images/s"] == 1000.0 and row["error"] < models_check.LIMIT / 2
            assert row["ok"] is (True if "gohsp" in row["contender"] else None)


@pytest.mark.interpreter
def test_a_wrong_model_of_ours_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    error_of = models_check.error_of
    monkeypatch.setattr(models_check, "error_of", lambda result, truth: error_of(result * 1.1, truth))
    work = cases.load(cases.Case("deit_tiny_patch16_224", "1x32", image_size=32))
    images = work.images(1).half()
    truth = work.dense.double()(images.double())
    model = work.dense.half()

    def make() -> Any:
        return model

    assert models_check.measured(make, "triton", images, truth, SCOPE.device)["ok"] is False
    assert models_check.measured(make, "", images, truth, SCOPE.device)["ok"] is None


def test_attention_is_what_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    work = cases.load(cases.Case("deit_tiny_patch16_224", "2x96", image_size=32))
    calls: list[str] = []
    fused = nn.functional.scaled_dot_product_attention

    def noted(*arguments: Any, **keywords: Any) -> Tensor:
        calls.append("sdpa")
        return fused(*arguments, **keywords)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noted)
    images = work.images(1)
    for model in (work.dense, work.sliced):
        for fuse in (False, True):
            calls.clear()
            models_check.with_attention(model, fuse)(images)
            assert len(calls) == (12 if fuse else 0)


def test_the_default_cases_are_the_presets_and_ragged_masks() -> None:
    assert [(case.model, case.preset) for case in models_check.CASES] == [
        ("deit_tiny_patch16_224", "3x384"),
        ("deit_tiny_patch16_224", "ragged"),
        ("deit_small_patch16_224", "4x960"),
        ("deit_small_patch16_224", "ragged"),
        ("deit_base_patch16_224", "8x1920"),
        ("deit_base_patch16_224", "ragged"),
    ]


@pytest.mark.parametrize(
    ("missing", "module"), [("none", "bench.gpu_check"), ("import bench.gpu_check", "gohsp_kernels.gpu_check")]
)
def test_make_gpu_check_takes_the_python_that_is_there(tmp_path: Path, missing: str, module: str) -> None:
    """It sets nothing up: no environment is made, nothing is installed and nothing is built."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\n[ "$2" != "{missing}" ] || {{ echo trace; echo no pydantic; exit 1; }} >&2\n'
    )
    python.chmod(0o755)
    given = [f"PYTHON={python}", f"VENV={tmp_path}/none", f"FOLDER={tmp_path}/out", "SECONDS=7"]
    root = Path(__file__).parents[3]
    run = subprocess.run(["make", "-s", "gpu-check", *given], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ("whole models are left out: no pydantic" in run.stdout) == (missing != "none")
    wanted = ["-c import bench.gpu_check", f"-m {module} --seconds 7 --folder {tmp_path}/out"]
    assert calls.read_text().splitlines() == wanted


def test_the_command_has_the_models_beside_the_parts_of_the_kernels() -> None:
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-m", "bench.gpu_check", "--help"], capture_output=True, text=True, cwd=root)
    assert "numerics" in run.stdout and "models" in run.stdout, run.stderr
