# SPDX-License-Identifier: Apache-2.0
"""What is timm's encoders of vision-language models alone: images of any size, projectors, norms in float32."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import EvaBlock
from timm.models.qwen3_vit import Qwen3VitEncoder
from torch import nn

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import family_of, open_model
from tests.gohsp.models.zoo import difference, images, make

ENCODER, MERGING = "Qwen3 encoder, which merges tokens", "Qwen3 classifier that merges tokens"
ALIGNED = "DeepSeek classifier that merges tokens"
BOTH = pytest.mark.parametrize("name", [MERGING, ALIGNED])
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "out_features": 16}
needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


def pair(name: str) -> tuple[Any, Any]:
    """The masked dense model and the compressed one, in float64."""
    model = make(name)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


def small_one(name: str, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, **SIZES | arguments).eval()


@BOTH
@pytest.mark.parametrize("size", [(48, 32), (32, 48), (32, 32)])
def test_images_of_another_size_have_their_own_positions(name: str, size: tuple[int, int]) -> None:
    masked, small = pair(name)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert difference(small(images()), masked(images())) < 1e-12
        assert difference(small(x), masked(x)) < 1e-12
        ours, theirs = (model.forward_intermediates(x) for model in (small, masked))
        for one, other in zip((ours[0], *ours[1]), (theirs[0], *theirs[1]), strict=True):
            assert difference(one, other) < 1e-12


@needs_cpu
@BOTH
def test_a_frozen_model_refuses_images_of_another_size(name: str) -> None:
    masked, small = pair(name)
    frozen = gohsp.freeze(small.float())
    with torch.no_grad():
        assert difference(frozen(images().float()), masked(images())) < 1e-5
        ours = frozen.forward_intermediates(images().float(), intermediates_only=True)
        assert difference(ours[-1], masked.forward_intermediates(images(), intermediates_only=True)[-1]) < 1e-5
        with pytest.raises(ValueError, match=r"x: wanted images of \(32, 32\), whose rotary positions"):
            frozen(torch.randn(2, 3, 48, 32))


def test_a_model_that_is_given_another_size_takes_its_positions_over() -> None:
    masked, small = pair(MERGING)
    x = torch.randn(2, 3, 48, 32, dtype=torch.float64)
    small.encoder.patch_embed.set_input_size((48, 32))
    with torch.no_grad():
        assert difference(small(x), masked(x)) < 1e-12
    assert small.encoder.blocks[0].attn.rope.shape[1] == 24
    assert family_of(small).image_shape(small) == (3, 48, 32)
    if gk.can_run("cpu"):
        assert difference(gohsp.freeze(small.float())(x.float()), masked(x)) < 1e-5


@BOTH
def test_hooks_checkpointing_and_training(name: str) -> None:
    masked, small = pair(name)
    with torch.no_grad():
        wanted = masked(images())
    seen: list[Any] = []
    small.encoder.blocks[1].attn.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        assert difference(small(images()), wanted) < 1e-12 and len(seen) == 1
    small.set_grad_checkpointing()
    assert difference(small.train()(images()), wanted) < 1e-12
    small(images()).sum().backward()
    assert all(float(block.attn.qkv.weight.grad.abs().sum()) > 0 for block in small.encoder.blocks)


@pytest.mark.parametrize("name", ["deepseek_vit_412m", "deepseek_vit_412m_enc"])
def test_norms_of_float32_compute_in_the_dtype_of_a_compressed_model(name: str) -> None:
    model, x = small_one(name), images().float()
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(0))
    small, masked = gohsp.compress(model, mask), mask.apply_(copy.deepcopy(model))
    assert not any(type(part).__name__ == "RmsNormFp32" for part in small.modules())
    assert any(type(part).__name__ == "RmsNormFp32" for part in model.modules())
    with torch.no_grad():
        wanted = masked(x)
        assert difference(small(x), wanted) < 1e-6
        assert difference(gohsp.densify(small)(x), wanted) < 1e-6
        assert difference(small.double()(x.double()), masked.double()(x.double())) < 1e-6
        dense, found = gohsp.expand(small.float())
        assert found == mask
        assert difference(dense(x), wanted) < 1e-6


@pytest.mark.parametrize(
    ("name", "arguments", "features"),
    [
        ("qwen3_vit_88m_enc", {}, (2, 4, 16)),
        ("qwen3_vit_88m_enc", {"global_pool": "avg"}, (2, 24)),
        ("qwen3_vit_88m_enc", {"global_pool": ""}, (2, 16, 24)),
        ("deepseek_vit_412m_enc", {}, (2, 4, 16)),
        ("deepseek_vit_412m", {"num_classes": 0}, (2, 24)),
        ("qwen3_vit_88m", {"global_pool": "", "num_classes": 5}, (2, 16, 24)),
    ],
)
def test_features_are_what_the_head_reads_or_the_encoder_gives(
    name: str, arguments: dict[str, Any], features: tuple[int, ...], tmp_path: Path
) -> None:
    model, x = small_one(name, **arguments), images().float()
    opened = open_model(model)
    with torch.no_grad():
        stream = opened.embed(x)
        for layer in opened.sublayers:
            stream = layer.trace(stream).after
        assert opened.features(stream).shape == features
        assert opened.family.answers(model, stream) is None
        small = gohsp.compress(model, ModelMask.full(model))
        gohsp.save(small, tmp_path)
        assert torch.equal(gohsp.load(tmp_path)(x), small(x))


def test_single_channels_of_turned_heads_stay_and_images_are_of_one_size() -> None:
    model = make(ENCODER)
    mask = ModelMask.full(model)
    mask.blocks[0].qk[1, 3] = False
    with pytest.raises(ValueError, match="rotary positions turn the channels of a head in pairs"):
        gohsp.compress(model, mask)
    with pytest.raises(ValueError, match=r"images: wanted \(32, 32\), .*; its patch_embed\.set_input_size gives"):
        gohsp.prune(model, [torch.randn(2, 3, 48, 32)], {"params": 0.8})


def test_what_cannot_be_pruned_exactly_is_refused() -> None:
    model = small_one("qwen3_vit_88m")
    model.encoder.blocks[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"cannot prune blocks\.1: wanted timm's EvaBlock or EvaBlockPostNorm, got"):
        ModelMask.full(model)
    model = small_one("deepseek_vit_412m")
    model.encoder.blocks[0].norm2 = nn.GroupNorm(1, 24)
    with pytest.raises(ValueError, match=r"cannot prune blocks\.0: norm2 is GroupNorm; wanted LayerNorm or RMSNorm"):
        ModelMask.full(model)
    model.encoder.blocks[0] = EvaBlock(24, 3, scale_attn_inner=False)
    with pytest.raises(ValueError, match=r"cannot prune blocks\.0: wanted timm's DeepseekVitBlock, got EvaBlock"):
        ModelMask.full(model)
    kind = type("Other", (Qwen3VitEncoder,), {})
    with pytest.raises(TypeError, match=r"wanted a timm Qwen3VitEncoder \(not a subclass\), got .*Other"):
        ModelMask.full(kind(32, 8, embed_dim=24, depth=1, num_heads=3))


def test_a_model_made_by_hand_is_not_saved(tmp_path: Path) -> None:
    model = Qwen3VitEncoder(32, 8, embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.0).eval()
    small = gohsp.compress(model, ModelMask.full(model))
    with pytest.raises(ValueError, match=r"wanted one of Qwen3VitEncoder made by timm\.create_model"):
        gohsp.save(small, tmp_path)
