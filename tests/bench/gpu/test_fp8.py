# SPDX-License-Identifier: Apache-2.0
"""Products in fp8, imitated: the format's numbers, scales, sums, and that all of a model's products are taken."""

from __future__ import annotations

import pytest
import torch

from bench.gpu import fp8
from bench.harness import cases
from gohsp_kernels.testing import error


def test_numbers_of_e4m3_stay_and_others_go_to_the_nearest() -> None:
    grid = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()]
    assert grid.max() == fp8.LARGEST["fp8"] and len(grid) == 127
    units, scale = fp8.rounded(grid[None], "fp8")
    assert torch.equal(units, grid[None]) and scale.item() == 1
    between = (grid[60:90] * 0.75 + grid[61:91] * 0.25)[None]
    units, scale = fp8.rounded(torch.cat([between, torch.tensor([[448.0]])], 1), "fp8")
    assert scale.item() == 1 and torch.equal(units[0, :-1], grid[60:90])


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_each_row_has_the_scale_of_its_largest_number(form: str) -> None:
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[2] *= 1000
    x[3] = 0
    units, scale = fp8.rounded(x, form)
    assert units[[0, 1, 2, 4]].abs().amax(1).tolist() == [fp8.LARGEST[form]] * 4
    assert error(units * scale, x) < (0.03 if form == "fp8" else 0.01) and not units[3].any()


def test_sums_are_cut_where_they_have_more_bits() -> None:
    x = torch.tensor([1.0, -1.0, 3 + 2**-14, 2**14 + 1.5, 0.0], dtype=torch.float64)
    assert fp8.cut(x).tolist() == [1.0, -1.0, 3.0, 2**14, 0.0]
    ones, weight = torch.ones(1, 512, dtype=torch.float64), torch.ones(3, 512, dtype=torch.float64)
    assert fp8.cut_sums(ones, weight, 128).tolist() == [[512.0] * 3]
    weight[:, ::32] = 0
    weight[:, 0] = 2.0**15  # beside which 14 bits are steps of 4: of the 31 of a step 28 stay
    assert fp8.cut_sums(ones, weight, 2**30)[0, 0] == 2**15 + 16 * 28
    assert fp8.cut_sums(ones, weight, 128)[0, 0] == 2**15 + 4 * 28 + 12 * 31


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_a_group_of_columns_has_its_own_scale(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 300, dtype=torch.float64, generator=generator) for n in (4, 6))
    one = fp8.scaled_by_group(form, x[:, :100], weight[:, :100])
    assert torch.allclose(one, fp8.scaled(form, x[:, :100], weight[:, :100]), rtol=1e-12)
    x[:, :128] *= 1e6  # beside which the others are nothing, but in groups of their own
    weight[:, :128] = 0
    found, truth = fp8.scaled_by_group(form, x, weight), x @ weight.t()
    assert error(found, truth) < 0.05 < error(fp8.scaled(form, x, weight), truth)


@pytest.mark.slow
def test_all_products_of_a_model_are_taken() -> None:
    work = cases.load(cases.Case("deit_tiny_patch16_224", "2x96", image_size=32))
    images, taken = work.images(2), []

    def product(name: str) -> fp8.Product:
        def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            taken.append(name)
            return x @ weight.t()

        return multiply

    with torch.no_grad():
        model = fp8.with_products(work.dense, (product("first"), product("proj")))
        found = model.forward_features(images.double())
        assert error(found, work.dense.double().forward_features(images.double())) < 1e-12
    assert taken == ["first", "proj", "first", "first"] * 12
    errors = dict(fp8.errors(work.dense.float(), images))
    assert list(errors) == list(fp8.FORMS)
    assert 0 < errors["float16"] < errors["bfloat16"] < errors["int8"] < errors["fp8"] < 0.2
