# SPDX-License-Identifier: Apache-2.0
"""Frozen models: the same results, half the memory, and a clear no to whatever needs the compact weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import gohsp
import gohsp_kernels as gk
from gohsp.layers import FrozenEmbedding
from gohsp.masks.mask import ModelMask
from gohsp_kernels.formats import FORMATS

from .conftest import randomize

pytestmark = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


@pytest.fixture(params=["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def compact(request: pytest.FixtureRequest, make_model: Callable[..., Any]) -> Any:
    model = make_model(request.param).float()
    return gohsp.compress(model, ModelMask.random(model, 0.7, torch.Generator().manual_seed(3)))


def test_same_results(compact: Any, images: Callable[..., Tensor]) -> None:
    x, frozen = images().float(), gohsp.freeze(compact)
    assert isinstance(frozen.patch_embed, FrozenEmbedding)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), compact(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(frozen.forward_features(x), compact.forward_features(x), rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(frozen.forward_intermediates(x)[1], compact.forward_intermediates(x)[1], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        tokens = x_tokens(compact, x)
        torch.testing.assert_close(x_tokens(frozen, x), tokens, rtol=1e-5, atol=1e-5)
        assert torch.equal(frozen.blocks[0](frozen.blocks[1](tokens)), compact.blocks[0](compact.blocks[1](tokens)))


def x_tokens(model: Any, x: Tensor) -> Tensor:
    return model.norm_pre(model._pos_embed(model.patch_embed(x)))


EMBEDDINGS = {
    "registers": {"reg_tokens": 3},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "positions of patches only": {"no_embed_class": True, "reg_tokens": 2},
    "no positions": {"pos_embed": "none"},
    "oblong": {"img_size": (32, 64), "patch_size": (8, 16)},
    "grey": {"in_chans": 1},
    "dropout": {"pos_drop_rate": 0.5},
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_tokens_of_any_plain_embedding(name: str, request: pytest.FixtureRequest) -> None:
    torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    arguments: dict[str, Any] = {"img_size": 48, "depth": 1, "num_classes": 5} | EMBEDDINGS[name]
    model = randomize(timm.create_model("vit_tiny_patch16_224", **arguments))
    compact: Any = gohsp.compress(model, ModelMask.full(model)).train()
    frozen: Any = gohsp.freeze(compact)
    assert isinstance(frozen.patch_embed, FrozenEmbedding)
    compact.eval()
    height, width = compact.patch_embed.img_size
    x = torch.randn(3, compact.patch_embed.proj.in_channels, height, width)
    with torch.no_grad():
        expected = compact.double().norm_pre(compact._pos_embed(compact.patch_embed(x.double())))
        result = x_tokens(frozen, x)
    assert (result - expected).norm() / expected.norm() < 1e-6


def test_other_embeddings_stay_as_they_are(images: Callable[..., Tensor]) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, depth=1, num_classes=5, dynamic_img_size=True)
    compact: Any = gohsp.compress(model, ModelMask.full(model)).eval()
    frozen: Any = gohsp.freeze(compact)
    assert type(frozen.patch_embed) is type(compact.patch_embed)
    with torch.no_grad():
        for side in (48, 64):
            torch.testing.assert_close(frozen(images(2, side).float()), compact(images(2, side).float()))


def test_weights_are_held_once(make_model: Callable[..., Any], images: Callable[..., Tensor]) -> None:
    model = make_model().float()
    compact = gohsp.compress(model, ModelMask.full(model))
    size = sum(p.numel() for p in compact.blocks.parameters())
    frozen = gohsp.freeze(compact)
    assert not list(frozen.blocks.parameters())
    packed = sum(s.panels.numel() for block in frozen.blocks for s in block.chain.sublayers)
    assert 0.95 * size < packed < 1.05 * size
    gone = weakref.ref(compact.blocks[0].mlp.fc1.weight)
    del compact
    gc.collect()
    assert gone() is None
    with torch.no_grad():
        assert torch.isfinite(frozen(images().float())).all()


def size(block: Any) -> int:
    return sum(s.panels.nbytes for s in block.chain.sublayers)


def test_int8_is_close_and_takes_a_quarter(compact: Any, images: Callable[..., Tensor]) -> None:
    x, same, frozen = images().float(), gohsp.freeze(compact), gohsp.freeze(compact, weights="int8")
    assert not list(frozen.blocks.parameters())
    (first, last), (first_int8, last_int8) = (map(size, model.blocks) for model in (same, frozen))
    assert 0.2 < first_int8 / first < 0.35  # scales, sums and idle lanes of narrow panels come to the quarter
    if gk.can_run("cpu", weights="bfloat16"):
        assert 0.5 < last_int8 / last < 0.6
    else:
        assert last_int8 == last  # which stays in float32
    with torch.no_grad():
        expected, result = compact(x), frozen(x)
        error = float((result - expected).norm() / expected.norm())
        assert 1e-4 < error < 0.05
        assert torch.equal(frozen.forward_features(x)[:, :1], frozen.norm(frozen.blocks(x_tokens(frozen, x)))[:, :1])
        torch._dynamo.reset()
        compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), result, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(not gk.can_run("cpu", weights="bfloat16"), reason=gk.can_run("cpu", weights="bfloat16").reason)
def test_bfloat16_is_closer_and_takes_half(compact: Any, images: Callable[..., Tensor]) -> None:
    x, same, frozen = images().float(), gohsp.freeze(compact), gohsp.freeze(compact, weights="bfloat16")
    assert not list(frozen.blocks.parameters())
    for ours, theirs in zip(frozen.blocks, same.blocks, strict=True):
        assert 0.45 < size(ours) / size(theirs) < 0.65  # inputs are padded to 32
    with torch.no_grad():
        expected, result = compact(x), frozen(x)
        assert 1e-4 < float((result - expected).norm() / expected.norm()) < 0.01
        torch._dynamo.reset()
        compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), result, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(bool(gk.can_run("cpu", weights="bfloat16")), reason="this CPU takes them")
def test_bfloat16_is_refused_without_tiles(compact: Any) -> None:
    with pytest.raises(RuntimeError, match="backend 'cpu': needs AMX, or AVX512_BF16 or Arm's BF16 at a gain"):
        gohsp.freeze(compact, weights="bfloat16")


@pytest.mark.parametrize("seed", range(3))
def test_int8_deit_tiny_computes_what_its_description_does(seed: int, images: Callable[..., Tensor]) -> None:
    """A model with a random mask, every matrix of it cut, block by block against plain PyTorch with integer products.

    Block by block, because a value that is rounded the other way in one block disturbs all later ones as much as the
    quantisation itself does.
    """
    model = randomize(timm.create_model("deit_tiny_patch16_224", img_size=96, num_classes=10)).eval()
    compact: Any = gohsp.compress(model, ModelMask.random(model, 0.6, torch.Generator().manual_seed(seed)))
    frozen: Any = gohsp.freeze(compact, weights="int8")
    with torch.no_grad():
        x = images(2, 96, seed).float()
        tokens = x_tokens(frozen, x)
        for block, ours in zip(compact.blocks, frozen.blocks, strict=True):
            truth, result, exact = tokens.double(), ours(tokens), block(tokens)
            form = "int8"
            if block is compact.blocks[-1]:
                form = "bfloat16" if gk.can_run("cpu", weights="bfloat16") else "float32"
            for sublayer in block.sublayers():
                descriptor = gk.chain.descriptor(sublayer)
                attention = gk.cpu.reference_attention(form)
                truth = FORMATS[form].reference(descriptor, truth, gk.cpu.activation_levels(), attention)
            change = (truth - tokens).norm()
            # Attention in pairs rounds q, k, v and shares too, and each of them may go the other way.
            assert (result - truth).norm() / change < (1e-3 if attention is gk.reference.ragged_attention else 2e-3)
            least, most = {"int8": (2e-3, 0.1), "bfloat16": (1e-4, 0.01), "float32": (-1, 1e-5)}[form]
            assert least < (result - exact).norm() / change < most
            tokens = result
        logits = frozen.head(frozen.norm(tokens)[:, 0])
        assert (frozen(x) - logits).norm() / logits.norm() < 1e-4


def test_later_changes_of_the_compact_model_do_not_reach_it(compact: Any, images: Callable[..., Tensor]) -> None:
    x, frozen = images().float(), gohsp.freeze(compact)
    with torch.no_grad():
        before = frozen(x)
        compact.blocks[0].mlp.fc1.weight.mul_(3)
        assert torch.equal(frozen(x), before)
        assert not torch.equal(compact(x), before)


def test_compiles_and_exports(compact: Any, images: Callable[..., Tensor]) -> None:
    x, frozen = images().float(), gohsp.freeze(compact)
    torch._dynamo.reset()
    with torch.no_grad():
        eager = frozen(x)
        compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), eager, rtol=1e-4, atol=1e-4)
        assert torch.allclose(torch.export.export(frozen, (x,)).module()(x), eager, rtol=1e-4, atol=1e-4)


def test_refusals(compact: Any, make_model: Callable[..., Any], images: Callable[..., Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: wanted a model made by"):
        gohsp.freeze(make_model())
    with pytest.raises(ValueError, match="weights: wanted float32 on the cpu"):
        gohsp.freeze(compact.double())
    with pytest.raises(ValueError, match="weights: wanted one of 'float32', 'bfloat16', 'int8'; got 'int4'"):
        gohsp.freeze(compact.float(), weights="int4")
    frozen = gohsp.freeze(compact.float())
    for needs_weights in (lambda: gohsp.save(frozen, tmp_path / "m"), lambda: gohsp.count(frozen)):
        with pytest.raises(ValueError, match="model: it is frozen"):
            needs_weights()
    with pytest.raises(ValueError, match=r"x: wanted float32 \[batch, tokens, \d+\] on the cpu; got torch.float64"):
        frozen.blocks(images().double().flatten(1).unsqueeze(0))
    for wrong in (images().double(), images(2, 64).float(), images().float()[:, :1], images().float()[0]):
        with pytest.raises(ValueError, match=r"x: wanted float32 images \[B, 3, 48, 48\], got torch.float"):
            frozen(wrong)
