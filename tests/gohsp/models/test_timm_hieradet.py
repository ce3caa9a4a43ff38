# SPDX-License-Identifier: Apache-2.0
"""What is timm's HieraDet (SAM 2) alone: windows that go beyond a map, blocks that stay, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.hieradet_sam2 import HieraDet, MultiScaleAttention, MultiScaleBlock

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import open_model
from tests.gohsp.models.zoo import HIERADET, ZOO, difference, images, make

NAMES = [name for name in ZOO if name.startswith("SAM 2")]
EACH = pytest.mark.parametrize("name", NAMES)
needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


def pair(name: str = NAMES[0]) -> tuple[Any, Any]:
    """The masked dense model and the compressed one, in float64."""
    model = make(name)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


@EACH
def test_windows_are_timms_and_what_pools_stays(name: str) -> None:
    model, small = pair(name)
    kinds = [type(block) is MultiScaleBlock for block in small.blocks]
    assert kinds == [block.q_stride is not None for block in model.blocks] and any(kinds)
    for own in open_model(model).blocks:
        block, half = own.module, own.attention
        side = {24: 8, 48: 4, 96: 2}[half.geometry.dim]
        x = torch.randn(3, side, side, half.geometry.dim, dtype=torch.float64)
        with torch.no_grad():
            assert difference(own(x.flatten(1, 2)), block(x).flatten(1, 2)) < 1e-12


@EACH
def test_windows_that_go_beyond_the_map_of_another_image(name: str) -> None:
    masked, small = pair(name)
    x = torch.randn(2, 3, 48, 80, dtype=torch.float64)  # maps of (12, 20), (6, 10) and (3, 5) tokens
    with torch.no_grad():
        assert difference(small(x), masked(x)) < 1e-12
        assert difference(gohsp.densify(small)(x), masked(x)) < 1e-12


@needs_cpu
def test_frozen_in_every_format() -> None:
    masked, small = pair()
    with torch.no_grad():
        wanted = masked(images())
    for weights, most in (("float32", 1e-5), ("int8", 0.05)):
        result = gohsp.freeze(copy.deepcopy(small).float(), weights=weights)
        assert isinstance(result, HieraDet)
        assert difference(result(images().float()), wanted) < most
    with pytest.raises(ValueError, match=r"wanted a map that windows of \(2, 2\) divide, because the model is frozen"):
        result(torch.randn(1, 3, 48, 80))


@EACH
def test_in_training_it_is_the_masked_one(name: str) -> None:
    masked, small = pair(name)
    x = [images(3).requires_grad_() for _ in range(2)]
    for model, given in zip((masked.train(), small.train()), x, strict=True):
        model(given).square().sum().backward()
    assert difference(x[1].grad, x[0].grad) < 1e-12


def test_a_path_is_dropped_for_an_image_and_not_for_a_window() -> None:
    model = timm.create_model("sam2_hiera_tiny", **HIERADET, drop_path_rate=0.5).double().train()
    small = gohsp.compress(model, ModelMask.full(model))
    for side in (4, 5):
        x = torch.randn(64, side, side, 48, dtype=torch.float64)
        with torch.no_grad():
            torch.manual_seed(0)
            ours = small.blocks[5](x)
            torch.manual_seed(0)
            theirs = model.blocks[5](x)
        assert difference(ours, theirs) < 1e-12


def test_single_blocks_are_replaced_in_models_of_other_classes() -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = make(NAMES[0]).blocks[:2]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside[1](self.inside[0](x))

    other, x = Other(), torch.randn(2, 8, 6, 24, dtype=torch.float64)
    with torch.no_grad():
        assert difference(gohsp.accelerate(other)(x), other(x)) < 1e-12


def test_what_cannot_be_pruned_exactly_is_refused() -> None:
    class Other(MultiScaleAttention):
        pass

    model = make(NAMES[0])
    with pytest.raises(ValueError, match="block: cannot prune it: its queries are pooled"):
        gohsp.BlockMask.of_block(model.blocks[2])
    with pytest.raises(ValueError, match=r"wanted \(32, 32\), which timm recorded of the model, got \(64, 64\)"):
        gohsp.count(model, (64, 64))
    model.blocks[1].attn.__class__ = Other
    with pytest.raises(ValueError, match=r"prune blocks\.1: attn is Other; wanted timm's MultiScaleAttention"):
        ModelMask.full(model)
    wide = timm.create_model("sam2_hiera_tiny", **{**HIERADET, "q_pool": 1})
    with pytest.raises(ValueError, match="block: cannot prune it: it changes the width from 48 to 96"):
        gohsp.BlockMask.of_block(wide.blocks[6])
    odd = timm.create_model("sam2_hiera_tiny", **{**HIERADET, "pretrained_cfg_overlay": {"input_size": (3, 48, 48)}})
    with pytest.raises(ValueError, match=r"prune blocks\.7: windows of \(2, 2\) do not divide its \(3, 3\) tokens"):
        ModelMask.full(odd)
    patches = timm.create_model("sam2_hiera_tiny", **HIERADET, patch_size=(4, 4))
    with pytest.raises(ValueError, match="model: wanted timm's HieraPatchEmbed, got PatchEmbed"):
        ModelMask.full(patches)
    del model.pretrained_cfg
    with pytest.raises(ValueError, match=r"wanted a HieraDet made by timm\.create_model, which records the size"):
        gohsp.count(model)
