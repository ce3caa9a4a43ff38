# SPDX-License-Identifier: Apache-2.0
"""The native operators stand hostile calls: no signal, no result with memory that nobody wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gohsp_kernels import _native, cpu
from gohsp_kernels.testing import Maker

from .scale import TIMES

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "python")))
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("seed", range(2))
def test_random_hostile_calls(seed: int) -> None:
    run = python("-m", "tests.attack.native", str(seed), str(1500 * TIMES))
    last = [line for line in run.stderr.splitlines() if ", argument " in line][-1:]
    assert run.returncode == 0, (run.returncode, last, run.stderr[-1000:])
    told = json.loads(run.stdout)
    print(f"seed {seed}: {told}")
    assert told["unwritten"] == []
    assert told["refused"] > 1000 * TIMES and told["answered"] > 100 * TIMES


def layout(*numbers: int) -> torch.Tensor:
    return torch.tensor([cpu.packing("float32"), *numbers])


def test_norms_of_heads_of_other_widths_are_refused() -> None:
    call = Maker(1).attention_sublayer(1, 3, 16, [4, 4], [4, 4], **Maker(2).qk_norm(4))
    packed = cpu.pack_sublayer(call.operator, 16)
    packed.layout[-4:-2] = torch.tensor([2, 6])  # as many channels as before
    with pytest.raises(RuntimeError, match="qk_norm: wanted heads of one QK width; got 2 and 6"):
        cpu.run_packed(call.x, [packed], 3)
    widths = torch.tensor([[4, 40], [4, 4]])
    with pytest.raises(RuntimeError, match="qk_norm: wanted heads of one QK width; got 4 and 40"):
        torch.ops.gohsp_kernels.cpu_attention(torch.ones(1, 2, 96), widths, torch.ones(4, 4), 1.0, 1e-6, 8, 2)


@pytest.mark.parametrize("width", [2**62, 2**31, -8])
def test_widths_whose_sum_would_wrap_are_refused(width: int) -> None:
    widths = torch.tensor([[width, width], [0, 0]])
    with pytest.raises(RuntimeError, match="widths: wanted 0 to"):
        torch.ops.gohsp_kernels.cpu_attention(torch.ones(1, 2, 0), widths, None, 1.0, 1e-6, 0, 2)
    numbers = layout(_native.numbers("sublayers")["mlp"], 8, width, 1, -1, -1)
    with pytest.raises(RuntimeError, match="layouts: wanted no negative and no gigantic sizes"):
        torch.ops.gohsp_kernels.cpu_sublayers(
            torch.ones(1, 2, 8), [torch.zeros(0, dtype=torch.int32)], [numbers], [1e-6, 1e-6, 1.0], 2
        )


def test_a_gigantic_weight_without_elements_is_refused() -> None:
    with pytest.raises(RuntimeError, match="weight: wanted no negative and no gigantic sizes"):
        torch.ops.gohsp_kernels.cpu_pack(torch.empty(2**40, 0), None, None, 0)


@pytest.mark.parametrize("name", ["packed_linear", "cpu_attention"])
def test_tensors_on_meta_beside_others_are_refused(name: str) -> None:
    x = torch.ones(1, 2, 24)
    arguments = {
        "packed_linear": (x, torch.empty(8, 24, device="meta"), None, None, None, 8, "identity"),
        "cpu_attention": (x, torch.empty(2, 2, dtype=torch.int64, device="meta"), None, 1.0, 1e-6, 8, 2),
    }[name]
    with pytest.raises(RuntimeError, match="tensors: wanted all on one device; got some on cpu and meta"):
        getattr(torch.ops.gohsp_kernels, name)(*arguments)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["nonsense", "neon", "AVX2"])
def test_an_instruction_set_that_cannot_be_had_is_a_reason(wanted: str) -> None:
    run = python("-m", "gohsp", "info", GOHSP_CPU_CAPABILITY=wanted)
    assert run.returncode == 0 and f"got '{wanted}'" in run.stdout, (run.stdout, run.stderr)
    code = """
import torch, gohsp_kernels as gk
support = gk.backends()["cpu"]
assert not support and "GOHSP_CPU_CAPABILITY: wanted" in support.reason
assert not gk.can_run("cpu", weights="bfloat16")
gk.packed_linear(torch.ones(1, 2), torch.ones(1, 2))
try:
    gk.cpu.capability()
except RuntimeError as error:
    print(error)
"""
    run = python("-c", code, GOHSP_CPU_CAPABILITY=wanted)
    assert run.returncode == 0 and f"got '{wanted}'" in run.stdout, (run.stdout, run.stderr)


def test_public_operators_check_what_exported_graphs_give_them() -> None:
    """Heads of other widths than their norm; no Python function of ours stands before an exported node."""
    call = Maker(1).attention_sublayer(1, 3, 16, [4, 4], [4, 4], **Maker(2).qk_norm(4))
    flat = [[4, 4000] if isinstance(value, tuple) and value == (4, 4) else value for value in call.flat()]
    with pytest.raises(ValueError, match="wanted"):
        torch.ops.gohsp_kernels.attention_sublayer(*flat)
