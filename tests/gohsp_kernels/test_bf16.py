# SPDX-License-Identifier: Apache-2.0
"""bfloat16 weights: the kernels against the plain description of their arithmetic, and that against float64.

Every instruction set has the arithmetic, so that it is tested on every machine; users are offered what gains by it.
"""

from __future__ import annotations

import ctypes
import os
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import _native, chain, cpu, info, reference
from gohsp_kernels.formats import FORMATS
from gohsp_kernels.testing import Call, Maker, error

from .test_chain import FEATURES, bound, chains, one_by_one

needs_native = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)
checks = pytest.importorskip("gohsp_kernels._checks", reason="the checks module is not built")
every_capability = pytest.mark.parametrize("capability", checks.capabilities())

SUMS = 1e-5
"""Tolerance of one product: its factors are the same numbers, only its sums are rounded otherwise, and may cancel."""

FLIPPED = 2e-3
"""Tolerance of what follows a norm or a softmax: their last bit decides which way a value is rounded."""


def described(x: Tensor, calls: list[Call]) -> Tensor:
    """What a chain of bfloat16 sublayers computes, in float64 but for the rounding of factors."""
    for call in calls:
        x = FORMATS["bfloat16"].reference(chain.descriptor(bound(call)), x, attention=reference.bf16_attention)
    return x


def bf16_chain(calls: list[Call], features: int = FEATURES) -> gk.FrozenChain:
    """As ``frozen(weights="bfloat16")``, on any instruction set."""
    packed = (cpu.pack_sublayer(chain.descriptor(bound(call)), features, "bfloat16") for call in calls)
    return gk.FrozenChain(features, tuple(packed))


def product(capability: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x W^T + b by the kernel; its output array held NaN before."""
    bits = weight.bfloat16().view(torch.uint16).numpy()
    number, scales = _native.numbers("formats")["bfloat16"], np.ones(len(bits), np.float32)
    return torch.from_numpy(checks.product(capability, number, x.numpy(), bits, scales, bias.numpy()))


@every_capability
@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 5, 16, 17, 32, 33, 50]),
    outputs=st.sampled_from([0, 1, 15, 16, 17, 33, 100]),
    inputs=st.sampled_from([0, 1, 2, 31, 32, 33, 64, 387]),
    seed=st.integers(0, 2**31),
)
def test_products(capability: str, rows: int, outputs: int, inputs: int, seed: int) -> None:
    maker = Maker(seed)
    x, weight, bias = maker.normal(rows, inputs), maker.weight(outputs, inputs), maker.normal(outputs)
    truth = reference.bf16_linear(x.double(), weight, bias)
    assert error(product(capability, x, weight, bias), truth) < SUMS


@every_capability
def test_products_of_bfloat16_numbers_are_exact_but_for_their_sum(capability: str) -> None:
    """Integers that fp32 adds without rounding: a wrong pairing or a lost tail of inputs shows in any place."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-8, 9, (n, 77), generator=generator).float() for n in (50, 50))
    bias = torch.arange(50.0)
    assert torch.equal(product(capability, x, weight, bias), x @ weight.T + bias)


ROUNDED = {
    "ties to even": (1.0 + 2.0**-8, 1.0),
    "ties to even, upwards": (1.0 + 3 * 2.0**-8, 1.0 + 2.0**-6),
    "above a tie": (1.0 + 2.0**-8 + 2.0**-23, 1.0 + 2.0**-7),
    "below zero": (-1.0 - 2.0**-8, -1.0),
    "past the largest": (torch.finfo(torch.float32).max, float("inf")),
}


@every_capability
@pytest.mark.parametrize("name", ROUNDED)
def test_rows_are_rounded_to_the_nearest(capability: str, name: str) -> None:
    value, rounded = ROUNDED[name]
    x = torch.zeros(3, 40)
    x[1, 39] = value
    result = product(capability, x, torch.ones(20, 40), torch.zeros(20))
    assert result[1].eq(rounded).all() and result[[0, 2]].eq(0).all()


@every_capability
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_harms_no_other(capability: str, value: float) -> None:
    maker = Maker(2)
    x, weight, bias = maker.normal(13, 61), maker.weight(40, 61), maker.normal(40)
    truth = product(capability, x, weight, bias)
    x[4, 60] = value
    result = product(capability, x, weight, bias)
    expected = reference.bf16_linear(x[4:5].double(), weight, bias)[0]
    assert torch.equal(result[4].isnan(), expected.isnan()) and not torch.isfinite(result[4]).any()
    others = [i for i in range(13) if i != 4]
    assert torch.equal(result[others], truth[others])


@every_capability
def test_every_nan_stays_nan(capability: str) -> None:
    """Also those whose bits are all ones, which an addition would turn into a number."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32)
    result = product(capability, bits.view(torch.float32)[:, None], torch.ones(3, 1), torch.zeros(3))
    assert result.isnan().all()


@every_capability
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_shows_in_its_output_alone(capability: str, value: float) -> None:
    maker = Maker(3)
    x, weight, bias = maker.normal(13, 61), maker.weight(40, 61), maker.normal(40)
    weight[5, 3] = value
    result = product(capability, x, weight, bias)
    assert not torch.isfinite(result[:, 5]).any() and torch.isfinite(result[:, 6:]).all()


@needs_native
@settings(max_examples=40, deadline=None)
@given(calls=chains(), batch=st.sampled_from([0, 1, 2, 5]), tokens=st.sampled_from([1, 7, 40]), data=st.data())
def test_random_chains(calls: list[Call], batch: int, tokens: int, data: st.DataObject) -> None:
    queries = data.draw(st.sampled_from([tokens, 1, 0]))
    x = Maker(batch).normal(batch, tokens, FEATURES)
    result = bf16_chain(calls)(x, num_queries=queries)
    assert error(result, described(x.double(), calls)[:, :queries]) < FLIPPED


def mixed_calls(maker: Maker) -> list[Call]:
    return [
        maker.attention_sublayer(0, 0, FEATURES, [8, 8], [8, 8], 30, 31, **maker.qk_norm(8)),
        maker.mlp_sublayer((0,), FEATURES, 50, 29, 33, activation="silu"),
        maker.attention_sublayer(0, 0, FEATURES, [5, 11, 3], [8, 2, 7]),
        maker.mlp_sublayer((0,), FEATURES, 160),  # its second matrix reads far more than its first
    ]


@needs_native
def test_chain_with_qk_norm_and_close_to_float64() -> None:
    maker = Maker(6)
    calls = mixed_calls(maker)
    x = maker.normal(3, 20, FEATURES)
    result = bf16_chain(calls)(x)
    assert error(result, described(x.double(), calls)) < FLIPPED
    # The rounding must be there, and must be small.
    assert 1e-4 < error(result, one_by_one(x.double(), calls)) < 0.01


@needs_native
def test_forms_of_weights_can_be_mixed_in_a_chain() -> None:
    maker = Maker(11)
    calls = mixed_calls(maker)
    x = maker.normal(3, 20, FEATURES)
    forms = ("bfloat16", "float32", "int8", "bfloat16")
    descriptors = [chain.descriptor(bound(call)) for call in calls]
    packed = [cpu.pack_sublayer(s, FEATURES, form) for s, form in zip(descriptors, forms, strict=True)]
    result = gk.FrozenChain(FEATURES, tuple(packed))(x)
    assert error(result, one_by_one(x.double(), calls)) < 0.05


@needs_native
def test_products_of_torch_between_two_calls_change_nothing() -> None:
    """oneDNN has a tile configuration of its own in the same threads."""
    maker = Maker(12)
    calls = [maker.attention_sublayer(0, 0, FEATURES, [8], [8]), maker.mlp_sublayer((0,), FEATURES, 64)]
    frozen, x, ours = bf16_chain(calls), maker.normal(4, 50, FEATURES), maker.normal(65, 77).bfloat16()
    first, product_before = frozen(x), ours @ ours.T
    for _ in range(3):
        assert torch.equal(ours @ ours.T, product_before)
        assert torch.equal(frozen(x), first)


@needs_native
def test_weights_take_half() -> None:
    maker = Maker(9)
    calls = [maker.attention_sublayer(0, 0, 256, [64] * 2, [64] * 2), maker.mlp_sublayer((0,), 256, 512)]
    attention, mlp = (call.operator for call in calls)
    matrices = (attention.qkv_weight, attention.proj_weight, mlp.fc1_weight, mlp.fc2_weight)
    weights = sum(matrix.numel() for matrix in matrices)
    size = sum(s.panels.nbytes for s in bf16_chain(calls, 256).sublayers)
    assert 2 * weights < size < 2.1 * weights


@needs_native
def test_wrong_arguments_are_refused() -> None:
    values = torch.zeros(3, 4, dtype=torch.bfloat16)
    pack = partial(torch.ops.gohsp_kernels.cpu_pack, format=_native.numbers("formats")["bfloat16"])
    with pytest.raises(RuntimeError, match="weight: wanted bfloat16"):
        pack(values.float(), None, None)
    with pytest.raises(RuntimeError, match="weight: wanted 2 dimensions"):
        pack(values[0], None, None)
    with pytest.raises(RuntimeError, match="bias: wanted 3 elements"):
        pack(values, None, torch.zeros(2))
    with pytest.raises(RuntimeError, match="scales: wanted 0 elements for bfloat16"):
        pack(values, torch.ones(3), None)
    with pytest.raises(RuntimeError, match="format: wanted 0 to 2"):
        torch.ops.gohsp_kernels.cpu_pack(values, None, None, 3)


REFUSED = "needs AMX, or AVX512_BF16 or Arm's BF16 at a gain, for bfloat16 weights; runs on"
OFFERED = ("amx", "avx512bf16", "neonbf16")


def test_support_is_told() -> None:
    support, offered = gk.can_run("cpu", weights="bfloat16"), bool(_native.load()) and cpu.capability() in OFFERED
    assert support.ok == offered
    assert info.bf16_weights() == ("yes" if offered else f"no: {support.reason}")
    assert gk.can_run("reference", weights="bfloat16").reason == "has no bfloat16 weights; the backend 'cpu' has"


@needs_native
def test_a_cpu_that_gains_nothing_refuses_by_name() -> None:
    member = bound(Maker(10).mlp_sublayer((0,), FEATURES, 8))
    if cpu.capability() in OFFERED:
        assert len(gk.SublayerChain([member]).frozen(FEATURES, weights="bfloat16").sublayers) == 1
        return
    with pytest.raises(RuntimeError, match=f"backend 'cpu': {REFUSED} {cpu.capability()}"):
        gk.SublayerChain([member]).frozen(FEATURES, weights="bfloat16")


@needs_native
def test_products_in_vectors_are_chosen_where_they_were_measured_to_pay() -> None:
    gain = _native.function("gohsp_cpu_bfloat16_gain", ctypes.c_double)()
    assert (gain > 0) == ("avx512bf16" in checks.capabilities())
    if "amx" not in checks.capabilities() and "GOHSP_CPU_CAPABILITY" not in os.environ:
        assert (cpu.capability() == "avx512bf16") == (gain >= 1.25)
    reason = FORMATS["bfloat16"].missing("avx512vnni")
    assert reason.startswith(f"{REFUSED} avx512vnni")
    assert (f"AVX512_BF16 here makes products {gain:.2f} times as fast as float32's" in reason) == (gain > 0)


def test_checks_refuse_shapes_that_do_not_fit() -> None:
    x, weight, ones = np.zeros((2, 3), np.float32), np.zeros((4, 5), np.uint16), np.ones(4, np.float32)
    with pytest.raises(ValueError, match="x, weight: wanted"):
        checks.product("scalar", 2, x, weight, ones, ones)
