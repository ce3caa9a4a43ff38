# SPDX-License-Identifier: Apache-2.0
"""The operators stand hostile calls: no signal, no result with memory that nobody wrote, no wrong one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gohsp_kernels as gk
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_random_hostile_calls(seed: int) -> None:
    pytest.importorskip("gohsp_kernels._checks_cuda", reason="the checks module is not built")
    pytest.importorskip("triton")
    run = python("-m", "tests.attack.operators", str(seed), str(700 * TIMES))
    last = [line for line in run.stderr.splitlines() if ", argument " in line][-1:]
    assert run.returncode == 0, (run.returncode, last, run.stderr[-1000:])
    told = json.loads(run.stdout)
    faults, more = told.pop("faults"), told.pop("MiB more")
    print(f"seed {seed}: {told}, at most {more} MiB more")
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:10]])
    assert more < 2**11
    assert all(counts["refused"] > 15 * TIMES and counts["answered"] > 5 * TIMES for counts in told.values()), told


def layout(*numbers: int) -> torch.Tensor:
    return torch.tensor([cpu.packing("float32"), *numbers])


WORDS = torch.zeros(16, dtype=torch.int32)


def test_norms_of_heads_of_other_widths_are_refused() -> None:
    call = Maker(1).attention_sublayer(1, 3, 16, [4, 4], [4, 4], **Maker(2).qk_norm(4))
    packed = cpu.pack_sublayer(call.operator, 16)
    packed.layout[-4:-2] = torch.tensor([2, 6])  # as many channels as before
    with pytest.raises(RuntimeError, match="qk_norm: wanted heads of one QK width; got 2 and 6"):
        cpu.run_packed(call.x, [packed], 3)
    widths = torch.tensor([[4, 40], [4, 4]])
    with pytest.raises(RuntimeError, match="qk_norm: wanted heads of one QK width; got 4 and 40"):
        torch.ops.gohsp_kernels.cpu_attention(
            torch.ones(1, 2, 96), widths, WORDS, [1, 0, 0, 0, 0, 0, 0], 1.0, 1e-6, 8, 2
        )
    widths = torch.tensor([[4, 6], [4, 4]])
    turned = torch.ones(1, 2, 28), widths, WORDS
    for numbers, message in (
        ([0, 0, 2, 4, 0, 0, 0], "qk_norm: wanted heads of one QK width; got 4 and 6"),
        ([0, 0, 2**40, 5, 0, 0, 0], "rope: wanted no negative number of tokens, and no gigantic one"),
        ([0, 0, -2, 5, 0, 0, 0], "rope: wanted no negative number of tokens, and no gigantic one"),
        ([0, 0, 3, 5, 0, 0, 0], "words: too short"),
        ([0, 0, 1, 5, 0, 0, 0], "words: wanted no more than norms, angles, biases and factors"),
        ([0, 0, 0, 0, 2**40, 2, 0], "biases: wanted a group, no negative number of tokens, and no gigantic ones"),
        ([0, 0, 0, 0, -1, 2, 0], "biases: wanted a group, no negative number of tokens, and no gigantic ones"),
        ([0, 0, 0, 0, 1, -2, 0], "biases: wanted a group, no negative number of tokens, and no gigantic ones"),
        ([0, 0, 0, 0, 2**30, 2**30, 0], "biases: wanted a group, no negative number|biases: wanted no gi"),
        ([0, 0, 0, 0, 1, 2, 0], "words: too short"),
        ([0, 0, 0, 0, 0, 0, 1], "words: wanted no more than norms, angles, biases and factors"),
        ([0, 2, 0, 0, 0, 0, 0], "layouts: unknown kind of norm 2"),
        ([0, 0], "numbers: wanted 7; got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gohsp_kernels.cpu_attention(*turned, numbers, 1.0, 1e-6, 8, 2)
    with pytest.raises(RuntimeError, match="rope: wanted even QK widths; got 3"):
        odd = torch.ones(1, 2, 22), torch.tensor([[4, 3], [4, 4]]), WORDS
        torch.ops.gohsp_kernels.cpu_attention(*odd, [0, 0, 2, 3, 0, 0, 0], 1.0, 1e-6, 8, 2)
    with pytest.raises(RuntimeError, match="x: wanted 1 tokens, for which rotary positions were packed; got 2"):
        one = torch.ones(1, 2, 12), torch.tensor([[4], [4]]), WORDS[:4]
        torch.ops.gohsp_kernels.cpu_attention(*one, [0, 0, 1, 2, 0, 0, 0], 1.0, 1e-6, 4, 2)
    biased = torch.ones(1, 1, 12), torch.tensor([[4], [4]]), torch.zeros(64, dtype=torch.int32)
    for numbers, message in (
        ([0, 0, 0, 0, 2, 2, 0], "x: wanted 2 tokens, for which biases of attention were packed; got 1"),
        ([0, 0, 0, 0, 4, 1, 0], "x: wanted a multiple of 4 images, which have biases of their own in turns; got 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.gohsp_kernels.cpu_attention(*biased, numbers, 1.0, 1e-6, 4, 1)


@pytest.mark.parametrize("width", [2**62, 2**31, -8])
def test_widths_whose_sum_would_wrap_are_refused(width: int) -> None:
    widths = torch.tensor([[width, width], [0, 0]])
    with pytest.raises(RuntimeError, match="widths: wanted 0 to"):
        torch.ops.gohsp_kernels.cpu_attention(
            torch.ones(1, 2, 0), widths, WORDS[:0], [0, 0, 0, 0, 0, 0, 0], 1.0, 1e-6, 0, 2
        )
    numbers = layout(_native.numbers("sublayers")["mlp"], 8, width, 1, 0, 0, 0, 0, -1, -1)
    with pytest.raises(RuntimeError, match="layouts: wanted no negative and no gigantic sizes"):
        torch.ops.gohsp_kernels.cpu_sublayers(
            torch.ones(1, 2, 8), [torch.zeros(0, dtype=torch.int32)], [numbers], [1e-6, 1e-6, 1.0, 1e-6], 2
        )


@pytest.mark.parametrize("operator", ["attention_sublayer", "mlp_sublayer"])
def test_a_norm_behind_some_columns_is_refused(operator: str) -> None:
    sizes: tuple[Any, ...] = (2, 7, 16, [4], [4]) if operator == "attention_sublayer" else ((2, 7), 16, 12)
    call = getattr(Maker(1), operator)(*sizes, None, 9)
    packed = cpu.pack_sublayer(call.operator, 16)
    inner = (packed.layout == -1).nonzero()[0] - 1  # in front of the columns that are read, of which there are all
    packed.layout[inner] = 1
    with pytest.raises(RuntimeError, match="layouts: wanted all columns out in front of a norm"):
        cpu.run_packed(call.x, [packed], 7)


def test_a_gigantic_weight_without_elements_is_refused() -> None:
    with pytest.raises(RuntimeError, match="weight: wanted no negative and no gigantic sizes"):
        torch.ops.gohsp_kernels.cpu_pack(torch.empty(2**40, 0), None, None, 0)


@pytest.mark.parametrize("name", ["packed_linear", "cpu_attention"])
def test_tensors_on_meta_beside_others_are_refused(name: str) -> None:
    x = torch.ones(1, 2, 24)
    arguments = {
        "packed_linear": (x, torch.empty(8, 24, device="meta"), None, None, None, 8, "identity"),
        "cpu_attention": (x, torch.empty(2, 2, dtype=torch.int64, device="meta"), WORDS[:0], [0] * 7, 1.0, 1e-6, 8, 2),
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


def cuda_sample(name: str) -> list[Any]:
    """Arguments of a native CUDA operator, which is emulated, in lists that may be changed."""
    cuda = pytest.importorskip("tests.gohsp_kernels.cuda.test_operators")
    return [list(a) if isinstance(a, list) else a for a in cuda.native_samples()[name]]


# Numbers of a layout by place. Those of cuda_linear are features, outputs, activation, then n, chunks and vectors of
# its matrix, then form, columns and list of its input.
CUDA_LINEAR = {
    "sizes whose product wraps": ({3: 2**62, 4: 4}, "layouts: wanted no negative and no gigantic sizes"),
    "an unknown form of input": ({6: 7}, "layouts: unknown form of input"),
    "a copy of more columns than there are": ({6: "copy", 7: 10**6, 8: 0}, "layouts: wanted inputs among 24 features"),
    "negative columns": ({7: -1}, "layouts: wanted 0 to"),
}


@pytest.mark.parametrize("name", CUDA_LINEAR)
def test_layouts_for_cuda_that_lead_elsewhere_are_refused(name: str) -> None:
    numbers, message = CUDA_LINEAR[name]
    arguments = cuda_sample("cuda_linear")
    arguments[4] = arguments[4].clone()
    for place, number in numbers.items():
        arguments[4][place] = _native.numbers("cuda_inputs").get(number, number)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gohsp_kernels.cuda_linear(*arguments)


def test_tables_of_heads_for_cuda_have_six_numbers_a_head() -> None:
    arguments = cuda_sample("cuda_attention")
    for heads in (arguments[1].flatten()[:-1], arguments[1].new_empty(0, 2**40), arguments[1][:, :5].contiguous()):
        with pytest.raises(RuntimeError, match="heads: wanted contiguous int32 of shape"):
            torch.ops.gohsp_kernels.cuda_attention(arguments[0], heads, *arguments[2:])


WRONG = {
    "weights on meta": ({"weight": torch.empty(8, 24, device="meta")}, ValueError, "tensors: wanted all on cpu, as x"),
    "weights of integers": ({"weight": torch.ones(8, 24).long()}, ValueError, "weight: wanted a tensor of floats"),
    "no weights": ({"weight": None}, TypeError, "weight: wanted a tensor; got NoneType"),
    "a word for x": ({"x": "x"}, TypeError, "x: wanted a tensor; got str"),
    "columns that are a list": ({"in_cols": [1]}, TypeError, "in_cols: wanted a 1-D int64 tensor; got list"),
    "half a feature": ({"out_features": 1.5}, TypeError, "out_features: wanted a whole number; got float"),
    "fewer features than none": ({"out_features": -1}, ValueError, "out_features: wanted 0 or more"),
    "no name of a function": ({"activation": None}, ValueError, "activation: wanted one of"),
}


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_of_public_functions_are_named(name: str, backend: str) -> None:
    if not gk.can_run(backend):
        pytest.skip(gk.can_run(backend).reason)
    arguments, error, message = WRONG[name]
    with pytest.raises(error, match=message):
        gk.packed_linear(**{"x": torch.ones(2, 24), "weight": torch.ones(8, 24), **arguments}, backend=backend)


def test_the_bias_of_a_norm_without_its_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="q_norm_weight: wanted a weight for both"):
        gk.ragged_attention(torch.ones(1, 2, 12), [4], [4], 1.0, q_norm_bias=torch.ones(4), backend="reference")


@pytest.mark.parametrize("queries", [-1, 4, 2**62])
def test_queries_that_exported_graphs_ask_for_are_counted(queries: int) -> None:
    call = Maker(1).attention_sublayer(1, 3, 16, [4, 4], [4, 4])
    with pytest.raises(ValueError, match="num_queries: wanted 0 to 3"):
        torch.ops.gohsp_kernels.attention_sublayer(call.x, *call.operator.flat(queries))
