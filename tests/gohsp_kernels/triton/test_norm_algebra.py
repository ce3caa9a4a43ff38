# SPDX-License-Identifier: Apache-2.0
"""Why LayerNorm is applied to the accumulator: the numbers behind the head of gohsp_kernels/triton/linear.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gohsp_kernels.testing import error
from gohsp_kernels.triton.linear import PackedLinear
from gohsp_kernels.triton.packing import pack_linear

pytestmark = pytest.mark.interpreter

FEATURES = 384
OFFSETS = [0.0, 1.0, 30.0, 1000.0]
"""Mean over standard deviation of a row. In a ViT's residual stream it is below 1."""


def rows(offset: float, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(48, FEATURES, generator=generator) + offset).to(dtype)


def weights(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # Sums of rows are far from zero, so that an error in the mean shows.
    return ((torch.randn(64, FEATURES, generator=generator) + 0.5) / FEATURES**0.5).to(dtype)


def truth(x: Tensor, weight: Tensor) -> Tensor:
    return F.layer_norm(x.double(), (FEATURES,)) @ weight.double().T


def packed(weight: Tensor) -> PackedLinear:
    return pack_linear(weight, None, weight.dtype, features=FEATURES, out_features=64, norm_eps=1e-5)


def tf32(x: Tensor) -> Tensor:
    """Rounded to the 10 bits of mantissa that a tf32 tensor core keeps."""
    bits = x.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("offset", OFFSETS)
def test_float16_is_better_than_normalising_first(offset: float) -> None:
    x, weight = rows(offset, torch.float16), weights(torch.float16)
    expected = truth(x, weight)
    first = F.layer_norm(x.float(), (FEATURES,)).half().double() @ weight.double().T
    # The kernel's own output is rounded to float16, which both would pay: a float32 output shows the product alone.
    out = torch.empty(len(x), 64)
    packed(weight)(x, out=out)
    found, of_first = error(out, expected), error(first, expected)
    if offset <= 30:
        assert found < 1e-4 and found < of_first / 5
    else:  # here the accumulator's roundings, of sums a thousand times the result, reach what the other way pays always
        assert found < 2e-3


@pytest.mark.slow
@pytest.mark.parametrize("offset", OFFSETS)
def test_float32_does_not_lose_digits_with_the_mean(offset: float) -> None:
    x, weight = rows(offset, torch.float32), weights(torch.float32)
    assert error(packed(weight)(x), truth(x, weight)) < 2e-6


@pytest.mark.parametrize("offset", OFFSETS)
def test_tf32_needs_the_pivot(offset: float) -> None:
    """The interpreter has no tf32, so its rounding is imitated: with the kernel's pivot it costs no more than usual."""
    x, weight = rows(offset, torch.float32), weights(torch.float32)
    expected, rounded = truth(x, weight), tf32(weight).double()
    mean, std = x.double().mean(1, keepdim=True), x.double().std(1, correction=0, keepdim=True)
    pivot = x[:, :32].mean(1, keepdim=True)

    def product(p: Tensor) -> Tensor:
        return (tf32(x - p).double() @ rounded.T - (mean - p) * rounded.sum(1)) / std

    assert error(product(pivot), expected) < 5e-4
    if offset >= 30:
        assert error(product(torch.zeros_like(pivot)), expected) > 5e-3


def test_outliers_in_the_pivot_do_not_spoil_the_variance() -> None:
    """The worst row for a pivot of the first 32 features: they alone are far from the rest."""
    x = rows(0.0, torch.float32)
    x[:, :32] += 1000.0
    weight = weights(torch.float32)
    assert error(packed(weight)(x), truth(x, weight)) < 5e-6


def test_row_sums_are_those_of_the_rounded_weights() -> None:
    weight = weights(torch.float32)
    sums = packed(weight.half()).row_sum
    assert sums is not None
    assert torch.equal(sums, weight.half().double().sum(1).float())
    assert not torch.equal(sums, weight.double().sum(1).float())


def test_equal_features_give_the_bias() -> None:
    """Variance zero: the norm is 0 / sqrt(eps), not the rounding noise of a cancelled sum divided by it."""
    weight, bias = weights(torch.float32), torch.arange(64.0)
    linear = pack_linear(weight, bias, weight.dtype, features=FEATURES, out_features=64, norm_eps=1e-6)
    result = linear(torch.full((5, FEATURES), 3.7))
    assert (result - bias).abs().max() < 1e-2
