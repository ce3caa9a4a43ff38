# SPDX-License-Identifier: Apache-2.0
"""What is ViTamin's alone: MLPs that begin with a norm, which stand behind two norms and end the chain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import nn

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import open_model
from tests.gohsp.models.test_single_blocks import random_mask
from tests.gohsp.models.zoo import difference, images

needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def shaken(module: nn.Module) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double().eval()


def made(**arguments: Any) -> Any:
    """A model of such MLPs and timm's plain embedding, whose head reads the class token."""
    torch.manual_seed(0)
    return shaken(VisionTransformer(**SIZES | {"init_values": 0.5, "mlp_layer": GeGluMlp} | arguments))


def pair(**arguments: Any) -> tuple[Any, Any]:
    """The masked dense model and the compressed one, in float64."""
    model = made(**arguments)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


def test_compact_it_is_the_masked_one_in_all_its_ways() -> None:
    masked, small = pair()
    x = images()
    with torch.no_grad():
        wanted = masked(x)
        assert difference(small(x), wanted) < 1e-12
        assert difference(small.forward_features(x), masked.forward_features(x)) < 1e-12
        causal = torch.ones(17, 17, dtype=torch.bool).tril()
        assert difference(small(x, attn_mask=causal), masked(x, attn_mask=causal)) < 1e-12
        plain = gohsp.densify(small)
        assert difference(plain(x), wanted) < 1e-12
        assert all(type(block.mlp) is GeGluMlp for block in plain.blocks)
    assert difference(small.train()(x), wanted) < 1e-12
    small(x).square().sum().backward()
    masked(x).square().sum().backward()
    for ours, theirs in zip(small.blocks, masked.blocks, strict=True):
        assert difference(ours.mlp.norm.weight.grad, theirs.mlp.norm.weight.grad) < 1e-12
        assert difference(ours.norm2.weight.grad, theirs.norm2.weight.grad) < 1e-12


def test_names_of_both_norms_are_timms() -> None:
    masked, small = pair()
    theirs, ours = masked.state_dict(), small.state_dict()
    names = [f"blocks.{index}.{norm}" for index in range(2) for norm in ("norm2.weight", "mlp.norm.bias")]
    assert all(torch.equal(ours[name], theirs[name]) for name in names)


@pytest.mark.parametrize("hooked", ["norm2", "mlp.norm", "mlp"])
def test_hooks_are_called(hooked: str) -> None:
    masked, small = pair()
    seen: list[Any] = []
    small.blocks[1].get_submodule(hooked).register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        assert difference(small(images()), masked(images())) < 1e-12 and len(seen) == 1
    with pytest.raises(ValueError, match=rf"a hook hangs on {hooked}"):
        gohsp.densify(small)


@needs_cpu
@pytest.mark.parametrize(("weights", "bound"), [("float32", 1e-5), ("bfloat16", 0.03), ("int8", 0.1)])
def test_frozen_it_is_nearly_the_same(weights: str, bound: float) -> None:
    if not gk.can_run("cpu", weights=weights):
        pytest.skip(gk.can_run("cpu", weights=weights).reason)
    masked, small = pair()
    x = images().float()
    with torch.no_grad():
        wanted = masked(images())
        assert difference(small.float()(x), wanted) < 1e-5
        frozen = gohsp.freeze(small, weights)
        assert difference(frozen(x), wanted) < bound
        assert difference(frozen.forward_features(x), masked.forward_features(images())) < bound
    assert not any(parameter.requires_grad for parameter in frozen.blocks.parameters())


def test_it_is_pruned_expanded_and_pruned_further() -> None:
    model = made()
    result = gohsp.prune(model, [images(6)], {"params": 0.75}, groups=("heads", "v", "hidden", "mlp_in", "mlp_out"))
    small = gohsp.compress(result.model, result.mask)
    with torch.no_grad():
        wanted = result.model(images())
        assert difference(small(images()), wanted) < 1e-10
    again = gohsp.prune(gohsp.densify(gohsp.compress(model, ModelMask.full(model))), [images(6)], {"params": 0.75})
    assert again.report.pruned.params <= 0.75 * again.report.dense.params


def test_expanded_it_has_both_norms_again() -> None:
    torch.manual_seed(0)
    model = shaken(timm.create_model("vitamin_small_224", img_size=32, depth=1, num_classes=5))
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(0))
    dense, found = gohsp.expand(gohsp.compress(model, mask))
    with torch.no_grad():
        assert difference(dense(images()), mask.apply_(model)(images())) < 1e-12 and found == mask


def test_costs_of_both_norms_are_counted() -> None:
    model = made()
    mask = ModelMask.random(model, 0.5, torch.Generator().manual_seed(0))
    small = gohsp.compress(model, mask)
    counted = gohsp.count(small)
    assert counted == gohsp.count(model, mask=mask)
    assert counted.params == sum(parameter.numel() for parameter in small.parameters())


def test_a_block_alone() -> None:
    torch.manual_seed(0)
    block = shaken(Block(24, 3, mlp_layer=GeGluMlp))
    mask, masked = random_mask(block, torch.Generator().manual_seed(1)), VisionTransformer(**SIZES)
    small, x = gohsp.compress_block(block, mask), torch.randn(2, 5, 24, dtype=torch.float64)
    masked.blocks[0] = block
    with torch.no_grad():
        mask.apply_(open_model(masked).blocks[0])
        assert difference(small(x), block(x)) < 1e-12
        assert difference(small(x, num_queries=2), block(x)[:, :2]) < 1e-12


def test_what_cannot_be_pruned_exactly_is_refused() -> None:
    model = made()
    model.blocks[1].mlp.norm = nn.BatchNorm1d(24)
    with pytest.raises(ValueError, match=r"cannot prune blocks\.1: mlp\.norm is BatchNorm1d; wanted LayerNorm or RMS"):
        ModelMask.full(model)
    model = made()
    model.blocks[0].mlp.w1 = nn.Bilinear(1, 1, 1)
    with pytest.raises(ValueError, match=r"cannot prune blocks\.0: mlp\.w1 is torch\.nn.*Bilinear"):
        ModelMask.full(model)
    model.blocks[0].mlp = GeGluMlp(24, 40, act_layer="hard_swish")
    with pytest.raises(ValueError, match=r"cannot prune blocks\.0: activation "):
        ModelMask.full(model)
    other = Beit(**SIZES)
    other.blocks[1].mlp = GeGluMlp(24, 40)
    with pytest.raises(ValueError, match=r"cannot prune blocks\.1: mlp is GeGluMlp; wanted timm's Mlp, GluMlp or"):
        ModelMask.full(other)
