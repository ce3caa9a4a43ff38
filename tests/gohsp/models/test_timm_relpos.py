# SPDX-License-Identifier: Apache-2.0
"""What is timm's Beit and VisionTransformerRelPos alone: tables of relative positions, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from tests.gohsp.models.zoo import difference, images, make

BEIT, MLP, SHARED = "BEiT", "relative positions by an MLP", "relative positions by an MLP for all blocks"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


def pair(name: str) -> tuple[Any, Any]:
    """The masked dense model and the compressed one, in float64."""
    model = make(name)
    mask = ModelMask.random(model, {"heads": 0.7, "qk": 0.7, "v": 0.7, "hidden": 0.6}, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


@needs_cpu
def test_an_optimiser_that_tells_nobody_changes_what_the_kernels_add() -> None:
    _, small = pair(BEIT)
    small, x = small.float(), images().float()
    with torch.no_grad():
        small(x)
        small.blocks[0].attn.position_bias.table.data.add_(torch.randn(()))  # alike for all keys: no difference
        same = small(x)
        torch._foreach_mul_([small.blocks[1].attn.position_bias.table.data], 3.0)
        with gk.use_backend("reference"):
            wanted = small(x)
        assert difference(small(x), wanted) < 1e-5 < difference(same, wanted)


def test_heads_without_channels_attend_by_their_positions() -> None:
    model = make(BEIT)
    mask = ModelMask.full(model)
    for block in mask.blocks:
        block.qk[:2] = False
    small = gohsp.compress(model, mask)
    assert small.blocks[0].attn.qk_widths[:2] == (0, 0)
    x = images()
    with torch.no_grad():
        wanted = mask.apply_(copy.deepcopy(model))(x)
        assert difference(small(x), wanted) < 1e-12
        assert difference(gohsp.densify(small)(x), wanted) < 1e-12
        if gk.can_run("cpu"):
            assert difference(gohsp.freeze(small.float())(x.float()), wanted) < 1e-5


@pytest.mark.parametrize("name", [BEIT, MLP])
def test_tables_are_trained(name: str) -> None:
    _, small = pair(name)
    small.train()(images()).square().sum().backward()
    assert all(float(block.attn.position_bias.table.grad.abs().sum()) > 0 for block in small.blocks)


def test_tables_of_frozen_parameters_stay_frozen() -> None:
    model = make(MLP)
    for block in model.blocks:
        block.attn.rel_pos.requires_grad_(False)
    small = gohsp.compress(model, ModelMask.full(model))
    assert not any(block.attn.position_bias.table.requires_grad for block in small.blocks)


def test_what_all_blocks_shared_each_has_of_its_own() -> None:
    model = make(SHARED)
    small = gohsp.compress(model, ModelMask.full(model))
    assert small.shared_rel_pos is None and model.shared_rel_pos is not None
    tables = [block.attn.position_bias.table for block in small.blocks]
    assert torch.equal(*tables) and tables[0].data_ptr() != tables[1].data_ptr()


@pytest.mark.parametrize("name", [BEIT, SHARED])
def test_intermediate_features_hooks_and_checkpointing(name: str) -> None:
    masked, small = pair(name)
    x = images()
    with torch.no_grad():
        for theirs, ours in zip(
            masked.forward_intermediates(x, intermediates_only=True),
            small.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            assert difference(ours, theirs) < 1e-12
        assert difference(small.forward_features(x), masked.forward_features(x)) < 1e-12
    seen: list[Any] = []
    small.blocks[1].attn.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        assert difference(small(x), masked(x)) < 1e-12 and len(seen) == 1
    small.set_grad_checkpointing()
    small.train()(x).sum().backward()
    with torch.no_grad():
        assert difference(small.eval()(x), masked(x)) < 1e-12


def test_attention_masks_come_on_top() -> None:
    _, small = pair(BEIT)
    attn, x = small.blocks[0].attn, torch.randn(2, 17, 24, dtype=torch.float64)
    rows = torch.ones(17, 17, dtype=torch.bool).tril()
    with torch.no_grad():
        causal = attn(x, is_causal=True)
        assert difference(attn(x, attn_mask=rows), causal) < 1e-12
        added = torch.zeros(17, 17, dtype=torch.float64).masked_fill(~rows, -torch.inf)
        assert difference(attn(x, attn_mask=added), causal) < 1e-12
        assert difference(attn(x), causal) > 1e-3


@pytest.mark.parametrize("name", [MLP, SHARED])
def test_positions_that_are_computed_are_refined_with_their_block(name: str) -> None:
    model, x = make(name), images(6)
    result = gohsp.prune(model, [x], {"macs": 0.6}, refine=3)
    with torch.no_grad():
        assert difference(gohsp.compress(result.model, result.mask)(x), result.model(x)) < 1e-10
        masked = result.mask.apply_(copy.deepcopy(result.model)).train()
        again = gohsp.compress(masked, result.mask).eval()  # whatever the MLP drops in training
        assert difference(again(x), result.model(x)) < 1e-10


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    masked, small = pair(BEIT)
    with torch.no_grad():
        assert difference(torch.compile(small, backend="aot_eager")(images()), masked(images())) < 1e-12


def test_another_size_is_for_the_dense_model() -> None:
    model = make(BEIT)
    small = gohsp.compress(model, ModelMask.full(model))
    with pytest.raises(ValueError, match="wanted the dense model, whose set_input_size gives it another"):
        small.set_input_size((64, 64))


def test_other_blocks_are_refused() -> None:
    model = timm.create_model("vit_relpos_small_patch16_224", **SIZES)
    model.blocks[1] = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"blocks\.1: wanted timm's RelPosBlock or ResPostRelPosBlock, got Identity"):
        ModelMask.full(model)
