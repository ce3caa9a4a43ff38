# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels cost, read from the library: every kernel for every GPU within its budget."""

from __future__ import annotations

import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench import gpu_static
from bench.cli import app
from gohsp_kernels import _native
from tests.kernels.cases import Maker

pytestmark = [pytest.mark.nvcc, pytest.mark.skipif(not _native.load_cuda(), reason=_native.load_cuda().reason)]
pytest.importorskip("triton", reason="its wheel carries the disassembler")

TARGETS = ("sm_80", "sm_90", "sm_100")
CONSUMER_SHARED_BYTES = 99 * 1024
"""What a block may have on the graphics cards of the A100's generation and after, which run sm_80's code."""


@pytest.fixture(scope="module")
def costs() -> list[gpu_static.Cost]:
    path = _native.load_cuda().path
    assert path is not None
    return gpu_static.cuda_costs(path)


def test_every_kernel_is_there_for_every_gpu(costs: list[gpu_static.Cost]) -> None:
    by_target = {target: {c.kernel for c in costs if c.target == target} for target in TARGETS}
    assert by_target["sm_80"] == by_target["sm_90"] == by_target["sm_100"]
    kinds = sorted(kernel.split()[0] for kernel in by_target["sm_80"])
    assert kinds == ["attention"] * 8 + ["linear"] * 6 + ["rows"] * 3


def test_every_kernel_is_within_its_budget(costs: list[gpu_static.Cost]) -> None:
    for cost in costs:
        assert cost.spilled_bytes == 0 and cost.local_accesses == 0, cost
        assert (cost.matrix_instructions > 0) == (not cost.kernel.startswith("rows")), cost
        assert cost.wide_copies > 0, cost
        assert cost.shared_bytes <= CONSUMER_SHARED_BYTES, cost
        # Two warps for each of the four schedulers; four where it is 16 bits and no head is wider than 64.
        wide = "attention" in cost.kernel and " 128 " in cost.kernel
        assert cost.warps >= (8 if wide or "32 " in cost.kernel else 16), cost


def test_a_product_is_fed_by_copies_of_16_bytes_alone(costs: list[gpu_static.Cost]) -> None:
    """Each prologue and each step bring both operands, four copies or two a thread of each."""
    for cost in costs:
        if cost.kernel.startswith("linear"):
            assert cost.wide_copies >= 4 * 4, cost


def test_blocks_are_what_the_launches_ask_for(costs: list[gpu_static.Cost]) -> None:
    """The table's threads and shared bytes against those of launches in emulation."""
    from .helpers import checks, run

    maker = Maker(0)
    before = checks.pretend_processors(108)
    for processors in (108, 1):
        checks.pretend_processors(processors)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            run(maker.linear((3,), 12, None, 8, None, "gelu").to(dtype))
            for width in (8, 72):
                run(maker.attention(1, 3, [width], [8]).to(dtype))
    checks.pretend_processors(before)
    launched = {}
    for text, block in checks.launched().items():
        found = re.search(r"(linear|attention)_kernel<[\w:]*Tile<(?:gohsp::cuda::)?(\w+), ([\d, ]+)>", text)
        if found:
            launched[f"{found[1]} {found[2]} {found[3].replace(',', '')}"] = block
    table = {c.kernel: (c.threads, c.shared_bytes) for c in costs}
    assert {kernel.split()[1] for kernel in launched} >= {"F16", "Bf16", "F32"} and len(launched) >= 11
    for kernel, block in launched.items():
        assert table[kernel] == tuple(block), kernel


def test_command() -> None:
    result = CliRunner().invoke(app, ["gpu-static", "--target", "sm_80", "--no-triton"])
    assert result.exit_code == 0, result.output
    assert "nothing was run" in result.output and "sm_90" not in result.output


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load_cuda", lambda: _native.Library(None, "was not built"))
    console = Console(record=True)
    assert gpu_static.run(["sm_80"], False, console) == 1
    assert "no figures: was not built" in console.export_text()
