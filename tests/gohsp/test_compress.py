# SPDX-License-Identifier: Apache-2.0
"""Whole models: compressed against masked dense, and as plain PyTorch."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp.layers import RaggedAttention
from gohsp.masks.mask import ModelMask
from gohsp.models.timm_vit import PrunedVisionTransformer, PrunedVisionTransformerDistilled

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("vit_tiny_patch16_224", {"depth": 3}),
    "small": ("vit_small_patch16_224", {}),
    "distilled": ("deit_small_distilled_patch16_224", {}),
    "qk-norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "layer scale": ("vit_small_patch16_224", {"init_values": 1.0}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "average pool": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True}),
    "CLIP style": ("vit_tiny_patch16_224", {"pre_norm": True, "act_layer": "quick_gelu"}),
    "any image size": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "act_layer": nn.SiLU}),
}


def random_mask(model: nn.Module, keep: float = 0.7, seed: int = 0) -> ModelMask:
    return ModelMask.random(model, keep, torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_mask_means_the_masked_dense_model(
    data: st.DataObject,
    make_model: Callable[..., Any],
    images: Callable[..., Tensor],
    masks: Any,
    relative_error: Callable[..., float],
    name: str,
) -> None:
    model, x = make_model(name), images(batch=1)
    mask = data.draw(masks(model))
    compact = gohsp.compress(model, mask)
    with torch.no_grad(), gk.use_backend("reference"):
        wanted = mask.apply_(model)(x)
        assert relative_error(compact(x), wanted) < 1e-10


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224"])
def test_random_masks_in_float32_on_each_backend(
    make_model: Callable[..., Any],
    images: Callable[..., Tensor],
    relative_error: Callable[..., float],
    backend: str,
    name: str,
) -> None:
    x = images()
    for seed in range(8):
        model = make_model(name)
        mask = random_mask(model, keep=(0.05, 0.3, 0.6, 0.9)[seed % 4], seed=seed)
        compact = gohsp.compress(model, mask).float()
        with torch.no_grad():
            assert relative_error(compact(x.float()), mask.apply_(model)(x)) < 1e-5, seed


@pytest.mark.slow
@pytest.mark.parametrize("fused", [False, True])
def test_a_scale_other_than_that_of_the_width_is_taken_as_timm_takes_it(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float], fused: bool
) -> None:
    model, x = make_model("vit_tiny_patch16_224"), images()
    for block in model.blocks:  # as other tools leave it that make heads narrower
        block.attn.scale, block.attn.fused_attn = 3 * block.attn.scale, fused
    mask = random_mask(model)
    compact = gohsp.compress(model, mask)
    with torch.no_grad():
        assert relative_error(compact(x), mask.apply_(model)(x)) < 1e-10
    result = gohsp.prune(model, [x], {"params": 0.9}, groups=("heads", "hidden", "qk"), similarity="attention")
    with torch.no_grad():
        assert relative_error(gohsp.compress(result.model, result.mask)(x), result.model(x)) < 1e-10


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_way_to_call_the_model_agrees(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float], variant: str
) -> None:
    name, arguments = VARIANTS[variant]
    model, x = make_model(name, **arguments), images()
    mask = random_mask(model)
    compact, masked = gohsp.compress(model, mask), mask.apply_(model)
    with torch.no_grad():
        features = masked.forward_features(x)
        assert relative_error(compact(x), masked(x)) < 1e-10
        assert relative_error(compact.forward_features(x), features) < 1e-10
        assert relative_error(compact.forward_head(features), masked.forward_head(features)) == 0
        assert relative_error(compact.forward_head(features, pre_logits=True), masked.forward_head(features, True)) == 0
        got, got_all = compact.forward_intermediates(x, indices=2, norm=True)
        wanted, wanted_all = masked.forward_intermediates(x, indices=2, norm=True)
        assert relative_error(got, wanted) < 1e-10
        assert len(got_all) == len(wanted_all) == 2
        for ours, theirs in zip(got_all, wanted_all, strict=True):
            assert relative_error(ours, theirs) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deit_small_patch16_224", "deit_small_distilled_patch16_224"])
def test_full_size_models(
    make_model: Callable[..., Any],
    images: Callable[..., Tensor],
    relative_error: Callable[..., float],
    backend: str,
    name: str,
) -> None:
    model, x = make_model(name, img_size=224, depth=12, num_classes=1000), images(batch=1, side=224)
    mask = random_mask(model)
    compact = gohsp.compress(model, mask).float()
    with torch.no_grad():
        assert relative_error(compact(x.float()), mask.apply_(model)(x)) < 1e-5


def test_the_given_model_is_left_alone(make_model: Callable[..., Any]) -> None:
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    mask = random_mask(model)
    compact = gohsp.compress(model, mask)
    with torch.no_grad():
        for parameter in compact.parameters():
            parameter.zero_()
    assert type(model) is VisionTransformer
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mask.blocks[0].heads[:] = False
    assert ModelMask.of(compact).blocks[0].heads.any()


def test_the_result_is_still_a_timm_model(make_model: Callable[..., Any], images: Callable[..., Tensor]) -> None:
    model = make_model()
    compact = gohsp.compress(model, random_mask(model))
    assert isinstance(compact, VisionTransformer) and type(compact) is PrunedVisionTransformer
    assert compact.pretrained_cfg == model.pretrained_cfg
    assert timm.data.resolve_model_data_config(compact) == timm.data.resolve_model_data_config(model)
    twin = copy.deepcopy(compact)
    with torch.no_grad():
        assert torch.equal(twin(images()), compact(images()))
        compact.reset_classifier(3)
        assert compact.double()(images()).shape == (2, 3)
    distilled = make_model("deit_tiny_distilled_patch16_224")
    compact = gohsp.compress(distilled, random_mask(distilled))
    assert isinstance(compact, VisionTransformerDistilled) and type(compact) is PrunedVisionTransformerDistilled


def test_distilled_training_gives_both_heads(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    model = make_model("deit_tiny_distilled_patch16_224")
    mask = random_mask(model)
    compact, masked = gohsp.compress(model, mask), mask.apply_(model)
    for changed in (compact, masked):
        changed.set_distilled_training(True)
        changed.train()
    for ours, theirs in zip(compact(images()), masked(images()), strict=True):
        assert relative_error(ours, theirs) < 1e-10


def test_wrong_input(make_model: Callable[..., Any]) -> None:
    model = make_model()
    mask = ModelMask.full(model)
    with pytest.raises(ValueError, match="model: it is already compressed"):
        gohsp.compress(gohsp.compress(model, mask), mask)
    with pytest.raises(ValueError, match="mask: it is made for"):
        gohsp.compress(make_model("vit_small_patch16_224"), mask)
    mask.blocks[0].qk = mask.blocks[0].qk.float()
    with pytest.raises(ValueError, match=r"blocks\[0\]\.qk: wanted dtype torch.bool"):
        gohsp.compress(model, mask)
    with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.linear\.Linear"):
        gohsp.compress(nn.Linear(2, 2), mask)
    with pytest.raises(ValueError, match=r"made by gohsp\.compress, got VisionTransformer"):
        gohsp.densify(model)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "distilled", "qk-norm", "layer scale"])
def test_torch_compile_makes_one_graph(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float], variant: str
) -> None:
    name, arguments = VARIANTS[variant]
    model, x = make_model(name, **arguments).float(), images().float()
    compact = gohsp.compress(model, random_mask(model))
    torch.compiler.reset()
    compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        wanted = compact(x)
        assert relative_error(compiled(x), wanted) < 1e-5
        compact.head.weight.mul_(2)
        compact.blocks[0].mlp.fc1.weight.mul_(0.5)
        assert relative_error(compiled(x), wanted) > 1e-3
        assert relative_error(compiled(x), compact(x)) < 1e-5


@pytest.mark.slow
def test_torch_compile_with_inductor(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    model, x = make_model(depth=1).float(), images().float()
    compact = gohsp.compress(model, random_mask(model))
    torch.compiler.reset()
    compiled = torch.compile(compact, fullgraph=True)
    with torch.no_grad():
        assert relative_error(compiled(x), compact(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [{}, {"attn_drop_rate": 0.1, "drop_path_rate": 0.1}])
def test_torch_compile_in_training(
    make_model: Callable[..., Any], images: Callable[..., Tensor], arguments: dict[str, Any]
) -> None:
    model, x = make_model(init_values=1.0, **arguments).float(), images().float()
    compact = gohsp.compress(model, random_mask(model)).train()
    torch.compiler.reset()
    compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
    loss = compiled(x).square().sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in compact.named_parameters()}
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    if not arguments:
        compact.zero_grad()
        compact(x).square().sum().backward()
        total = sum((p.grad - gradients[n]).norm() for n, p in compact.named_parameters())  # type: ignore[operator]
        assert total < 1e-4 * sum(gradient.norm() for gradient in gradients.values())  # type: ignore[union-attr]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["tiny", "distilled", "layer scale", "average pool"])
def test_torch_export(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float], variant: str
) -> None:
    name, arguments = VARIANTS[variant]
    model, x = make_model(name, **arguments).float(), images().float()
    compact = gohsp.compress(model, random_mask(model))
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(compact, (x,), dynamic_shapes=({0: batch},))
        assert relative_error(program.module()(x), compact(x)) < 1e-5
        more = images(batch=5, seed=1).float()
        assert relative_error(program.module()(more), compact(more)) < 1e-5
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"gohsp_kernels.attention_sublayer.default", "gohsp_kernels.mlp_sublayer.default"} <= targets


def plain_targets(model: nn.Module, x: Tensor) -> set[str]:
    program = torch.export.export(model, (x,))
    assert torch.allclose(program.module()(x), model(x), rtol=1e-10, atol=1e-12)
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_densify_is_plain_torch(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float], variant: str
) -> None:
    name, arguments = VARIANTS[variant]
    model, x = make_model(name, **arguments), images()
    mask = random_mask(model)
    compact = gohsp.compress(model, mask)
    before = copy.deepcopy(compact.state_dict())
    plain = gohsp.densify(compact)
    assert type(plain) is type(model)
    with torch.no_grad():
        assert relative_error(plain(x), mask.apply_(model)(x)) < 1e-10
        targets = plain_targets(plain, x)
    assert targets and all(target.startswith(("aten.", "<built-in function")) for target in targets)
    assert all(torch.equal(value, before[key]) for key, value in compact.state_dict().items())
    assert any(isinstance(module, RaggedAttention) for module in plain.modules())


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_densify_of_any_mask(
    data: st.DataObject,
    make_model: Callable[..., Any],
    images: Callable[..., Tensor],
    masks: Any,
    relative_error: Callable[..., float],
) -> None:
    model, x = make_model(init_values=1.0), images(batch=1)
    mask = data.draw(masks(model))
    plain = gohsp.densify(gohsp.compress(model, mask))
    with torch.no_grad():
        assert relative_error(plain(x), mask.apply_(model)(x)) < 1e-10


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("width", [64, 24])
def test_heads_of_one_width_become_timm_attention(
    make_model: Callable[..., Any],
    images: Callable[..., Tensor],
    relative_error: Callable[..., float],
    columns: bool,
    width: int,
) -> None:
    model, x = make_model(), images()
    mask = ModelMask.random(model, {"attn_in": 0.5, "attn_out": 0.5} if columns else {})
    for block in mask.blocks:
        block.heads[1] = False
        block.qk[:, width:] = block.v[:, width:] = False
    plain = gohsp.densify(gohsp.compress(model, mask))
    for block in plain.blocks:  # type: ignore[union-attr]
        assert type(block.attn) is Attention
        assert (block.attn.num_heads, block.attn.head_dim) == (2, width)
    with torch.no_grad():
        assert relative_error(plain(x), mask.apply_(model)(x)) < 1e-10


def test_densify_of_everything_can_be_pruned_again(make_model: Callable[..., Any]) -> None:
    model = make_model()
    plain = gohsp.densify(gohsp.compress(model, ModelMask.full(model)))
    assert gohsp.count(plain) == gohsp.count(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


def test_densify_keeps_dropout_and_masks(
    make_model: Callable[..., Any], images: Callable[..., Tensor], relative_error: Callable[..., float]
) -> None:
    model, x = make_model(attn_drop_rate=1.0, proj_drop_rate=0.0), images()
    mask = random_mask(model)
    plain, masked = gohsp.densify(gohsp.compress(model, mask)), mask.apply_(model)
    with torch.no_grad():
        assert relative_error(plain(x, is_causal=True), masked(x, is_causal=True)) < 1e-10
        # All attention is dropped, so chance plays no part.
        assert relative_error(plain.train()(x), masked.train()(x)) < 1e-10


@pytest.mark.slow
def test_densified_model_exports_to_onnx(make_model: Callable[..., Any], images: Callable[..., Tensor]) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model, x = make_model(init_values=1.0).float(), images().float()
    plain = gohsp.densify(gohsp.compress(model, random_mask(model)))
    buffer = io.BytesIO()
    torch.onnx.export(plain, (x,), dynamo=True, verbose=False).save(buffer)
    graph = onnx.load_from_string(buffer.getvalue()).graph
    assert {node.domain for node in graph.node} == {""}
