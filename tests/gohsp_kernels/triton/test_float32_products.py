# SPDX-License-Identifier: Apache-2.0
"""float32 as three products of tf32: when it is chosen, and how exact it is.

The interpreter multiplies float32 in full whatever it is told, so the products are imitated here as Triton lowers them:
for each step of depth the operands' rests meet the other operand's rounding, then the roundings meet, in one
accumulator that begins at zero; a float32 addition adds it to the sum of the steps before.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gohsp_kernels.gpu_check import tf32
from gohsp_kernels.testing import PRECISIONS
from gohsp_kernels.triton import _launch, config
from gohsp_kernels.triton._launch import dot_precision

STEP, DEPTH_OF_AN_INSTRUCTION = 32, 8
GPU = torch.device("cuda", 0)
LIMIT = PRECISIONS["float32"][1]


def bits_masked(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """To the 10 bits of mantissa of tf32, ties away from zero: cvt.rna.tf32.f32."""
    return bits_masked((x.view(torch.int32) + 0x1000).view(torch.float32))


def cut(x: Tensor) -> Tensor:
    """What a tensor core reads of a float32 operand that nobody rounded."""
    return bits_masked(x)


def towards_zero(x: Tensor) -> Tensor:
    """float64 to float32."""
    near = x.float()
    return torch.where(near.double().abs() > x.abs(), near.nextafter(torch.zeros_like(near)), near)


def tensor_core(a: Tensor, b: Tensor, acc: Tensor) -> Tensor:
    """acc + a @ b as the least exact tensor core would do it: of each term only what the largest has bits for."""
    for k in range(0, a.shape[1], DEPTH_OF_AN_INSTRUCTION):
        part = slice(k, k + DEPTH_OF_AN_INSTRUCTION)
        terms = torch.cat([acc.double()[None], torch.einsum("mk,kn->kmn", a[:, part].double(), b[part].double())])
        unit = torch.exp2(terms.abs().amax(0).clamp_min(1e-30).log2().floor() - 23)
        acc = towards_zero((terms / unit).trunc().sum(0) * unit)
    return acc


def product(a: Tensor, b: Tensor, three: bool) -> Tensor:
    total = torch.zeros(a.shape[0], b.shape[1])
    for k in range(0, a.shape[1], STEP):
        x, w = a[:, k : k + STEP], b[k : k + STEP]
        x_big, w_big = rounded(x), rounded(w)
        acc = torch.zeros_like(total)
        if three:
            acc = tensor_core(cut(x - x_big), w_big, acc)
            acc = tensor_core(x_big, cut(w - w_big), acc)
        total = total + tensor_core(x_big, w_big, acc)
    return total


def error(a: Tensor, b: Tensor, three: bool) -> float:
    truth = a.double() @ b.double()
    return float((product(a, b, three).double() - truth).norm() / truth.norm())


# Features and neurons of DeiT-Tiny to ViT-Large, and the rows that one program of the weight's gradient may sum.
@pytest.mark.parametrize("depth", [192, 1536, 4096])
@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_three_products_are_as_exact_as_float32_must_be(depth: int, mean: float) -> None:
    generator = torch.Generator().manual_seed(depth)
    a = torch.randn(12, depth, generator=generator) + mean
    b = torch.randn(depth, 12, generator=generator) + mean
    assert error(a, b, three=True) < LIMIT / 10
    if mean == 0:
        assert error(a, b, three=False) > 10 * LIMIT  # one product is not


def test_the_imitation_rounds_as_ptx_does() -> None:
    ulp = 2.0**-10
    x = torch.tensor([1 + ulp / 2, 1 + ulp / 2 - 2.0**-23, -1 - ulp / 2, 1.0])
    assert rounded(x).tolist() == [1 + ulp, 1.0, -1 - ulp, 1.0]
    assert cut(x).tolist() == [1.0, 1.0, -1.0, 1.0]
    assert towards_zero(torch.tensor([1 + 2.0**-24 + 2.0**-30], dtype=torch.float64)).item() == 1.0


@pytest.mark.parametrize(
    ("vendor", "arch", "expected"), [("cuda", 80, "tf32x3"), ("cuda", 120, "tf32x3"), ("hip", "gfx942", "ieee")]
)
def test_precision_of_a_product(vendor: str, arch: int | str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = config.Target(vendor, arch, 100)
    monkeypatch.setattr(_launch.Target, "of", lambda _: target)
    assert dot_precision(torch.float32, GPU) == expected
    assert dot_precision(torch.float16, GPU) == dot_precision(torch.bfloat16, GPU) == "ieee"
    with tf32(True):
        assert dot_precision(torch.float32, GPU) == "tf32"
        assert dot_precision(torch.float16, GPU) == "ieee"
