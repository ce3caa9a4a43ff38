# SPDX-License-Identifier: Apache-2.0
"""Gradients of every operator against those of the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gohsp_kernels.descriptors import OPERATORS
from gohsp_kernels.testing import EDGES, Call, Maker, poisoned, samples
from gohsp_kernels.triton import config
from tests.gohsp_kernels.cases import calls

from .helpers import assert_close

pytestmark = pytest.mark.interpreter

TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3}
"""Relative norm of the error of all gradients of a call together: a chain of some ten roundings."""


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with poisoned():
        yield


def gradients(call: Call, backend: str) -> list[Tensor]:
    """Gradient of each float argument under a fixed random gradient of the result."""
    leaves = call.tensors()
    for leaf in leaves:
        leaf.requires_grad_()
    result = call.run(backend)
    if not result.requires_grad:  # the reference of a call without any head
        return [torch.zeros_like(leaf) for leaf in leaves]
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(5)).to(result.dtype)
    return list(torch.autograd.grad(result, leaves, grad, materialize_grads=True))


def clone(call: Call, dtype: torch.dtype) -> Call:
    """A copy in another dtype that shares no tensor."""
    return call.mapped(lambda tensor: tensor.detach().clone()).to(dtype)


def check(call: Call, dtype: torch.dtype, tolerance: float | None = None) -> None:
    rounded = clone(call, dtype)
    truth = gradients(clone(rounded, torch.float64), "reference")
    result = gradients(rounded, "triton")
    assert all(r.dtype == dtype and r.shape == t.shape for r, t in zip(result, truth, strict=True))
    assert_close(
        *(torch.cat([g.double().flatten() for g in grads]) for grads in (result, truth)), tolerance or TOLERANCE[dtype]
    )


DTYPES = [torch.float32, torch.float16]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_calls(operator: str, dtype: torch.dtype, data: st.DataObject) -> None:
    call = data.draw(calls(operator))
    norm = getattr(call.operator, "q_norm_weight", None)
    if norm is not None and norm.numel() == 1:
        # Over one channel the gradient is zero, and PyTorch's layer_norm, which is that of training, multiplies the
        # rounding of that zero by 1 / sqrt(eps): by 1000 with the default.
        call = call.but(**{"eps" if operator == "ragged_attention" else "qk_eps": 1.0})
    check(call, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("edge", [edge for edge, make in EDGES.items() if not make(Maker(7)).operator.parts])
def test_edges(edge: str) -> None:
    check(EDGES[edge](Maker(7)), torch.float32)


def test_each_gradient_alone_is_right() -> None:
    """A wrong gradient of a small argument would not show in the norm of all of them."""
    for name, sample in samples().items():
        names = [f"{name} {i}" for i in range(len(sample.tensors()))]
        truth = gradients(clone(sample, torch.float64), "reference")
        result = gradients(clone(sample, torch.float32), "triton")
        for argument, r, t in zip(names, result, truth, strict=True):
            # The k bias has no effect, so its true gradient is rounding noise in both: judged by the largest entry.
            assert (r - t).abs().max() < 1e-5 * t.abs().max().clamp_min(1.0), argument


def test_scores_far_below_zero() -> None:
    """Below -128 a key past the last, whose score of 0 is far above the others, must be masked before it overflows."""
    call = Maker(9).attention(1, 20, [8], [8], num_queries=3)
    qkv = call.x
    qkv[..., :8] = qkv[..., :8] * 0.1 + 20
    qkv[..., 8:16] = qkv[..., 8:16] * 0.1 - 20
    check(call, torch.float32, tolerance=1e-4)  # scores of -800 carry errors of 1e-4


def test_only_what_is_asked_for_is_computed() -> None:
    call = samples()["packed_linear"]
    call.x.requires_grad_()
    call.run("triton").sum().backward()
    assert call.x.grad is not None and call.operator.key.grad is None
    call = samples()["packed_linear"]
    call.operator.key.requires_grad_()
    call.run("triton").sum().backward()
    assert call.x.grad is None and call.operator.key.grad is not None


@pytest.mark.slow
def test_gradients_are_the_same_at_each_run() -> None:
    call = Maker(20).attention_sublayer(3, 40, 48, [16, 8], [8, 16], 40, 37)
    first, second = (gradients(clone(call, torch.float16), "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float32_weights_train_float16_activations() -> None:
    call = samples()["mlp_sublayer"]
    x = call.x.half()
    mixed = call.with_x(x)
    grads = gradients(mixed, "triton")
    assert [g.dtype for g in grads] == [torch.float16, *[torch.float32] * (len(grads) - 1)]


@pytest.mark.parametrize("operator", OPERATORS)
def test_autocast_trains_float32_parameters(operator: str) -> None:
    """Kernels in float16, gradients in float32; nothing but x is rounded on the way in, and no host product at all."""
    call = samples()[operator]
    with torch.autocast("cpu", torch.float16):
        grads = gradients(clone(call, torch.float32), "triton")
        plain = gradients(clone(call, torch.float32), "reference")
    assert all(g.dtype == torch.float32 for g in grads)
    truth = gradients(clone(call, torch.float64), "reference")
    joined, joined_plain, joined_truth = (torch.cat([g.double().flatten() for g in gs]) for gs in (grads, plain, truth))
    assert_close(joined, joined_truth, TOLERANCE[torch.float16])
    assert_close(joined_plain, joined_truth, TOLERANCE[torch.float16])
    assert (joined - joined_truth).norm() > 1e-5 * joined_truth.norm()  # float16 it was


def test_second_derivative_is_refused() -> None:
    call = samples()["packed_linear"]
    call.x.requires_grad_()
    (grad,) = torch.autograd.grad(call.run("triton").square().sum(), call.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_rows_are_cut_into_ranges_that_cover_them() -> None:
    target = config.Target("cuda", 90, 132)
    for rows, tiles in ((0, 1), (1, 1), (197, 72), (12608, 72), (12608, 1000)):
        step = config.rows_per_range(target, rows, tiles, 64)
        assert step % 64 == 0 and step > 0
        ranges = -(-rows // step)
        assert ranges * tiles <= 2 * target.processors + tiles


def test_bias_gradient_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """There it loads its rows for itself."""
    monkeypatch.setattr(config.Target, "of", lambda device: config.Target("cuda", 90, 1))
    check(Maker(20).linear((70,), 40, None, 75, None, "gelu"), torch.float16)
