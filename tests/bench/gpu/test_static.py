# SPDX-License-Identifier: Apache-2.0
"""Which GPUs Triton kernels are compiled for; tests/gohsp_kernels/cuda/test_budgets.py judges the CUDA library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from bench.gpu import static

aot = pytest.importorskip("tests.gohsp_kernels.triton.aot", reason="Triton is not installed", exc_type=ImportError)


def test_triton_is_asked_for_no_gpu_that_it_has_no_target_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def triton_costs(target: str) -> Iterator[static.Cost]:
        asked.append(target)
        return iter(())

    monkeypatch.setattr(static._native, "load_cuda", lambda: SimpleNamespace(path=Path("library.so"), reason=""))
    monkeypatch.setattr(static, "cuda_costs", lambda path: [])
    monkeypatch.setattr(static, "triton_costs", triton_costs)
    assert static.run(list(static.SHARED_BYTES), True, Console(quiet=True)) == 0
    assert asked == ["sm_80", "sm_90", "sm_100"] and {*asked} <= {*aot.TARGETS}
