# SPDX-License-Identifier: Apache-2.0
"""What is timm's Hiera alone: mask units, blocks that stay as they are, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.hiera import Hiera, HieraBlock, MaskUnitAttention
from torch import nn

import gohsp
import gohsp_kernels as gk
from gohsp.layers import PrunedBlock
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import family_of, open_model
from tests.gohsp.models.zoo import HIERA, ZOO, difference, images, make

HIERAS = [name for name in ZOO if name.startswith("Hiera")]
EACH = pytest.mark.parametrize("name", HIERAS)
needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


def pair(name: str = HIERAS[0]) -> tuple[Any, Any]:
    """The masked dense model and the compressed one, in float64."""
    model = make(name)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


def test_mask_units_are_an_order_of_tokens() -> None:
    model = make(HIERAS[0])
    opened = open_model(model).blocks
    assert [None if own.attention.windows is None else own.attention.windows.order.shape for own in opened] == [
        *[(4, 16)] * 2,
        *[(4, 4)] * 2,
        None,
    ]
    for own in opened:
        block, half = own.module, own.attention
        x = torch.randn(3, 64 if half.geometry.dim == 24 else 16, half.geometry.dim, dtype=torch.float64)
        with torch.no_grad():
            assert difference(half(x), x + block.ls1(block.attn(block.norm1(x)))) < 1e-12
        if half.windows is not None:
            assert torch.equal(half.windows.join(half.windows.split(x)), x)


@EACH
def test_what_pools_or_changes_the_width_stays(name: str) -> None:
    model, small = pair(name)
    kinds = [type(block) is HieraBlock for block in small.blocks]
    assert kinds == [block.attn.q_stride > 1 or block.dim != block.dim_out for block in model.blocks] and any(kinds)
    for ours, theirs in zip(small.blocks, model.blocks, strict=True):
        if isinstance(ours, HieraBlock):
            assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
        else:
            assert isinstance(ours, PrunedBlock)
    summary = ModelMask.full(model).summary(model)
    staying = [f"blocks.{index}" for index, stays in enumerate(kinds) if stays]
    told = [line for line in summary.splitlines() if line.startswith("as it is: ")]
    assert told == [f"as it is: {block} (its queries are pooled)" for block in staying]
    opened = open_model(model)
    entered = [block.attention.transition is not None for block in opened.blocks]
    assert sum(entered) == sum(kinds) - len(opened.family.behind(model))  # type: ignore[attr-defined]
    seen = {(own.geometry.dim, *of) for own, of in zip(opened.blocks, gohsp.count(model).attended, strict=True)}
    assert seen <= {(24, 64, 16), (48, 16, 4), (96, 4, 4)}


@EACH
def test_masks_of_units_and_features_are_as_of_the_dense_model(name: str) -> None:
    masked, small = pair(name)
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    with torch.no_grad():
        assert difference(small(images(), mask=mask), masked(images(), mask=mask)) < 1e-12
        assert difference(gohsp.densify(small)(images(), mask=mask), masked(images(), mask=mask)) < 1e-12
        for ours, theirs in zip(
            small.forward_intermediates(images(), intermediates_only=True),
            masked.forward_intermediates(images(), intermediates_only=True),
            strict=True,
        ):
            assert difference(ours, theirs) < 1e-12


@needs_cpu
@EACH
def test_frozen_in_every_format(name: str) -> None:
    masked, small = pair(name)
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[:, 1] = False
    with torch.no_grad():
        wanted, of_units = masked(images()), masked(images(), mask=mask)
    for weights, most in (("float32", 1e-5), ("int8", 0.05)):
        result = gohsp.freeze(copy.deepcopy(small).float(), weights=weights)
        assert isinstance(result, Hiera)
        assert difference(result(images().float()), wanted) < most
        assert difference(result(images().float(), mask=mask), of_units) < most


@EACH
def test_in_training_it_is_the_masked_one(name: str) -> None:
    masked, small = pair(name)
    x = [images(4).requires_grad_() for _ in range(2)]
    for model, given in zip((masked.train(), small.train()), x, strict=True):
        torch.manual_seed(0)
        model.patch_drop_rate = 0.5  # units
        model(given).square().sum().backward()
    assert difference(x[1].grad, x[0].grad) < 1e-12


def test_a_path_is_dropped_for_an_image_and_not_for_a_unit() -> None:
    model = timm.create_model("hiera_tiny_224", **HIERA, drop_path_rate=0.5).double().train()
    small = gohsp.compress(model, ModelMask.full(model))
    x = torch.randn(64, 16, 48, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(0)
        ours = small.blocks[4](x)
        torch.manual_seed(0)
        theirs = model.blocks[4](x)
    assert difference(ours, theirs) < 1e-12
    kept = (ours != x).flatten(1).any(dim=1)
    assert kept.any() and not kept.all()


def test_it_is_pruned_by_every_way_that_looks_at_one_block_at_a_time() -> None:
    model, x = make(HIERAS[0]), images(6)
    for method, options in (("gohsp", {"refine": 2}), ("taylor", {}), ("learned", {})):
        result = gohsp.prune(model, [x], {"macs": 0.8}, method, **options)
        assert result.report.pruned.macs <= 0.8 * result.report.dense.macs
        with torch.no_grad():
            assert difference(gohsp.compress(result.model, result.mask)(x), result.model(x)) < 1e-10
    with pytest.raises(ValueError, match="method: wanted one that looks at one block at a time"):
        gohsp.prune(model, [x], {"macs": 0.8}, "graph")


def test_single_blocks_are_replaced_in_models_of_other_classes() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = make(HIERAS[0]).blocks[:2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside[1](self.inside[0](x))

    other, x = Other(), torch.randn(2, 64, 24, dtype=torch.float64)
    fast = gohsp.accelerate(other)
    assert not any(type(part) is HieraBlock for part in fast.modules())
    with torch.no_grad():
        assert difference(fast(x), other(x)) < 1e-12
    with pytest.raises(ValueError, match="block: cannot prune it: its queries are pooled"):
        gohsp.BlockMask.of_block(make(HIERAS[0]).blocks[2])


@pytest.mark.slow
@EACH
def test_compiled_it_is_the_same(name: str) -> None:
    masked, small = pair(name)
    with torch.no_grad():
        assert difference(torch.compile(small, backend="aot_eager")(images()), masked(images())) < 1e-12


@pytest.mark.slow
def test_it_learns_from_the_dense_models_stream() -> None:
    pytest.importorskip("accelerate")
    model = make(HIERAS[0]).float()
    data = [(image.float(), index % 5) for index, image in enumerate(images(6))]
    small = gohsp.compress(model, ModelMask.random(model, 0.7, torch.Generator().manual_seed(2)))
    fit, distill = gohsp.Fit(epochs=1, batch_size=2), gohsp.Distillation(features=1.0)
    trained = gohsp.train(small, data, fit=fit, distill=distill, teacher=model)
    assert all(torch.isfinite(parameter).all() for parameter in trained.model.parameters())


def test_what_cannot_be_pruned_exactly_is_refused() -> None:
    class Other(MaskUnitAttention):
        pass

    model = make(HIERAS[0])
    model.blocks[3].attn.__class__ = Other
    with pytest.raises(ValueError, match=r"prune blocks\.3: attn is Other; wanted timm's MaskUnitAttention"):
        ModelMask.full(model)
    wide = timm.create_model("hiera_tiny_224", **{**HIERA, "q_pool": 1, "mask_unit_attn": (True, False, False)})
    assert [block.attn.q_stride for block in wide.blocks] == [1, 1, 4, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="block: cannot prune it: it changes the width from 48 to 96"):
        gohsp.BlockMask.of_block(wide.blocks[5])
    x, wide = images(), wide.double().eval()
    with torch.no_grad():
        assert difference(gohsp.accelerate(wide).forward_features(x), wide.forward_features(x)) < 1e-12
    of_time = {"img_size": (4, 16, 16), "patch_kernel": (3, 3, 3), "patch_stride": (2, 2, 2)}
    of_time |= {"patch_padding": (1, 1, 1), "q_stride": (1, 2, 2), "mask_unit_size": (1, 4, 4), "sep_pos_embed": True}
    with pytest.raises(ValueError, match="model: wanted one of images, got one of 3 dimensions"):
        ModelMask.full(Hiera(**{**HIERA, **of_time}))
    with pytest.raises(ValueError, match=r"wanted \(32, 32\), which the positions are made for, got \(64, 64\)"):
        gohsp.count(make(HIERAS[0]), (64, 64))
    assert family_of(model).image_shape(model) == (3, 32, 32)
