# SPDX-License-Identifier: Apache-2.0
"""What is timm's Nest alone: heads whose channels take turns, blocks of an image, and aggregation between levels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.nest import Nest
from torch import nn

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from gohsp.models.timm_nest import InterleavedHeads
from tests.gohsp.models.zoo import difference, images, make

NEST = "NesT, two levels"


def test_a_matrix_of_channels_that_take_turns_is_seen_head_after_head() -> None:
    layer = nn.Linear(12, 5).double()
    seen, x = InterleavedHeads(layer, 3), torch.randn(2, 7, 3, 4, dtype=torch.float64)  # [..., heads, channels]
    with torch.no_grad():
        wanted = layer(x.transpose(-1, -2).flatten(-2))
        assert difference(seen(x.flatten(-2)), wanted) < 1e-12
        assert difference(x.flatten(-2) @ seen.weight.T + seen.bias, wanted) < 1e-12
        before = seen.weight.clone()
        seen.write_(2 * before, seen.bias)
        assert torch.equal(seen.weight, 2 * before)
        gone = torch.zeros(12, dtype=torch.bool)
        gone[4:8] = True  # the second head
        seen.clear_(columns=gone)
        assert torch.equal(seen.weight == 0, gone.expand(5, 12))
        by_head = seen.columns_by_head(layer.weight, 3)
        assert torch.equal(by_head, seen.weight.view(5, 3, 4).transpose(0, 1)) and by_head._base is not None
        kept: list[Any] = []
        handle = seen.watch_inputs(lambda inputs: kept.append(inputs) or inputs)
        seen(x.flatten(-2))
        handle.remove()
        seen(x.flatten(-2))
    assert len(kept) == 1 and torch.equal(kept[0], x.flatten(-2))


def test_the_whole_way_from_ranking_to_a_frozen_model(tmp_path: Path) -> None:
    model, x = make(NEST), images(8)
    scores = gohsp.rank_heads(model, [x])
    assert [len(of) for of in scores] == [3, 3, 6]
    result = gohsp.prune(model, [x], {"params": 0.7}, "learned")
    assert result.report.pruned.params <= 0.7 * result.report.dense.params
    small = gohsp.compress(result.model, result.mask)
    with torch.no_grad():
        wanted = result.model(x)
        assert difference(small(x), wanted) < 1e-10
        for before, after in zip(model.levels, small.levels, strict=True):
            assert torch.equal(before.pos_embed, after.pos_embed)  # and what lies between levels is as it was
    gohsp.save(small, tmp_path)
    again = gohsp.load(tmp_path)
    assert isinstance(again, Nest)
    with torch.no_grad():
        assert torch.equal(again(x), small(x))
        if gk.can_run("cpu"):
            frozen = gohsp.freeze(small.float())
            assert difference(frozen(x.float()), wanted) < 1e-5
            maps = frozen.forward_intermediates(x.float(), intermediates_only=True)
            assert [tuple(found.shape[1:]) for found in maps] == [(24, 8, 8), (48, 4, 4)]


def test_a_path_is_dropped_for_an_image_and_not_for_a_block_of_it() -> None:
    model = Nest(32, 3, 4, 2, (24, 48), (3, 6), (2, 2), num_classes=5, drop_path_rate=0.5).double().train()
    small = gohsp.compress(model, ModelMask.full(model))
    x = torch.randn(64, 4, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.manual_seed(0)
        ours = small.levels[0].transformer_encoder[1](x)
        torch.manual_seed(0)
        theirs = model.levels[0].transformer_encoder[1](x)
    assert difference(ours, theirs) < 1e-12


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    model = make(NEST)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    small, masked = gohsp.compress(model, mask), mask.apply_(copy.deepcopy(model))
    with torch.no_grad():
        assert difference(torch.compile(small, backend="aot_eager")(images()), masked(images())) < 1e-12


@pytest.mark.slow
def test_the_smallest_that_timm_has() -> None:
    model = timm.create_model("nest_tiny_jx").eval()
    mask = ModelMask.random(model, {"heads": 0.7, "hidden": 0.6}, torch.Generator().manual_seed(2))
    x = torch.randn(1, 3, 224, 224)
    small = gohsp.compress(model, mask)
    with torch.no_grad():
        assert difference(small(x), mask.apply_(model)(x).double()) < 1e-5
