# SPDX-License-Identifier: Apache-2.0
"""GPUs that Triton compiles for; tests/cuda/test_budgets.py judges what is read from the CUDA library."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from bench.gpu import static
from tests.triton.aot import TARGETS


def test_triton_is_asked_for_no_gpu_that_it_has_no_target_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def triton_costs(target: str) -> Iterator[static.Cost]:
        asked.append(target)
        return iter(())

    monkeypatch.setattr(static._native, "load_cuda", lambda: SimpleNamespace(path=Path("library.so"), reason=""))
    monkeypatch.setattr(static, "cuda_costs", lambda path: [])
    monkeypatch.setattr(static, "triton_costs", triton_costs)
    assert static.run(list(static.SHARED_BYTES), True, Console(quiet=True)) == 0
    assert asked == ["sm_80", "sm_90", "sm_100"] and {*asked} <= {*TARGETS}
