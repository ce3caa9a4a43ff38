# SPDX-License-Identifier: Apache-2.0
"""Blocks in models of classes that gohsp does not take as a whole: one by one, each with a mask of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.models.crossvit import CrossVit
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.pit import PoolingVisionTransformer
from timm.models.vision_transformer import Block
from torch import nn

import gohsp
from gohsp.layers import PrunedBlock
from gohsp.masks.mask import FIELDS
from gohsp.models.registry import open_block
from tests.gohsp.models.zoo import ZOO, difference, images, make

MODELS: dict[str, Callable[[], nn.Module]] = {
    "PiT": lambda: PoolingVisionTransformer(32, 8, 4, base_dims=(8, 8, 8), depth=(1, 2, 1), heads=(2, 4, 8)),
    "CrossViT": lambda: CrossVit(
        *(32, (1.0, 1.0), (8, 16)), embed_dim=(24, 48), depth=((1, 2, 0),), num_heads=(3, 6), mlp_ratio=(2.0, 2.0, 1.0)
    ),
    "MobileViT": lambda: timm.create_model("mobilevit_xxs"),
    "NaFlexVit": lambda: NaFlexVit(NaFlexVitCfg(patch_size=8, embed_dim=24, depth=2, num_heads=3)),
}


def prepared(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.double().eval()


def replace(model: nn.Module, change: Callable[[nn.Module], nn.Module]) -> int:
    """Put something in the place of each of timm's blocks."""
    places = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    blocks = [place for place in places if type(place[2]) is Block]
    for parent, name, child in blocks:
        setattr(parent, name, change(child))
    return len(blocks)


def random_mask(block: nn.Module, generator: torch.Generator) -> gohsp.BlockMask:
    mask = gohsp.BlockMask.of_block(block)
    for field in FIELDS:
        kept = getattr(mask, field)
        kept &= torch.rand(kept.shape, generator=generator) < 0.7
    return mask


@pytest.mark.parametrize("name", list(MODELS))
def test_compact_blocks_in_the_place_of_timms_own(name: str) -> None:
    model, x = prepared(name), images()
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    generators = [torch.Generator().manual_seed(1) for _ in range(2)]

    def mask_(block: nn.Module) -> nn.Module:
        random_mask(block, generators[0]).apply_(open_block(block)[1])
        return block

    blocks = replace(masked, mask_)
    assert replace(small, lambda block: gohsp.compress_block(block, random_mask(block, generators[1]))) == blocks > 1
    with torch.no_grad():
        assert difference(small(x), masked(x)) < 1e-11
        assert difference(small(x), model(x)) > 1e-3
        assert difference(gohsp.accelerate(model)(x), model(x)) < 1e-11
    assert sum(isinstance(part, PrunedBlock) for part in gohsp.accelerate(model).modules()) == blocks
    assert type(gohsp.accelerate(model)) is type(model)


def test_padding_in_a_batch_of_naflex_reaches_the_heads() -> None:
    model = prepared("NaFlexVit")
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 6, 8 * 8 * 3, generator=generator, dtype=torch.float64)
    given = {
        "patches": patches,
        "patch_coord": torch.tensor([[[i // 3, i % 3] for i in range(6)]] * 2),
        "patch_valid": torch.tensor([[True] * 6, [True] * 4 + [False] * 2]),
    }
    with torch.no_grad():
        assert difference(gohsp.accelerate(model)(given), model(given)) < 1e-11


@pytest.mark.parametrize("name", [name for name in ZOO if name in ("ViTModel", "timm VisionTransformer", "DeiTModel")])
def test_a_model_that_is_taken_as_a_whole_is_compressed(name: str) -> None:
    model, x = make(name), images()
    fast = gohsp.accelerate(model)
    assert gohsp.ModelMask.of(fast) == gohsp.ModelMask.full(model)
    with torch.no_grad():
        assert difference(fast(x), model(x)) < 1e-12
    assert next(fast.parameters()).requires_grad


@pytest.mark.parametrize("name", ["ViTForImageClassification", "torchvision VisionTransformer", "CLIPVisionModel"])
def test_layers_of_other_libraries_are_taken_one_by_one(name: str) -> None:
    model, x = make(name), images()
    masked = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    path, layer = next((path, part) for path, part in model.named_modules() if open_block(part) is not None)
    mask = random_mask(layer, generator)
    mask.apply_(open_block(masked.get_submodule(path))[1])
    model.set_submodule(path, gohsp.compress_block(layer, mask))
    with torch.no_grad():
        assert difference(model(x), masked(x)) < 1e-12


def test_what_cannot_be_replaced_is_refused() -> None:
    block = Block(24, 3)
    mask = gohsp.BlockMask.of_block(block)
    with pytest.raises(TypeError, match=r"block: wanted timm's Block, .*; got torch\.nn\.modules\.linear\.Linear"):
        gohsp.compress_block(nn.Linear(2, 2), mask)
    with pytest.raises(TypeError, match=r"model: wanted .* got torch.*Linear"):
        gohsp.accelerate(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="mask: wanted a BlockMask"):
        gohsp.compress_block(block, None)
    with pytest.raises(ValueError, match=r"mask\.heads: wanted shape \(4,\), got \(3,\)"):
        gohsp.compress_block(Block(24, 4), mask)
    with pytest.raises(ValueError, match=r"mask\.qk: wanted every QK channel"):
        mask.qk[0, 0] = False
        gohsp.compress_block(Block(24, 3, qk_norm=True), mask)
    with pytest.raises(ValueError, match=r"block: cannot prune it: mlp is .*GatedMlp"):
        gohsp.compress_block(Block(24, 3, mlp_layer=timm.layers.GatedMlp), mask)
    block.mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"block: a hook hangs on mlp\.fc1; wanted none"):
        gohsp.compress_block(block, mask)
    with pytest.raises(ValueError, match="already compressed"):
        gohsp.accelerate(gohsp.accelerate(make("ViTModel")))
