# SPDX-License-Identifier: Apache-2.0
"""Choice of the backend, its reasons, and the errors for arguments that do not fit together."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import _native, dispatch, info, registry
from gohsp_kernels.descriptors import GATED, Descriptor
from gohsp_kernels.registry import BACKENDS, Request
from gohsp_kernels.testing import Maker, error, samples

from .test_chain import bound


def test_backends_lists_each_with_a_reason_or_none() -> None:
    for support in gk.backends().values():
        assert bool(support) == (support.reason == "")
    assert gk.backends()["reference"]


@pytest.mark.parametrize(
    ("device", "dtype", "needs_grad", "reason"),
    [
        ("cuda", torch.float32, False, "CPU tensors"),
        ("cpu", torch.float64, False, "float32"),
        ("cpu", torch.float32, True, "no backward"),
    ],
)
def test_cpu_says_what_it_cannot_run(device: str, dtype: torch.dtype, needs_grad: bool, reason: str) -> None:
    support = gk.can_run("cpu", device, dtype, needs_grad=needs_grad)
    assert not support and reason in support.reason
    assert gk.can_run("reference", device, dtype, needs_grad=needs_grad)


def test_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load", lambda: _native.Library(None, "was not built"))
    assert gk.can_run("cpu").reason == "was not built"
    call = samples()["mlp_sublayer"]
    assert torch.equal(call.run(), call.run("reference"))
    with pytest.raises(RuntimeError, match="backend 'cpu': was not built"):
        call.run("cpu")


def test_library_that_does_not_load_is_a_reason(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C_cpu.so").write_text("not a library")
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    found = _native.load.__wrapped__()
    assert not found and "does not load" in found.reason


def test_named_backend_raises_and_auto_falls_back() -> None:
    call = samples()["mlp_sublayer"].to(torch.float64)
    with pytest.raises(RuntimeError, match="backend 'cpu'"):
        call.run("cpu")
    with gk.use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu'"):
        call.run()
    assert torch.equal(call.run(), call.run("reference"))


def test_auto_says_once_why_it_fell_back(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_already_logged", set())
    call = samples()["mlp_sublayer"].to(torch.float64)
    with caplog.at_level(logging.INFO, logger="gohsp_kernels"):
        call.run()
        call.run()
    assert sum("'cpu' passed over" in message for message in caplog.messages) == 1


def test_auto_is_differentiable_where_gradients_are_needed() -> None:
    call = samples()["mlp_sublayer"]
    call.operator.key.requires_grad_()
    assert call.run().requires_grad
    with torch.no_grad():
        assert not call.run().requires_grad


def test_use_backend_nests_and_restores() -> None:
    before = dispatch.selected()
    with gk.use_backend("reference"):
        with pytest.raises(KeyError), gk.use_backend("auto"):
            raise KeyError
        assert dispatch.selected() == "reference"
    assert dispatch.selected() == before


def test_unknown_backend_names_the_known_ones() -> None:
    for refused in (lambda: samples()["mlp_sublayer"].run("tpu"), lambda: gk.can_run("tpu")):
        with pytest.raises(ValueError, match=r"backend: wanted one of 'auto', .*'cpu'.*; got 'tpu'"):
            refused()
    with pytest.raises(ValueError, match="got 'tpu'"), gk.use_backend("tpu"):
        pass


@pytest.mark.slow
def test_environment_variable_selects_the_backend() -> None:
    code = "import gohsp_kernels.dispatch as d; print(d.selected())"
    for value, expected in (("reference", "reference"), ("tpu", "got 'tpu'")):
        environment = {**os.environ, "GOHSP_BACKEND": value}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert expected in run.stdout + run.stderr
        assert (run.returncode == 0) == (value == "reference")


class Counting:
    """A backend from outside: the reference, for float32 alone, with a count of its calls."""

    name = "counting"
    operators = ("attention_sublayer", "mlp_sublayer")
    parts = (GATED,)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def missing(self, request: Request) -> str:
        return "" if request.dtype == torch.float32 else "counts in float32"

    def only_named(self, request: Request) -> str:
        return "does not count gradients" if request.needs_grad else ""

    def priority(self, request: Request) -> int:
        return 100

    def run(self, operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
        self.calls.append(operator.name)
        return BACKENDS["reference"].run(operator, x, num_queries)

    def chain(self, x: Tensor, sublayers: Any) -> None:
        return None


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    backend = Counting()
    monkeypatch.setitem(BACKENDS, backend.name, backend)
    return backend


def test_a_backend_from_outside_is_a_peer(counting: Counting) -> None:
    call = samples()["mlp_sublayer"]
    truth = call.run("reference")
    assert torch.equal(call.run(), truth) and torch.equal(call.run("counting"), truth)
    assert counting.calls == ["mlp_sublayer"] * 2
    assert next(iter(gk.backends())) == "counting" and gk.can_run("counting")
    with pytest.raises(RuntimeError, match="backend 'counting': counts in float32"):
        call.to(torch.float64).run("counting")
    call.to(torch.float64).run()
    call.operator.key.requires_grad_()
    assert call.run().requires_grad and len(counting.calls) == 2
    assert call.run("counting").requires_grad and len(counting.calls) == 3


def test_a_backend_is_not_asked_for_an_operator_that_it_does_not_have(counting: Counting) -> None:
    call = samples()["packed_linear"]
    assert error(call.run(), call.run("reference")) < 1e-6
    with pytest.raises(RuntimeError, match="backend 'counting': has no packed_linear"):
        call.run("counting")
    assert counting.calls == []


def test_a_backend_is_not_asked_for_parts_that_it_does_not_have(counting: Counting) -> None:
    maker = Maker(4)
    gated = maker.mlp_sublayer((2, 3), 16, 8, **maker.gate(8, 16))
    gated.run()
    assert counting.calls == ["mlp_sublayer"]
    both = gated.but(norm="rms")
    assert error(both.run(), both.run("reference")) < 1e-6
    with pytest.raises(RuntimeError, match="backend 'counting': has no kernel for RMSNorm"):
        both.run("counting")
    chain = gk.SublayerChain([bound(both)])
    assert error(chain(both.x), both.run("reference")) < 1e-6
    with pytest.raises(RuntimeError, match="backend 'counting': has no kernel for RMSNorm"):
        chain(both.x, backend="counting")
    assert counting.calls == ["mlp_sublayer"]


def test_a_backend_without_chains_gets_its_sublayers_one_by_one(counting: Counting) -> None:
    maker = Maker(3)
    calls = [maker.attention_sublayer(0, 0, 24, [8], [8]), maker.mlp_sublayer((0,), 24, 16)]
    x = maker.normal(2, 5, 24)
    chain = gk.SublayerChain([bound(call) for call in calls])
    assert error(chain(x, num_queries=3), chain(x, num_queries=3, backend="reference")) < 1e-6
    assert counting.calls == ["attention_sublayer", "mlp_sublayer"]


def test_a_name_is_given_once(counting: Counting) -> None:
    with pytest.raises(ValueError, match="backend: wanted a name that is free; got 'counting'"):
        registry.register(counting)


def test_info_reports_backends_and_operators() -> None:
    text = info.report()
    for word in ("reference", "cpu", "attention_sublayer", "instruction set", torch.__version__):
        assert word in text


LINEAR, SUBLAYER, MLP = (samples()[n] for n in ("packed_linear", "attention_sublayer", "mlp_sublayer"))
ATTENTION = samples()["ragged_attention"]


WRONG = {
    "activation: wanted one of identity, gelu": LINEAR.but(activation="tanh"),
    "weight: wanted shape [20, 17]; got shape [20, 16]": LINEAR.but(weight=torch.zeros(20, 16)),
    "bias: wanted shape [20]; got shape [19]": LINEAR.but(bias=torch.zeros(19)),
    "in_cols: wanted a 1-D int64 tensor; got 1-D torch.int32": LINEAR.but(in_cols=torch.zeros(17).int()),
    "qkv: wanted 3 dimensions": ATTENTION.with_x(torch.zeros(9, 53)),
    "qkv: wanted shape [2, 9, 53]; got shape [2, 9, 52]": ATTENTION.with_x(torch.zeros(2, 9, 52)),
    "v_widths: wanted 3 heads, as in qk_widths; got 2": ATTENTION.but(v_widths=[8, 19]),
    "qk_widths, v_widths: wanted no negative width": ATTENTION.but(qk_widths=[8, -1, 5]),
    "qk_widths: wanted one width for all heads": ATTENTION.but(**Maker(0).qk_norm(8)),
    "num_queries: wanted 0 to 9 (the number of tokens); got 10": replace(ATTENTION, num_queries=10),
    "x: wanted at least 1 dimension; got a scalar": MLP.with_x(torch.tensor(1.0)),
    "x: wanted 3 dimensions": SUBLAYER.with_x(torch.zeros(9, 24)),
    "norm_weight: wanted shape [24]": SUBLAYER.but(norm_weight=torch.zeros(23)),
    "qkv_weight: wanted shape [53, 17]": SUBLAYER.but(qkv_weight=torch.zeros(53, 24)),
    "proj_weight: wanted shape [20, 27]": SUBLAYER.but(proj_weight=torch.zeros(24, 27)),
    "layer_scale: wanted shape [20]": SUBLAYER.but(layer_scale=torch.zeros(24)),
    "fc1_weight: wanted shape [40, 17]": MLP.but(fc1_weight=torch.zeros(40, 24)),
    "fc2_weight: wanted shape [20, 40]": MLP.but(fc2_weight=torch.zeros(20, 39)),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments_give_one_clear_error(message: str) -> None:
    with pytest.raises(ValueError) as raised:
        WRONG[message].run()
    assert message in str(raised.value)
