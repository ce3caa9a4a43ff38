# SPDX-License-Identifier: Apache-2.0
"""Every kernel with every tile that the rule can choose, compiled for each architecture, and what the binaries cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .aot import TARGETS, Cost

pytestmark = [pytest.mark.aot, pytest.mark.slow]

ELEMENTWISE = {"norm_gradient_kernel", "epilogue_gradient_kernel"}
CONSUMER_SHARED_BYTES = 99 * 1024
"""What a program may have on the graphics cards of the A100's generation and after, which take the A100's tiles."""


def compiled(target: str, dtype: str, group: str = "all") -> list[Cost]:
    """Compile in a process where Triton does not interpret. Triton keeps binaries: a second run takes seconds."""
    command = [sys.executable, "-m", "tests.gohsp_kernels.triton.aot", target, dtype, group]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [Cost(**json.loads(line)) for line in run.stdout.splitlines()]


def waves(cost: Cost, target: str) -> int:
    """Warps, or wavefronts, of a kernel that a multiprocessor holds at once."""
    description, gpu = TARGETS[target]
    return cost.programs_per_processor(description) * cost.threads // gpu.warp_size


@pytest.fixture
def exhaustive(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--exhaustive"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_within_its_budget(target: str, dtype: str, exhaustive: bool) -> None:
    """All of them for Hopper in fp16; for the other GPUs, and in bf16, a choice unless the run is exhaustive."""
    if exhaustive or (target, dtype) == ("sm_90", "fp16"):
        costs, kernels = compiled(target, dtype), 8
        assert len(costs) == 52
    else:
        costs, kernels = compiled(target, dtype, "some"), 6
    assert len({cost.kernel for cost in costs}) == kernels
    for cost in costs:
        assert cost.spilled_bytes == 0, cost
        assert not cost.overwritten, cost
        assert (cost.matrix_instructions > 0) == (cost.kernel not in ELEMENTWISE), cost
        # Two warps for each of the four schedulers; on AMD one wavefront of 64 for each of the four SIMD units.
        assert waves(cost, target) >= (4 if target == "gfx942" else 8), cost
        if target == "sm_80":
            assert cost.shared_bytes <= CONSUMER_SHARED_BYTES, cost
        # Whatever was pruned, aligned channels are read 16 bytes at a time; unless a block has fewer numbers than that
        # a thread.
        if not any(word in cost.case for word in ("gather", "scatter", "odd", "epilogue", "1 of", "mlp 144")):
            assert cost.narrow_loads == 0, cost


def test_sizes_of_one_and_none_compile() -> None:
    assert len(compiled("sm_80", "fp16", "corners")) == 13


@pytest.mark.parametrize(("target", "count"), [("sm_80", 36), ("sm_90", 40)])
def test_float32_is_on_the_tensor_cores(target: str, count: int, exhaustive: bool) -> None:
    """As three products of tf32. For sm_80 ptxas spills two words where that lets one more program run at once."""
    costs = compiled(target, "fp32", "float32" if exhaustive else "some")
    assert not exhaustive or (len(costs) == count and len({cost.kernel for cost in costs}) == 7)
    assert len({cost.kernel for cost in costs}) >= 5
    for cost in costs:
        assert (cost.matrix_instructions > 0) == (cost.kernel not in ELEMENTWISE), cost
        assert cost.spilled_bytes <= (8 if target == "sm_80" else 0), cost
        assert cost.shared_bytes <= CONSUMER_SHARED_BYTES and not cost.overwritten, cost


def test_float32_of_sizes_of_one_and_none_compiles() -> None:
    costs = compiled("sm_80", "fp32", "corners")
    assert all((cost.matrix_instructions > 0) == (cost.kernel not in ELEMENTWISE) for cost in costs)


def test_tf32_overwrites_nothing_that_is_read() -> None:
    """float32 where PyTorch may use tf32, which is the one way to tensor cores that the other tests do not take."""
    costs = compiled("sm_90", "fp32", "tf32")
    assert any(cost.matrix_instructions > 0 for cost in costs)
    assert not any(cost.overwritten for cost in costs), costs
