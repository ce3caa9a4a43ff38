# SPDX-License-Identifier: Apache-2.0
"""Random models under random masks on the CPU kernels: ``python -m tests.attack.numerics SEED COUNT``.

Each model is compared, in every form that this instruction set (``GOHSP_CPU_CAPABILITY``) runs, with the masked dense
model in float64. The bits of a frozen model may depend on neither threads nor the split of a batch, NaN of one image
may not reach another, and what is not finite has to be so in the same elements as in PyTorch's float32. Prints counts,
errors and the cases that failed.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers.activations import GELUTanh, QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp.layers import FrozenEmbedding
from gohsp.masks.mask import FIELDS, ModelMask
from gohsp_kernels import chain, cpu
from gohsp_kernels.descriptors import Sublayer
from gohsp_kernels.formats import FORMATS, ROUNDED

LIMIT = 1e-5
"""Largest error of a well-conditioned model in float32."""
LIMIT_ROUNDED = 5e-3
"""The same in a rounded form, against its description: a bit of a norm decides which way a value is rounded."""
WORSE = 16
"""How many times as large as PyTorch's own error, or as what the last bit of the weights decides, an error may be."""

SCALES = (*[1.0] * 8, 0.0, 1e-40, 1e-30, 1e-6, 30.0, 1e4, 1e10, 1e15)
"""Of the images; denormal numbers and gigantic ones among them. At 1e19 the variance of a row leaves float32, and
PyTorch's LayerNorm gives zeros or NaN, by the row's length."""


class Model:
    """One random case.

    Attributes:
        dense: the model, float32.
        mask: what is kept of it.
        images: a batch.
        tokens: what a first block might read.
        poisoned: the images with NaN in a pixel of the first one.
        about: in words.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.arguments = self._arguments()
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm has opinions on odd options
            self.dense: nn.Module = VisionTransformer(**self.arguments).eval()
        self.kind = self._weights()
        self.mask = self._mask()
        self.scale = self.rng.choice(SCALES)
        side = self.arguments["img_size"]
        self.images = self.scale * self._normal(self.rng.randint(2, 5), 3, side, side)
        shown = {name: getattr(value, "__name__", value) for name, value in self.arguments.items()}
        self.tokens = self._normal(3, self.rng.randint(1, 40), self.arguments["embed_dim"])
        self.poisoned = self.images.clone()
        self.poisoned[0, 1, -1, 0] = float("nan")
        self.about = f"seed {seed}: images x {self.scale}, {self.kind} weights, {shown}"

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def _arguments(self) -> dict[str, Any]:
        rng = self.rng
        heads = rng.randint(1, 5)
        patch = rng.choice([4, 5, 8])
        class_token = rng.random() < 0.7
        pools = ["avg", "avgmax", "max", "map", ""] + ["token"] * 4 * class_token
        pool = rng.choice(pools)
        return {
            "img_size": patch * rng.randint(1, 5),
            "patch_size": patch,
            "num_classes": rng.choice([0, 1, 7, 33]),
            "embed_dim": heads * rng.choice([2, 4, 8, 10, 16, 22]),
            "depth": rng.randint(1, 4),
            "num_heads": heads,
            "mlp_ratio": rng.choice([0.5, 1.3, 2.0, 4.0]),
            "global_pool": pool,
            "class_token": class_token,
            "reg_tokens": rng.choice([0, 0, 1, 4]),
            "pos_embed": rng.choice(["learn", "learn", "none"]),
            "no_embed_class": rng.random() < 0.3,
            "pre_norm": rng.random() < 0.2,
            "final_norm": rng.random() < 0.8,
            "fc_norm": rng.choice([None, True, False]),
            "qkv_bias": rng.random() < 0.7,
            "proj_bias": rng.random() < 0.8,
            "qk_norm": rng.random() < 0.25,
            "init_values": rng.choice([None, 1e-5, 1.0]),
            "norm_layer": partial(nn.LayerNorm, eps=rng.choice([1e-6, 1e-5, 1e-3, 0.5, 1e-12])),
            "act_layer": rng.choice([nn.GELU, nn.GELU, GELUTanh, nn.ReLU, nn.SiLU, QuickGELU]),
            "dynamic_img_size": rng.random() < 0.2,
        }

    def _weights(self) -> str:
        """Draw all parameters anew, so that every term weighs in, and tell in which way they are odd."""
        kind = self.rng.choice(["usual"] * 6 + ["huge scores", "tiny", "uneven", "equal tokens"])
        with torch.no_grad():
            for name, parameter in self.dense.named_parameters():
                noise = self._normal(*parameter.shape)
                if parameter.dim() >= 2 and parameter.shape[0] > 1:
                    parameter.copy_(noise * parameter[0].numel() ** -0.5)
                else:
                    factor = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
                    parameter.copy_(0.3 * noise + factor)
                if kind == "huge scores" and "qkv.weight" in name:
                    parameter.mul_(self.rng.choice([10.0, 100.0, 1e4]))
                if kind == "tiny" and parameter.dim() == 2 and self.rng.random() < 0.5:
                    parameter.mul_(self.rng.choice([1e-20, 1e-38, 1e-42]))
                if kind == "uneven" and parameter.dim() == 2:
                    parameter[:, self.rng.randrange(parameter.shape[1])] *= 100
                if kind == "equal tokens" and name == "pos_embed":
                    parameter.zero_()
        return kind

    def _mask(self) -> ModelMask:
        rng = self.rng
        qk_norm = self.arguments["qk_norm"]
        shares = {name: rng.choice([0.05, 0.3, 0.6, 0.9, 1.0, 1.0]) for name in FIELDS}
        if qk_norm:
            del shares["qk"]
        mask = ModelMask.random(self.dense, shares, self.generator)
        for block in mask.blocks:
            for name in FIELDS:
                kept = getattr(block, name)
                if rng.random() < 0.8 or (qk_norm and name == "qk"):
                    continue
                row = kept if kept.dim() == 1 else kept[rng.randrange(len(kept))]  # of one head, where there are heads
                row.fill_(rng.random() < 0.3)
                if rng.random() < 0.5:
                    row[rng.randrange(len(row))] = True
        return mask


def shaken(x: Tensor, generator: torch.Generator, by: float) -> Tensor:
    """Numbers in float64 that differ by a share of theirs, drawn anew for each."""
    return x * (1 + by * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))


def jittered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rows in float64, off by what float32 loses of them before they are rounded: a share of their largest number."""
    if x.shape[-1] == 0:
        return x
    return x + x.abs().amax(-1, keepdim=True) * (shaken(torch.ones_like(x), generator, 2**-22) - 1)


def round_otherwise_(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Change the weights of a model in float64, in place, to what might have become the same in float32."""
    for parameter in model.parameters():
        parameter.copy_(shaken(parameter, generator, 2**-24))
    return model


def pytorch_error(model: nn.Module, images: Tensor, generator: torch.Generator) -> float:
    """Error of PyTorch in float32 on a model in float64 whose weights are changed in their last bit."""
    other = round_otherwise_(copy.deepcopy(model), generator).float()
    return error(other(images), copy.deepcopy(other).double()(images.double()))


class Described(nn.Sequential):
    """Blocks of a compressed model in a rounded form as plain PyTorch describes it, on activations in float64.

    Args:
        blocks: compact ones.
        form: name of the format.

    Attributes:
        generator: of :func:`jittered`, for what is rounded; None leaves that as it is.
    """

    def __init__(self, blocks: Any, form: str) -> None:
        super().__init__(nn.Identity())  # one that is there, as the model's forward asks
        forms = [form] * (len(blocks) - 1) + [form_of_ends(form)]
        bound = [(s, of) for block, of in zip(blocks, forms, strict=True) for s in block.sublayers()]
        self.sublayers = [(chain.descriptor(sublayer), of) for sublayer, of in bound]
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        for sublayer, form in self.sublayers:
            x = self._through(sublayer, form, x)
        return x[:, :num_queries]

    def _through(self, sublayer: Sublayer, name: str, x: Tensor) -> Tensor:
        form, generator, attention = FORMATS[name], self.generator, cpu.reference_attention(name)
        if generator is None:
            return form.reference(sublayer, x, cpu.activation_levels(), attention)
        linear = lambda x, *rest, **levels: form.linear(jittered(x, generator), *rest, **levels)  # noqa: E731
        return replace(form, linear=linear).reference(
            sublayer,
            x,
            cpu.activation_levels(),
            lambda heads, qkv, queries: attention(heads, jittered(qkv, generator), queries),
        )


class DescribedPatches(nn.Module):
    """The convolution of a patch embedding in a rounded form, in plain PyTorch.

    Args:
        projection: of patches that lie side by side.
        form: name of the format.
    """

    def __init__(self, projection: Any, form: str) -> None:
        super().__init__()
        self.projection, self.form = projection, FORMATS[form]

    def forward(self, images: Tensor) -> Tensor:
        weight, bias, size = self.projection.weight, self.projection.bias, self.projection.kernel_size
        rows = nn.functional.unfold(images, size, stride=size).mT
        patches = self.form.linear(rows, weight.flatten(1), bias, levels=cpu.activation_levels())
        return patches.mT.unflatten(-1, (images.shape[2] // size[0], -1))


def form_of_ends(form: str) -> str:
    """Format of the last block and of a packed patch embedding."""
    return next(name for name in FORMATS[form].ends if gk.can_run("cpu", weights=name))


def error(result: Tensor, truth: Tensor) -> float:
    """Norm of the difference relative to that of the truth, over the elements that are finite in both."""
    finite = result.isfinite() & truth.isfinite()
    if not finite.any():
        return 0.0
    difference = (result.double() - truth.double())[finite].norm()
    return float(difference / truth[finite].double().norm().clamp_min(1e-30))


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results have equal bits, NaN for NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def same_kinds(a: Tensor, b: Tensor) -> bool:
    """Whether the same elements are NaN, infinite and finite."""
    return same(a - a, b - b) and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isposinf(), b.isposinf())


class Sweep:
    """Counts, errors by form, and what failed."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.errors: dict[str, list[float]] = {}
        self.shares: dict[str, list[float]] = {}
        self.faults: list[str] = []

    def expect(self, holds: bool, what: str, model: Model) -> None:
        self.counts[what.split(":")[0]] += 1
        if not holds:
            self.faults.append(f"{what}; {model.about}")

    def judge(self, form: str, result: Tensor, truth: Tensor, noise: float, limit: float, model: Model) -> None:
        found = error(result, truth)
        self.errors.setdefault(form, []).append(found)
        self.shares.setdefault(form, []).append(found / max(limit, WORSE * noise))
        self.expect(found <= max(limit, WORSE * noise), f"error: {form} {found:.2e}, noise {noise:.2e}", model)

    def run(self, model: Model) -> None:
        """All checks of one model."""
        images, poisoned = model.images, model.poisoned
        masked = model.mask.apply_(copy.deepcopy(model.dense))
        small = gohsp.compress(model.dense, model.mask)
        plain = gohsp.densify(small)
        exact = copy.deepcopy(masked).double()
        truth = exact(images.double())
        others = [masked(images), *(round_otherwise_(exact, model.generator)(images.double()) for _ in range(2))]
        noise = max(error(other, truth) for other in others)
        in_pytorch, with_nan = plain(images), plain(poisoned)
        worst = max(error(in_pytorch, truth), error(small(images), truth))
        if worst > max(LIMIT, WORSE * noise):
            # One model in PyTorch may be lucky in what its last bits decide, such as a norm of two near numbers.
            noise = max(noise, *(pytorch_error(exact, images, model.generator) for _ in range(10)))
        self.judge("densified", in_pytorch, truth, noise, LIMIT, model)
        for name, form in {"compressed": small, "frozen float32": gohsp.freeze(small)}.items():
            result, beside_nan = form(images), form(poisoned)
            self.judge(name, result, truth, noise, LIMIT, model)
            self.expect(same_kinds(result, in_pytorch), f"not finite: {name}", model)
            self.expect(same_kinds(beside_nan, with_nan), f"not finite: {name}, of an image with NaN", model)
            self.bits(name, form, result, beside_nan, model)
        described: Any = copy.deepcopy(small).double()
        for weights in ROUNDED:
            if not gk.can_run("cpu", weights=weights):
                continue
            name, form = f"frozen {weights}", gohsp.freeze(small, weights=weights)
            described.blocks = Described(small.blocks, weights)
            if isinstance(form.patch_embed, FrozenEmbedding):
                projection = copy.deepcopy(small.patch_embed.proj).double()
                described.patch_embed.proj = DescribedPatches(projection, form_of_ends(weights))
            wanted = described(images.double())
            described.blocks.generator = model.generator
            result, beside_nan = form(images), form(poisoned)
            # A value that lies at a tie shows in few draws: only where they are needed there are many.
            draws = 2 if error(result, wanted) <= LIMIT_ROUNDED else 40
            ties = max(error(described(images.double()), wanted) for _ in range(draws))
            self.judge(name, result, wanted, max(noise, ties), LIMIT_ROUNDED, model)
            self.errors.setdefault(f"{name}, against the dense model", []).append(error(result, truth))
            self.expect(bool(result.isfinite().all()) or not truth.isfinite().all(), f"not finite: {name}", model)
            self.bits(name, form, result, beside_nan, model)

    def bits(self, name: str, form: Any, result: Tensor, beside_nan: Tensor, model: Model) -> None:
        """What the bits of a result may not depend on."""
        self.expect(same(beside_nan[1:], result[1:]), f"NaN of another image: {name}", model)
        x = model.images
        # PyTorch's own products go by threads and batch: those around the blocks that are not frozen, and "map".
        if name == "compressed":
            form, x = form.blocks, model.tokens
        elif model.arguments["global_pool"] == "map":
            form = form.forward_features
        result = form(x)
        with threads(2):
            self.expect(same(form(x), result), f"threads: {name}", model)
        self.expect(same(torch.cat([form(x[:1]), form(x[1:])]), result), f"split batch: {name}", model)

    def told(self) -> dict[str, Any]:
        def summary(values: list[float]) -> dict[str, float]:
            found = torch.tensor(values, dtype=torch.float64)
            return {
                "median": float(found.quantile(0.5)),
                "p99": float(found.quantile(0.99)),
                "worst": float(found.max()),
            }

        return {
            "checks": dict(self.counts),
            "errors": {form: summary(values) for form, values in self.errors.items()},
            "shares of the limit": {form: summary(values) for form, values in self.shares.items()},
            "faults": self.faults,
        }


@torch.no_grad()
def main(seed: int, count: int) -> None:
    sweep = Sweep()
    for i in range(count):
        sweep.run(Model(1_000_000 * seed + i))
    print(json.dumps({"capability": cpu.capability(), "models": count, **sweep.told()}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
