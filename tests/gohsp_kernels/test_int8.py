# SPDX-License-Identifier: Apache-2.0
"""int8 weights: the kernels against the plain description of their arithmetic, and that against float64."""

from __future__ import annotations

import gc
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import _native, chain, cpu, reference
from gohsp_kernels.formats import FORMATS
from gohsp_kernels.testing import Call, Maker, error

from .test_chain import FEATURES, bound, chains, one_by_one

needs_native = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)
checks = pytest.importorskip("gohsp_kernels._checks", reason="the checks module is not built")

FLIPPED = 2e-3
"""Tolerance of what follows a norm or a softmax: their last bit decides where a value between two integers goes."""


def described(x: Tensor, calls: list[Call], levels: int) -> Tensor:
    """What a chain of int8 sublayers computes, in float64 but for the integers."""
    for call in calls:
        x = FORMATS["int8"].reference(chain.descriptor(bound(call)), x, levels, cpu.reference_attention("int8"))
    return x


def int8_chain(calls: list[Call], features: int = FEATURES) -> gk.FrozenChain:
    return gk.SublayerChain(list(map(bound, calls))).frozen(features, weights="int8")


def product(capability: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b by the kernel, with weights quantised by the reference; its output array held NaN before."""
    values, scales = reference.quantise_weight(weight)
    number = _native.numbers("formats")["int8"]
    y = checks.product(capability, number, x.numpy(), values.numpy(), scales.numpy(), bias.numpy())
    return torch.from_numpy(y)


def tolerance(capability: str) -> float:
    # Without a fused multiply-add the scaled value is rounded before it becomes an integer: a few go the other way.
    return 5e-4 if capability == "scalar" else 2e-6


def near_a_tie(x: Tensor, levels: int) -> Tensor:
    """Which rows hold a value, or a zero point, so near to half an integer that float32 may round it either way."""
    if x.shape[1] == 0:
        return torch.zeros(len(x), dtype=torch.bool)
    low, high = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    inverse = levels / (high - low)
    scaled = torch.cat((x, low), dim=1).double() * inverse.double()
    # The last bit of the reciprocal of a range moves a value of 255 by 1.5e-5.
    return ((scaled - scaled.floor() - 0.5).abs() < 2e-5).any(dim=1)


@pytest.mark.parametrize("capability", checks.capabilities())
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 12, 13, 50]),
    outputs=st.sampled_from([0, 1, 15, 33, 100]),
    inputs=st.sampled_from([0, 1, 2, 3, 4, 5, 63, 64, 387]),
    seed=st.integers(0, 2**31),
)
def test_products_are_exact(capability: str, rows: int, outputs: int, inputs: int, seed: int) -> None:
    maker = Maker(seed)
    x, weight, bias = maker.normal(rows, inputs), maker.weight(outputs, inputs), maker.normal(outputs)
    levels = checks.activation_levels(capability)
    truth = reference.int8_linear(x.double(), weight, bias, levels)
    got, clear = product(capability, x, weight, bias), ~near_a_tie(x, levels)
    assert error(got[clear], truth[clear]) < tolerance(capability)
    # In the other rows a value or two may be the next integer: a step of the row times a weight each.
    steps = reference.quantise_rows(x, levels)[2].double() * weight.abs().amax(1, keepdim=True).mT if inputs else 0.0
    assert ((got - truth).abs() <= 3 * steps + 1e-5 * (1 + truth.abs())).all()


ROWS = {
    "zeros": lambda x: x * 0,
    "one-sided": torch.abs,
    "negative": lambda x: -x.abs(),
    "constant": lambda x: x * 0 + 3.25,
    "outlier": lambda x: x.index_fill(1, torch.tensor([7]), 1e4),
    "tiny": lambda x: x * 1e-36,
    "huge": lambda x: x * 1e36,
}


@pytest.mark.parametrize("capability", checks.capabilities())
@pytest.mark.parametrize("name", ROWS)
def test_awkward_rows(capability: str, name: str) -> None:
    maker = Maker(1)
    x, weight, bias = ROWS[name](maker.normal(13, 61)), maker.weight(40, 61), maker.normal(40)
    result = product(capability, x, weight, bias)
    truth = reference.int8_linear(x.double(), weight, bias, checks.activation_levels(capability))
    assert error(result, truth) < tolerance(capability)
    if name in ("zeros", "tiny"):
        assert torch.equal(result, bias.expand(13, 40))


@pytest.mark.parametrize("capability", checks.capabilities())
def test_extreme_products_do_not_saturate(capability: str) -> None:
    """Every byte at the end of its range: what 16-bit sums of two products would cut off."""
    levels, inputs = checks.activation_levels(capability), 4096
    for sign in (1.0, -1.0):
        x, weight = torch.full((3, inputs), 2.0), torch.full((5, inputs), sign)
        result = product(capability, x, weight, torch.zeros(5))
        assert torch.allclose(result, torch.full((3, 5), sign * 2 * inputs), rtol=1e-6)
        assert levels in (127, 255)


@pytest.mark.parametrize("capability", checks.capabilities())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_harms_no_other(capability: str, value: float) -> None:
    maker = Maker(2)
    x, weight, bias = maker.normal(13, 61), maker.weight(40, 61), maker.normal(40)
    truth = product(capability, x, weight, bias)
    x[4, 60] = value
    result = product(capability, x, weight, bias)
    assert result[4].isnan().all()
    others = [i for i in range(13) if i != 4]
    assert torch.equal(result[others], truth[others])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("capability", checks.capabilities())
def test_a_weight_that_is_not_finite_gives_nan_in_its_output(capability: str, value: float) -> None:
    maker = Maker(3)
    x, weight, bias = maker.normal(13, 61), maker.weight(40, 61), maker.normal(40)
    weight[5, 3] = value
    result = product(capability, x, weight, bias)
    assert result[:, 5].isnan().all() and torch.isfinite(result[:, 6:]).all()


def test_quantised_weights_are_as_near_as_their_step() -> None:
    weight = Maker(4).normal(30, 50).double()
    weight[3] = 0
    values, scales = reference.quantise_weight(weight)
    assert values.dtype == torch.int8 and values[3].abs().sum() == 0 and scales[3] == 0
    assert values.abs().amax(dim=1)[[i for i in range(30) if i != 3]].eq(127).all()
    assert ((values * scales[:, None] - weight).abs() <= scales[:, None] * 0.5001).all()


@pytest.mark.parametrize("levels", [127, 255])
def test_quantised_rows_are_as_near_as_their_step(levels: int) -> None:
    x = Maker(5).normal(30, 50)
    x[0], x[1], x[2, 0] = 0, x[1].abs(), 1e4
    values, zeros, scales = reference.quantise_rows(x, levels)
    assert values.min() >= 0 and values.max() == levels
    # Half a step, and half a step more at the ends, where the zero point had to be rounded too.
    assert (((values - zeros) * scales - x).abs() <= scales * 1.0001).all()
    assert torch.equal(values[1].min() - zeros[1], values.new_zeros(1) + values[1].min())
    zero = (reference.quantise_rows(torch.zeros(1, 3), levels)[0] - 0).abs().sum()
    assert zero == 0


@needs_native
@settings(max_examples=40, deadline=None)
@given(calls=chains(), batch=st.sampled_from([0, 1, 2, 5]), tokens=st.sampled_from([1, 7, 30]), data=st.data())
def test_random_chains(calls: list[Call], batch: int, tokens: int, data: st.DataObject) -> None:
    queries = data.draw(st.sampled_from([tokens, 1, 0]))
    x = Maker(batch).normal(batch, tokens, FEATURES)
    result = int8_chain(calls)(x, num_queries=queries)
    assert error(result, described(x.double(), calls, cpu.activation_levels())[:, :queries]) < FLIPPED


@needs_native
def test_chain_with_qk_norm_and_close_to_float64() -> None:
    maker = Maker(6)
    calls = [
        maker.attention_sublayer(0, 0, FEATURES, [8, 8], [8, 8], 30, 31, **maker.qk_norm(8)),
        maker.mlp_sublayer((0,), FEATURES, 50, 29, 33, activation="silu"),
        maker.attention_sublayer(0, 0, FEATURES, [5, 11, 3], [8, 2, 7]),
        maker.mlp_sublayer((0,), FEATURES, 160),  # its second matrix reads far more than its first
    ]
    x = maker.normal(3, 20, FEATURES)
    result = int8_chain(calls)(x)
    assert error(result, described(x.double(), calls, cpu.activation_levels())) < FLIPPED
    # 8 bits are not nothing: the error must be there, and must be small.
    assert 1e-4 < error(result, one_by_one(x.double(), calls)) < 0.05


@needs_native
def test_weights_take_a_quarter_and_no_cache_holds_them() -> None:
    maker = Maker(9)
    calls = [maker.attention_sublayer(0, 0, 256, [64] * 2, [64] * 2), maker.mlp_sublayer((0,), 256, 512)]
    gc.collect()
    before = len(cpu._cache._entries)
    frozen = int8_chain(calls, 256)
    assert len(cpu._cache._entries) == before
    attention, mlp = (call.operator for call in calls)
    matrices = (attention.qkv_weight, attention.proj_weight, mlp.fc1_weight, mlp.fc2_weight)
    weights = sum(matrix.numel() for matrix in matrices)
    size = sum(s.panels.numel() * s.panels.element_size() for s in frozen.sublayers)
    assert weights < size < 1.1 * weights


@needs_native
def test_wrong_arguments_are_refused() -> None:
    member = bound(Maker(10).mlp_sublayer((0,), FEATURES, 8))
    with pytest.raises(ValueError, match="weights: wanted one of 'float32', 'bfloat16', 'int8'; got 'int4'"):
        gk.SublayerChain([member]).frozen(FEATURES, weights="int4")
    values, scales = torch.zeros(3, 4, dtype=torch.int8), torch.ones(3)
    pack = partial(torch.ops.gohsp_kernels.cpu_pack, format=_native.numbers("formats")["int8"])
    with pytest.raises(RuntimeError, match="weight: wanted int8"):
        pack(values.float(), scales, None)
    with pytest.raises(RuntimeError, match="scales: wanted 3 elements"):
        pack(values, scales[:2], None)
    with pytest.raises(RuntimeError, match="scales: wanted 3 elements"):
        pack(values, None, None)
    with pytest.raises(RuntimeError, match="weight: wanted at most 65536 inputs; got 65537"):
        pack(torch.zeros(1, 65537, dtype=torch.int8), scales[:1], None)
    run = torch.ops.gohsp_kernels.cpu_sublayers
    layout = torch.tensor([cpu.packing("int8"), _native.numbers("sublayers")["mlp"], 8, 8, 1, 0, 0, 0, 0, -1, -1])
    with pytest.raises(RuntimeError, match="panels: wanted int32"):
        run(torch.ones(1, 1, 8), [torch.ones(9)], [layout], [1e-6, 0.0, 1.0, 1e-6], 1)
    with pytest.raises(RuntimeError, match="panels: too short"):
        run(torch.ones(1, 1, 8), [torch.ones(8, dtype=torch.int32)], [layout], [1e-6, 0.0, 1.0, 1e-6], 1)
    with pytest.raises(RuntimeError, match="x: wanted the number of features that sublayer 0 was packed for; got 7"):
        run(torch.ones(1, 1, 7), [torch.ones(8, dtype=torch.int32)], [layout], [1e-6, 0.0, 1.0, 1e-6], 1)
    for place, number, message in ((6, 2, "unknown kind of norm 2"), (7, 7, "wanted an inner norm over 8 features or")):
        changed = layout.clone()
        changed[place] = number
        with pytest.raises(RuntimeError, match=f"layouts: {message}"):
            run(torch.ones(1, 1, 8), [torch.ones(8, dtype=torch.int32)], [changed], [1e-6, 0.0, 1.0, 1e-6], 1)
    layout[1] = 7
    with pytest.raises(RuntimeError, match="layouts: unknown kind of sublayer 7"):
        run(torch.ones(1, 1, 8), [torch.ones(8, dtype=torch.int32)], [layout], [1e-6, 0.0, 1.0, 1e-6], 1)


def test_support_is_told() -> None:
    assert gk.can_run("cpu", weights="int8").ok == bool(_native.load())
    for backend in ("reference", "triton"):
        support = gk.can_run(backend, weights="int8")
        assert not support and support.reason == "has no int8 weights; the backend 'cpu' has"
    with pytest.raises(ValueError, match="weights: wanted one of 'float32', 'bfloat16', 'int8'; got 'fp8'"):
        gk.can_run("cpu", weights="fp8")


def test_checks_refuse_shapes_that_do_not_fit() -> None:
    x, weight, ones = np.zeros((2, 3), np.float32), np.zeros((4, 5), np.int8), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="x, weight: wanted"):
        checks.product("scalar", 1, x, weight, ones, ones)
