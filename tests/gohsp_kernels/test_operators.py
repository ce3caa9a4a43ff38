# SPDX-License-Identifier: Apache-2.0
"""Every operator on every backend that runs here against the reference in float64: awkward calls and random ones.

The kernels of the CPU, those of Triton in its interpreter, and those of CUDA in emulation, where a race, an access out
of bounds and a read of what nobody wrote end the run with the emulation's Fault.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gohsp_kernels import _native
from gohsp_kernels.descriptors import OPERATORS
from gohsp_kernels.registry import BACKENDS
from gohsp_kernels.testing import EDGES, Call, Maker, samples

from .cases import CHOICES, calls, check, choosing, run

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
Runner = tuple[str, torch.dtype]
RUNNERS: list[Runner] = [("cpu", FP32), ("triton", FP32), ("triton", FP16), *(("cuda", d) for d in (FP32, FP16, BF16))]
ONE_DTYPE: list[Runner] = [("cpu", FP32), ("triton", FP32), ("cuda", FP16)]

MISSING = {
    "cpu": _native.load().reason,
    "cuda": "" if importlib.util.find_spec("gohsp_kernels._checks_cuda") else "the checks module is not built",
}
CPU_ALONE = "GOHSP_CPU_CAPABILITY" in os.environ
"""A process that is told its instruction set is about the CPU: to the other backends it is nothing new."""


def runner(backend: str, *values: Any, slow: bool = False) -> Any:
    """A parameter whose id tells backend, dtype and what else there is."""
    marks = [pytest.mark.interpreter] if backend == "triton" else []
    if slow and backend != "cpu":
        marks.append(pytest.mark.slow)
    reason = MISSING.get(backend, "")
    marks.append(pytest.mark.skipif(bool(reason), reason=reason))
    words = [str(value).removeprefix("torch.") for value in (backend, *values)]
    return pytest.param(backend, *values, marks=marks, id="-".join(filter(None, words)))


def on(runners: Sequence[Runner], slow: bool = False) -> Any:
    found = [runner(*r, slow=slow) for r in runners if r[0] == "cpu" or not CPU_ALONE]
    return pytest.mark.parametrize(("backend", "dtype"), found)


def edges_with_choices() -> list[Any]:
    """Every edge on every backend that has its parts."""
    parts = {edge: make(Maker(7)).operator.parts for edge, make in EDGES.items()}
    return [
        runner(backend, dtype, choice, edge)
        for edge in EDGES
        for backend, dtype in RUNNERS
        if (backend == "cpu" or not CPU_ALONE) and parts[edge] <= set(BACKENDS[backend].parts)
        for choice in (CHOICES if backend == "cuda" else ("",))
    ]


@pytest.fixture(autouse=True)
def backend_has_the_operator(request: pytest.FixtureRequest) -> None:
    """Skip what the operator's author gave no kernel of this backend."""
    values = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    operator, backend = values.get("operator", values.get("edge", "").partition(",")[0]), values.get("backend")
    if operator and backend and operator not in BACKENDS[backend].operators:
        pytest.skip(f"the backend {backend!r} has no {operator}")


def test_the_edges_are_of_every_operator() -> None:
    made = {name: edge(Maker(7)).operator.name for name, edge in EDGES.items()}
    assert all(name.startswith(f"{operator}, ") for name, operator in made.items())
    assert set(made.values()) == set(OPERATORS)


@pytest.mark.parametrize(("backend", "dtype", "choice", "edge"), edges_with_choices())
def test_edges(backend: str, dtype: torch.dtype, choice: str, edge: str) -> None:
    with choosing(choice):
        check(EDGES[edge](Maker(7)), dtype, backend)


def floor(call: Call, backend: str) -> float:
    """Relative to what a random result is judged, where terms cancel.

    The CPU has no roundings but float32's. The bound of an activation (test_native.py) is relative to its input: in the
    tail of GELU, where 1 + erf cancels, the result is a hundredth of it, and the formula in float32 is no better.
    """
    if backend != "cpu":
        return 1.0
    if call.operator.residual:  # of one number, say, where what is added to x may leave next to nothing of it
        return float(call.x.norm()) / max(call.x.numel(), 1) ** 0.5
    if call.operator.name != "packed_linear" or call.operator.activation == "identity":
        return 0.0
    inputs = call.but(activation="identity").truth()
    return 0.25 * float(inputs.norm()) / max(inputs.numel(), 1) ** 0.5


EXAMPLES = {"cpu": 60, "triton": 25, "cuda": 50}


@on(RUNNERS, slow=True)
@pytest.mark.parametrize("operator", OPERATORS)
def test_random_calls(operator: str, backend: str, dtype: torch.dtype) -> None:
    @settings(max_examples=EXAMPLES[backend], deadline=None, suppress_health_check=[HealthCheck.nested_given])
    @given(
        call=calls(operator, BACKENDS[backend].parts),
        choice=st.sampled_from(sorted(CHOICES) if backend == "cuda" else [""]),
    )
    def is_right(call: Call, choice: str) -> None:
        with choosing(choice):
            check(call, dtype, backend, floor=floor(call, backend))

    is_right()


@on([("triton", FP16), ("cuda", FP16)], slow=True)
def test_the_tokens_of_an_image(backend: str, dtype: torch.dtype) -> None:
    """197 tokens, ragged, in the sizes of DeiT-Tiny: for kernels that nothing runs fast here, the only call so long."""
    maker = Maker(8)
    check(maker.attention_sublayer(1, 197, 192, [64, 24, 0], [64, 40, 16], 170, 181), dtype, backend)
    check(maker.mlp_sublayer((1, 197), 192, 400, 170, 181), dtype, backend)


@on(ONE_DTYPE)
@pytest.mark.parametrize("operator", OPERATORS)
def test_strided_and_unaligned_input(operator: str, backend: str, dtype: torch.dtype) -> None:
    call = samples()[operator].to(dtype)
    strided = call.x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    check(call.with_x(strided), dtype, backend)
    unaligned = call.x.new_zeros(call.x.numel() + 1)[1:].view(call.x.shape)
    unaligned.copy_(call.x)
    check(call.with_x(unaligned), dtype, backend)


@on(ONE_DTYPE)
@pytest.mark.parametrize("operator", OPERATORS)
def test_nan_of_an_earlier_call_does_not_leak(operator: str, backend: str, dtype: torch.dtype) -> None:
    call = samples()[operator].to(dtype)
    assert run(call.with_x(torch.full_like(call.x, float("nan"))), backend).isnan().any()
    check(call, dtype, backend)


@on(ONE_DTYPE)
def test_nan_in_one_image_stays_there(backend: str, dtype: torch.dtype) -> None:
    call = Maker(11).attention_sublayer(3, 7, 16, [4, 4], [4, 4]).to(dtype)
    truth = run(call, backend)
    x = call.x.clone()
    x[1, 3] = float("nan")
    result = run(call.with_x(x), backend)
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], truth[[0, 2]])


@on([(backend, FP32) for backend in ("cpu", "triton", "cuda")])
def test_large_scores_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    call = Maker(13).attention(1, 80, [8], [8])
    check(call.with_x(call.x * 100), dtype, backend, limit=None if backend == "cpu" else 1e-5)


@on([("triton", FP16), ("cuda", FP16)])
def test_tiny_layer_scale_survives_float16(backend: str, dtype: torch.dtype) -> None:
    """1e-5 on weights of 0.1 is below float16's smallest normal number: it must not be folded into them."""
    call = Maker(14).mlp_sublayer((4, 9), 16, 24, eps=1e-20)
    call.operator.layer_scale.mul_(1e-5)
    call.x.mul_(1e-5)  # so that the residual does not hide the branch; LayerNorm takes the factor out again
    check(call, dtype, backend)
