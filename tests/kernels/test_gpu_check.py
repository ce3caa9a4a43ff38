# SPDX-License-Identifier: Apache-2.0
"""The GPU check without a GPU: it says so; with a pretended one it writes its report and its exit code tells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gohsp_kernels import gpu_check


def test_without_a_gpu_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([], tmp_path / "out") == 0
    assert "nothing is claimed" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_report_of_a_pretended_gpu(tmp_path: Path, fails: bool) -> None:
    def run(operator: str, backend: str, dtype: torch.dtype) -> dict[str, Any]:
        return {"operator": operator, "ok": not (fails and dtype is torch.bfloat16)}

    assert gpu_check.main(["Some GPU/80"], tmp_path, run) == int(fails)
    report = json.loads((tmp_path / "Some-GPU-80.json").read_text())
    assert report["device"] == "Some GPU/80"
    assert len(report["rows"]) == len(gpu_check.OPERATORS) * len(gpu_check.BACKENDS) * len(gpu_check.TOLERANCES)
    assert not list(tmp_path.glob("*.part"))


def test_what_cannot_run_gives_its_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, so it can run")
    row = gpu_check.check("mlp_sublayer", "triton", torch.float16)
    assert row["ok"] is None and row["reason"]


@pytest.mark.parametrize("operator", gpu_check.OPERATORS)
def test_the_calls_that_it_makes_are_right(operator: str) -> None:
    """On the CPU, where the backend is known to be right: the comparison itself finds no fault."""
    backend = "cpu" if gpu_check.dispatch.can_run("cpu") else "reference"
    assert gpu_check.relative_error(operator, backend, "cpu", torch.float32) < 1e-5
