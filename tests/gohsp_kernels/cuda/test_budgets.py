# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels cost, read from the library: every kernel for every GPU within its budget."""

from __future__ import annotations

import re

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from bench.cli import app
from bench.gpu import static
from gohsp_kernels import _native
from gohsp_kernels.testing import Maker

pytestmark = [
    pytest.mark.nvcc,
    pytest.mark.slow,
    pytest.mark.skipif(not _native.load_cuda(), reason=_native.load_cuda().reason),
]
pytest.importorskip("triton", reason="its wheel carries the disassembler")

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120")
CONSUMER_SHARED_BYTES = 99 * 1024
"""What a block may have on the graphics cards of the A100's generation and after, which run sm_80's code."""


SPILLING = {  # a few words once a block, where the limit of 128 registers is what lets two blocks run at a time
    "linear F16 128 128 4 2 1 4 2 other",
    "linear Bf16 128 128 4 2 1 4 2 other",
    ("sm_120", "attention F16 64 256 7 2"),
    ("sm_120", "attention Bf16 64 256 7 2"),
}


@pytest.fixture(scope="module")
def costs() -> list[static.Cost]:
    path = _native.load_cuda().path
    assert path is not None
    return static.cuda_costs(path)


def test_every_kernel_is_there_for_every_gpu(costs: list[static.Cost]) -> None:
    by_target = {target: sorted(c.kernel for c in costs if c.target == target) for target in (*TARGETS, "sm_90a")}
    assert by_target["sm_80"] == by_target["sm_90"] == by_target["sm_100"] == by_target["sm_120"]
    kinds = [kernel.split()[0] for kernel in by_target["sm_80"]]
    # Three tiles of two precisions, one of two more, for three activations each.
    assert kinds == ["attention"] * 8 + ["checksum"] + ["linear"] * 24 + ["rows"] * 3
    assert [kernel.split()[0] for kernel in by_target["sm_90a"]] == ["warpgroup"] * 12


def enough_warps(kernel: str) -> int:
    """What a multiprocessor should hold: four warps for each scheduler, or less where registers are what limits."""
    kind, *words = kernel.split()
    if kind == "attention":
        wide, single = words[1] == "128", words[0] in ("F32", "Tf32")
        return (4 if wide else 8) if single else (8 if wide else 14)
    return 12 if kind == "warpgroup" else 16


def test_every_kernel_is_within_its_budget(costs: list[static.Cost]) -> None:
    for cost in costs:
        few = (cost.target, cost.kernel) in SPILLING or cost.kernel in SPILLING
        assert cost.spilled_bytes <= (16 if few else 0), cost
        assert cost.local_accesses <= (12 if few else 0), cost
        products = cost.kernel.split()[0] in ("attention", "linear", "warpgroup")
        assert (cost.matrix_instructions > 0) == products, cost
        assert cost.wide_copies > 0 or cost.kernel == "checksum", cost
        assert cost.shared_bytes <= CONSUMER_SHARED_BYTES, cost
        if cost.target != "sm_120":  # which has the shared memory of a graphics card
            assert cost.warps >= enough_warps(cost.kernel), cost


def test_a_product_is_fed_by_copies_of_16_bytes_alone(costs: list[static.Cost]) -> None:
    """Each prologue and each step bring both operands, four copies or two a thread of each."""
    for cost in costs:
        if cost.kernel.startswith(("linear", "warpgroup")):
            assert cost.wide_copies >= 4 * 3, cost


def test_blocks_are_what_the_launches_ask_for(costs: list[static.Cost]) -> None:
    """The table's threads and shared bytes against those of launches in emulation."""
    from .helpers import checks, run

    before = checks.pretend_processors(1), checks.pretend_capability(8), checks.largest_tile(0)
    maker = Maker(0)
    for major, rows in ((8, 128), (8, 64), (8, 32), (9, 128), (9, 64)):
        checks.pretend_capability(major)
        checks.largest_tile(rows)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for activation in ("identity", "gelu", "silu"):
                run(maker.linear((3,), 12, None, 8, None, activation).to(dtype))
            for width in (8, 72):
                run(maker.attention(1, 300, [width], [8]).to(dtype))
    checks.pretend_processors(before[0])
    checks.pretend_capability(before[1])
    checks.largest_tile(before[2])
    launched = {}
    for text, block in checks.launched().items():
        found = re.search(
            r"(?:linear|attention)_kernel<[\w:]*?(Linear|Warpgroup|Attention)Tile<(?:gohsp::cuda::)?(\w+), ([\d, ]+)"
            r"\s?>(?:, [\w:]*?Finish::(\w+))?",
            text,
        )
        if found:
            words = [found[1].lower(), found[2], *found[3].split(", "), *([found[4]] if found[4] else [])]
            launched[" ".join(word.strip() for word in words)] = block
    table = {c.kernel: (c.threads, c.shared_bytes) for c in costs}
    assert set(launched) == {
        kernel for kernel in table if kernel.split()[0] not in ("rows", "checksum") and " Tf32 " not in kernel
    }
    for kernel, block in launched.items():
        if kernel.startswith("attention"):  # one asks for what its tokens take
            assert block[0] <= table[kernel][0] and block[1] <= table[kernel][1], kernel
        else:
            assert table[kernel] == tuple(block), kernel


def test_command(monkeypatch: pytest.MonkeyPatch, costs: list[static.Cost]) -> None:
    monkeypatch.setattr(static, "cuda_costs", lambda _: costs)  # disassembled once for all tests here
    result = CliRunner().invoke(app, ["gpu-static", "--target", "sm_80", "--no-triton"])
    assert result.exit_code == 0, result.output
    assert "nothing was run" in result.output and "sm_90" not in result.output


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load_cuda", lambda: _native.Library(None, "was not built"))
    console = Console(record=True)
    assert static.run(["sm_80"], False, console) == 1
    assert "no figures: was not built" in console.export_text()
