# SPDX-License-Identifier: Apache-2.0
"""Compact models in their dense shape again: the same function, the same mask, and further pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gohsp
from gohsp.layers import PrunedBlock
from tests.gohsp.models.test_adapters import masks
from tests.gohsp.models.zoo import ZOO, difference, images, make, without_float32

COMPUTED = ("MLP", "shared", "biases of all blocks", "by the MLP")
EXPANDED = [name for name in ZOO if not any(part in name for part in COMPUTED)] + [
    "DINOv2 giant, a gated MLP",
    "DINOv3 with a gated MLP",
    "AIMv2, RMSNorm and a gated MLP",
    "EVA-02 base, a norm inside the MLP",
    "DINOv3ViTModel with a gated MLP",
]


@pytest.mark.parametrize("name", dict.fromkeys(EXPANDED))
def test_the_dense_shape_computes_what_the_compact_one_does(name: str) -> None:
    model, x = make(name), images()
    for mask in masks(model):
        small = gohsp.compress(model, mask)
        with torch.no_grad():
            for parameter in small.parameters():  # as if it had been fine-tuned since
                parameter.mul_(1.25)
        _unlearn_key_biases(small)
        try:
            dense, found = gohsp.expand(small)
        except ValueError as error:
            assert "timm.create_model" in str(error), error
            pytest.skip("a file could not describe it either")
        assert type(dense) is type(model) and found == mask
        with torch.no_grad():
            wanted = small(x)
            assert difference(without_float32(dense)(x), wanted) < 1e-12
            again = gohsp.compress(dense, found)
        assert difference(again(x), wanted) < 1e-12
        assert again.state_dict().keys() == small.state_dict().keys()
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), small.parameters(), strict=True))


def _unlearn_key_biases(small: Any) -> None:
    """Set what the dense model has no place for to what it is there."""
    for block in small.modules():
        attn = block.attn if isinstance(block, PrunedBlock) else None
        if attn is not None and attn.rope is not None and attn.qkv.bias is not None:
            width = sum(attn.qk_widths)
            attn.qkv.bias.data[width : 2 * width] = 0


def test_a_loaded_model_is_pruned_further(tmp_path: Path) -> None:
    model, x = make("timm VisionTransformer"), images(8)
    first = gohsp.prune(model, [x], {"params": 0.8})
    gohsp.save(gohsp.compress(first.model, first.mask), tmp_path)
    dense, mask = gohsp.expand(gohsp.load(tmp_path))
    assert mask == first.mask
    with torch.no_grad():
        wanted = first.model(x)
    kept = gohsp.prune(dense, [x], {"params": first.report.pruned.params / first.report.dense.params})
    again = gohsp.prune(dense, [x], {"params": 0.6})
    assert again.report.pruned.params <= 0.6 * first.report.dense.params
    with torch.no_grad():
        assert difference(kept.model(x), wanted) < 0.1  # what was zero went, and hardly anything else
        small = gohsp.compress(again.model, again.mask)
        assert difference(small(x), again.model(x)) < 1e-10


def test_what_the_dense_model_has_no_place_for_is_said() -> None:
    model = make("relative positions by an MLP")
    small = gohsp.compress(model, gohsp.ModelMask.full(model))
    with pytest.raises(ValueError, match="cannot expand block 0: its table of relative positions is one that"):
        gohsp.expand(small)
    model = make("EVA-02 tiny, a gate in one matrix")
    small = gohsp.compress(model, gohsp.ModelMask.full(model))
    with torch.no_grad():
        small.blocks[1].attn.qkv.bias.add_(1.0)
    with pytest.raises(ValueError, match="cannot expand block 1: a bias was learnt where the dense model has none"):
        gohsp.expand(small)


def test_what_is_no_compact_model_is_refused() -> None:
    model = make("timm VisionTransformer")
    with pytest.raises(ValueError, match=r"wanted a model made by gohsp\.compress"):
        gohsp.expand(model)
    small = gohsp.compress(model, gohsp.ModelMask.full(model))
    small.blocks[0].mlp.fc1 = nn.Linear(24, 96).double()
    with pytest.raises(ValueError, match=r"model: blocks\.0: mlp\.fc1 is"):
        gohsp.expand(small)
