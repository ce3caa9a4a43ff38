# SPDX-License-Identifier: Apache-2.0
"""Parameters and MACs, against torch's and fvcore's counters and against published operating points."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gohsp
from gohsp.masks.mask import ModelMask

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("vit_tiny_patch16_224", {}),
    ("deit_small_distilled_patch16_224", {}),
    ("vit_small_patch16_224", {"qk_norm": True, "init_values": 1.0, "qkv_bias": False}),
    ("vit_tiny_patch16_224", {"global_pool": "map"}),
    ("vit_tiny_patch16_224", {"global_pool": "avg", "reg_tokens": 4, "num_classes": 0}),
    ("vit_tiny_patch16_224", {"img_size": (32, 64), "proj_bias": False, "pre_norm": True}),
]


def macs_by_torch(model: nn.Module, side: tuple[int, int]) -> int:
    """Run on the meta device, where attention is spelled out as the matrix products that torch's counter knows."""
    model = model.float().to("meta").requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *side, device="meta"))
    return counter.get_total_flops() // 2


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_dense_models_agree_with_torch(make_model: Callable[..., Any], name: str, arguments: dict[str, Any]) -> None:
    model = make_model(name, **arguments)
    cost = gohsp.count(model)
    assert cost.params == parameters(model)
    assert cost.macs == macs_by_torch(model, model.patch_embed.img_size)
    assert len(cost.blocks) == 2
    for block, module in zip(cost.blocks, model.blocks, strict=True):
        assert block.attn_params == parameters(module.norm1) + parameters(module.attn) + parameters(module.ls1)
        assert block.mlp_params == parameters(module.norm2) + parameters(module.mlp) + parameters(module.ls2)


def test_dense_model_agrees_with_fvcore(make_model: Callable[..., Any]) -> None:
    model = make_model("deit_small_distilled_patch16_224").float()
    for block in model.blocks:
        block.attn.fused_attn = False  # fvcore does not know the fused operator
    analysis = FlopCountAnalysis(model, torch.zeros(1, 3, 48, 48)).unsupported_ops_warnings(False)
    operators = analysis.by_operator()
    # fvcore also gives norms a cost, which no counter of matrix products does.
    norms = operators.pop("layer_norm")
    assert norms > 0
    assert gohsp.count(model).macs == sum(operators.values())


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_compressed_models_agree_with_torch(
    make_model: Callable[..., Any], name: str, arguments: dict[str, Any]
) -> None:
    model = make_model(name, **arguments)
    mask = ModelMask.random(model, 0.6, torch.Generator().manual_seed(5))
    compact = gohsp.compress(model, mask)
    cost = gohsp.count(compact)
    assert cost == gohsp.count(model, mask=mask)
    assert cost.params == parameters(compact)
    compact.train()  # in evaluation a class token model leaves tokens out, which count does not
    assert cost.macs == macs_by_torch(compact, model.patch_embed.img_size)


def test_empty_blocks_cost_their_norms_and_biases(make_model: Callable[..., Any]) -> None:
    model = make_model()
    mask = ModelMask.random(model, {"heads": 0.0, "hidden": 0.0})
    cost = gohsp.count(model, mask=mask)
    assert all(block.macs == 0 for block in cost.blocks)
    assert all(block.attn_params == block.mlp_params == 3 * 192 for block in cost.blocks)
    assert cost.params == parameters(gohsp.compress(model, mask))


def test_keeping_everything_costs_what_the_dense_model_costs(make_model: Callable[..., Any]) -> None:
    model = make_model()
    assert gohsp.count(model, mask=ModelMask.full(model)) == gohsp.count(model)


@pytest.mark.parametrize(
    ("name", "heads", "hidden", "params", "macs"),
    [("deit_small_patch16_224", 4, 960, 14.37e6, 2.97e9), ("deit_tiny_patch16_224", 3, 384, 3.94e6, 0.905e9)],
)
def test_published_operating_points(name: str, heads: int, hidden: int, params: float, macs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    cost = gohsp.count(model, mask=ModelMask.keep_first(model, heads=heads, hidden=hidden))
    assert cost.params == pytest.approx(params, rel=1e-3)
    assert cost.macs == pytest.approx(macs, rel=1e-3)


def test_input_size(make_model: Callable[..., Any]) -> None:
    model = make_model(dynamic_img_size=True)
    assert gohsp.count(model).tokens == 10
    for size in (64, (64, 64), (3, 64, 64)):
        cost = gohsp.count(model, size)
        assert cost.tokens == 17
        assert cost.macs == macs_by_torch(make_model(dynamic_img_size=True), (64, 64))
    assert gohsp.count(make_model(), 48) == gohsp.count(make_model())


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (64, r"input_size: wanted \(48, 48\), which this model is fixed to, got \(64, 64\)"),
        ((3,), "input_size: wanted a side"),
        (0, "input_size: wanted a side"),
    ],
)
def test_wrong_input_size(make_model: Callable[..., Any], size: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gohsp.count(make_model(), size)


def test_mask_for_a_compressed_or_another_model(make_model: Callable[..., Any]) -> None:
    model = make_model()
    mask = ModelMask.full(model)
    with pytest.raises(ValueError, match="already compressed"):
        gohsp.count(gohsp.compress(model, mask), mask=mask)
    with pytest.raises(ValueError, match="made for"):
        gohsp.count(make_model(depth=3), mask=mask)
    with pytest.raises(TypeError, match=r"wanted a timm .*VisionTransformer"):
        gohsp.count(nn.Linear(3, 3))
