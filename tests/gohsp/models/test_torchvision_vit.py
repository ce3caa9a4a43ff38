# SPDX-License-Identifier: Apache-2.0
"""torchvision's VisionTransformer: what of it is refused, and with which words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

import gohsp
from gohsp.layers import PrunedBlocks
from gohsp.models.registry import open_model
from tests.gohsp.models.test_adapters import compressed, masks
from tests.gohsp.models.zoo import difference, images, make

NAME = "torchvision VisionTransformer"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda block: setattr(block.self_attention, "add_zero_attn", True), "reads keys and values of its own"),
        (lambda block: setattr(block.self_attention, "bias_k", nn.Parameter(torch.ones(24))), "keys and values of its"),
        (lambda block: setattr(block.mlp, "1", nn.GELU(approximate="tanh")), "mlp is MLPBlock of other layers"),
        (lambda block: setattr(block, "mlp", nn.Sequential()), "mlp is Sequential of other layers"),
        (lambda block: setattr(block, "ln_2", nn.Identity()), "ln_2 is Identity; wanted LayerNorm"),
        (lambda block: setattr(block, "self_attention", nn.Identity()), "self_attention is Identity"),
        (
            lambda block: setattr(block.self_attention, "out_proj", nn.Sequential()),
            r"out_proj is .*; wanted torch\.nn\.",
        ),
        (lambda block: setattr(block, "forward", block.forward), "forward of the block was replaced"),
    ],
)
def test_a_changed_block_is_refused_with_its_name(change: Callable[[Any], None], message: str) -> None:
    model = make(NAME)
    change(model.encoder.layers[1])
    with pytest.raises(ValueError, match=r"cannot prune encoder\.layers\.encoder_layer_1: .*" + message):
        open_model(model)


def test_other_models_are_refused() -> None:
    class Own(VisionTransformer):
        pass

    with pytest.raises(TypeError, match=r"wanted a torchvision VisionTransformer \(not a subclass\), got .*Own"):
        open_model(Own(32, 8, 1, 3, 24, 40))
    with pytest.raises(ValueError, match="it has no transformer blocks"):
        open_model(VisionTransformer(32, 8, 0, 3, 24, 40))


def test_all_blocks_run_as_one_chain() -> None:
    small = compressed(make(NAME))
    assert type(small.encoder.layers) is PrunedBlocks
    assert [name for name, _ in small.encoder.layers.named_children()] == ["encoder_layer_0", "encoder_layer_1"]


def test_a_stem_of_convolutions_is_pruned_behind_and_not_saved(tmp_path: Path) -> None:
    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2), ConvStemConfig(8, 3, 2)]
    torch.manual_seed(0)
    model = VisionTransformer(32, 8, 2, 3, 24, 40, num_classes=5, conv_stem_configs=stem).double().eval()
    mask = masks(model)[0]
    small = gohsp.compress(model, mask)
    assert gohsp.count(small) == gohsp.count(model, mask=mask)
    with pytest.raises(ValueError, match=r"plan\.json cannot describe it"):
        gohsp.save(small, tmp_path)
    with torch.no_grad():
        model.heads.head.weight.normal_()
        small.heads.head.weight.copy_(model.heads.head.weight)
        assert difference(small(images()), mask.apply_(model)(images())) < 1e-12
