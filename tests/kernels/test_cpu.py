# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels against the reference in float64: random calls, every edge, every instruction set of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gohsp_kernels as gk
from gohsp_kernels import cpu

from .cases import OPERATORS, Call, Maker, calls, relative_error, run_again, samples

TOLERANCE = 2e-6
"""Relative norm of the error in fp32. Sums of a few hundred products leave some 5e-7."""


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """New tensors are filled with NaN, so that an element that is never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


ACTIVATION_TOLERANCE = 5e-7
"""Of an activation, relative to its input: the bound of test_native.py. In the tail of GELU, where 1 + erf cancels, the
result is a hundredth of the input, and the formula in fp32 is no better either."""


def check(call: Call) -> None:
    result = call.run("cpu")
    exact = call.to(torch.float64)
    truth = exact.run("reference")
    assert result.dtype == torch.float32 and result.is_contiguous()
    allowed = TOLERANCE
    if call.kwargs.get("activation", "identity") != "identity" and call.operator == "packed_linear":
        inputs = Call(exact.operator, exact.args, exact.kwargs | {"activation": "identity"}).run("reference")
        allowed += ACTIVATION_TOLERANCE * float(inputs.norm() / truth.norm().clamp_min(1e-30))
    assert relative_error(result, truth) < allowed


@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_calls(operator: str, data: st.DataObject) -> None:
    check(data.draw(calls(operator)))


EDGES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "no head": ("attention_sublayer", (2, 7, 16, [], []), {}),
    "a head without QK channels": ("attention_sublayer", (2, 7, 16, [0, 4], [4, 4]), {}),
    "a head without V channels": ("attention_sublayer", (2, 7, 16, [4, 4], [0, 4]), {}),
    "no V channel at all": ("attention_sublayer", (2, 7, 16, [4, 4], [0, 0]), {}),
    "no input column, attention": ("attention_sublayer", (2, 7, 16, [4, 4], [4, 4], 0), {}),
    "no output column, attention": ("attention_sublayer", (2, 7, 16, [4, 4], [4, 4], None, 0), {}),
    "no query": ("attention_sublayer", (2, 7, 16, [4], [4]), {"num_queries": 0}),
    "no image": ("attention_sublayer", (0, 7, 16, [4], [4]), {}),
    "one token": ("attention_sublayer", (3, 1, 16, [4], [4]), {}),
    "more tokens than a score row of one panel": ("attention_sublayer", (1, 1025, 32, [16], [16]), {}),
    "no hidden neuron": ("mlp_sublayer", ((2, 7), 16, 0), {}),
    "no input column, MLP": ("mlp_sublayer", ((2, 7), 16, 12, 0), {}),
    "no output column, MLP": ("mlp_sublayer", ((2, 7), 16, 12, None, 0), {}),
    "no row": ("mlp_sublayer", ((0, 7), 16, 12), {}),
    "leading dimensions": ("mlp_sublayer", ((2, 3, 2, 5), 16, 12), {}),
    "a single row": ("mlp_sublayer", ((), 16, 12), {}),
    "columns after whole vectors, linear": ("linear", ((2, 9), 61, 37, 31, 20, "gelu"), {}),
    "columns after whole vectors, attention": ("attention_sublayer", (2, 9, 61, [5, 8], [7, 3], 37, 29), {}),
    "columns after whole vectors, MLP": ("mlp_sublayer", ((2, 9), 61, 33, 37, 29), {}),
    "all columns, which fill no whole vectors": ("mlp_sublayer", ((2, 9), 61, 33), {}),
    "an eps that matters": ("mlp_sublayer", ((2, 7), 16, 12), {"eps": 0.5}),
}


@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str) -> None:
    method, args, kwargs = EDGES[edge]
    check(getattr(Maker(7), method)(*args, **kwargs))


@pytest.mark.parametrize("name", ["deit_tiny", "deit_small", "deit_base"])
def test_real_shapes(name: str) -> None:
    features, heads = {"deit_tiny": (192, 3), "deit_small": (384, 4), "deit_base": (768, 9)}[name]
    maker = Maker(8)
    check(maker.attention_sublayer(2, 197, features, [64] * heads, [64] * heads))
    check(maker.mlp_sublayer((2, 197), features, features * 5 // 2))


@pytest.mark.parametrize(("down", "across", "own"), [(1, 1, 0), (3, 5, 1), (7, 4, 2)])
def test_embedding(down: int, across: int, own: int) -> None:
    """Patches that are not square, and tokens before them."""
    maker = Maker(14)
    images, weight, bias = maker.normal(3, 2, 3 * down, 5 * across), maker.normal(21, 2, 3, 5), maker.normal(21)
    base = maker.normal(own + down * across, 21)
    patches = torch.nn.functional.conv2d(images.double(), weight.double(), bias.double(), stride=(3, 5))
    truth = base.double().repeat(3, 1, 1)
    truth[:, own:] += patches.flatten(2).mT
    assert relative_error(cpu.pack_embedding(weight, bias, base)(images), truth) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_batches_and_threads(batch: int, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(Maker(9).attention_sublayer(batch, 50, 64, [16, 5, 24], [16, 9, 3], 50, 33, num_queries=2))
        check(Maker(9).mlp_sublayer((batch, 50), 64, 100, 50, 33))
    finally:
        torch.set_num_threads(before)


def test_no_bias_no_norm_no_scale() -> None:
    call = Maker(10).attention_sublayer(2, 7, 16, [4, 4], [4, 4], layer_scale=None)
    x, _, _, qkv_weight, _, proj_weight, _ = call.args
    check(Call("attention_sublayer", (x, None, None, qkv_weight, None, proj_weight, None), call.kwargs))
    call = Maker(10).mlp_sublayer((2, 7), 16, 12, layer_scale=None)
    x, _, _, fc1_weight, _, fc2_weight, _ = call.args
    check(Call("mlp_sublayer", (x, None, None, fc1_weight, None, fc2_weight, None), call.kwargs))


@pytest.mark.parametrize("name", samples())
def test_non_contiguous_input(name: str) -> None:
    call = samples()[name]
    strided = call.args[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    check(Call(call.operator, (strided, *call.args[1:]), call.kwargs))


@pytest.mark.parametrize("name", samples())
def test_nan_of_an_earlier_call_does_not_leak(name: str) -> None:
    call = samples()[name]
    poisoned = Call(call.operator, (torch.full_like(call.args[0], float("nan")), *call.args[1:]), call.kwargs)
    assert poisoned.run("cpu").isnan().any()
    check(call)


def test_nan_in_one_image_stays_there() -> None:
    call = Maker(11).attention_sublayer(3, 7, 16, [4, 4], [4, 4])
    truth = call.run("cpu")
    x = call.args[0].clone()
    x[1, 3] = float("nan")
    result = Call(call.operator, (x, *call.args[1:]), call.kwargs).run("cpu")
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], truth[[0, 2]])


def test_results_do_not_depend_on_the_batch() -> None:
    call = Maker(12).attention_sublayer(4, 50, 64, [16, 5], [16, 9])
    together = call.run("cpu")
    for i in range(4):
        alone = Call(call.operator, (call.args[0][i : i + 1], *call.args[1:]), call.kwargs).run("cpu")
        assert relative_error(alone, together[i : i + 1]) < TOLERANCE


def test_large_scores_do_not_overflow() -> None:
    call = Maker(13).attention(1, 20, [8], [8])
    check(Call(call.operator, (call.args[0] * 100, *call.args[1:]), call.kwargs))


WRONG_COLUMNS = {
    "descending": torch.tensor([3, 1]),
    "repeated": torch.tensor([1, 1]),
    "negative": torch.tensor([-1, 2]),
    "past the end": torch.tensor([1, 16]),
}


@pytest.mark.parametrize("columns", WRONG_COLUMNS)
def test_column_lists_are_checked(columns: str) -> None:
    x, weight = torch.randn(3, 16), torch.randn(4, 2)
    with pytest.raises(ValueError, match="in_cols: wanted ascending indices of the 16 features, without repeats"):
        gk.packed_linear(x, weight, in_cols=WRONG_COLUMNS[columns], backend="cpu")
    # The native operator trusts nobody either: an index past the end would be read from foreign memory.
    packed = cpu.pack_linear(weight, None)
    with pytest.raises(RuntimeError, match="in_cols: wanted ascending columns"):
        torch.ops.gohsp_kernels.cpu_linear(x, packed.panels, packed.packing, WRONG_COLUMNS[columns], None, 4, 4, 0)


OTHER_CAPABILITIES = [c for c in ("scalar", "avx2", "avx512", "avx512vnni", "amx", "neon") if c != cpu.capability()]


@pytest.mark.slow
@pytest.mark.parametrize("capability", OTHER_CAPABILITIES)
def test_other_instruction_sets(capability: str) -> None:
    """This file again, in a process that was told to use another instruction set."""
    checks = pytest.importorskip("gohsp_kernels._checks", reason="the checks module is not built")
    if capability not in checks.capabilities():
        pytest.skip(f"this machine or build has no {capability}")
    run_again([__file__], capability)


@pytest.mark.slow
def test_unknown_instruction_set_is_refused() -> None:
    code = "import torch, gohsp_kernels as gk; gk.packed_linear(torch.ones(1, 2), torch.ones(1, 2), backend='cpu')"
    environment = {**os.environ, "GOHSP_CPU_CAPABILITY": "mmx"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "GOHSP_CPU_CAPABILITY" in run.stderr and "got 'mmx'" in run.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(2, 3, 4)}, "images: wanted 4 dimensions; got 3"),
        ({"images": torch.zeros(2, 3, 4, 10).double()}, "images: wanted float32"),
        ({"images": torch.zeros(2, 3, 4, 9)}, "images: wanted whole patches, at most 3"),
        ({"images": torch.zeros(2, 3, 8, 10)}, "images: wanted whole patches, at most 3"),
        ({"images": torch.zeros(2, 2, 4, 10)}, "panels: wanted the weights of 20 outputs and 40 inputs"),
        ({"patch": [4]}, "patch: wanted a height and a width"),
        ({"patch": [4, 0]}, "patch: wanted a height and a width"),
        ({"base": torch.zeros(20)}, "base: wanted 2 dimensions; got 1"),
        ({"packing": 5}, "panels: wanted weights that were packed for .* got some .* for another version of gohsp"),
    ],
)
def test_embed_refuses(change: dict[str, Any], message: str) -> None:
    packed = cpu.pack_embedding(torch.zeros(20, 3, 4, 5), None, torch.zeros(3, 20))
    good = {"images": torch.zeros(2, 3, 4, 10), **vars(packed)}
    assert torch.ops.gohsp_kernels.cpu_embed(**good).shape == (2, 3, 20)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.gohsp_kernels.cpu_embed(**(good | change))
