# SPDX-License-Identifier: Apache-2.0
"""What every family promises, on every class that gohsp takes: the masked dense model in float64 is the judge.

`GOHSP_AGREEMENT_MASKS=20` draws 20 masks for each class.
"""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers import AttentionRope
from timm.models.eva import EvaAttention
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import FIELDS, ModelMask
from gohsp.models.base import logits_of
from gohsp.models.registry import family_of, open_model
from tests.gohsp.models.zoo import SIDE, ZOO, difference, images, make, tensors

EACH = pytest.mark.parametrize("name", list(ZOO))
GROUPS = ("heads", "qk", "v", "hidden", "attn_in", "attn_out", "mlp_in", "mlp_out")


def masks(model: nn.Module) -> list[ModelMask]:
    """Some of all fields, among them one that takes nothing and one that leaves blocks next to nothing."""
    narrow = {"heads": 0.3, "hidden": 0.1, "attn_out": 0.2, "mlp_in": 0.2}
    if any(size.writes_whole for size in open_model(model).geometry.blocks):
        del narrow["attn_out"]
    shares: list[Any] = [0.7, dict.fromkeys(FIELDS, 1.0), narrow]
    more = [0.3 + 0.03 * number for number in range(int(os.environ.get("GOHSP_AGREEMENT_MASKS", "3")) - 3)]
    return [ModelMask.random(model, keep, torch.Generator().manual_seed(i)) for i, keep in enumerate([*shares, *more])]


def compressed(model: nn.Module) -> Any:
    return gohsp.compress(model, ModelMask.random(model, 0.7, torch.Generator().manual_seed(3)))


@EACH
def test_compressed_plain_and_frozen_it_is_the_masked_one(name: str) -> None:
    model, x = make(name), images()
    for mask in masks(model):
        masked, small = mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)
        assert isinstance(small, type(model))
        plain = gohsp.densify(small)
        assert type(plain) is type(model)
        assert not any(type(part).__module__.startswith("gohsp.layers.compact") for part in plain.modules())
        with torch.no_grad():
            wanted = masked(x)
            assert difference(small(x), wanted) < 1e-12
            assert difference(plain(x), wanted) < 1e-12
            if gk.can_run("cpu"):
                single = small.float()
                assert difference(single(x.float()), wanted) < 1e-5
                assert difference(gohsp.freeze(single)(x.float()), wanted) < 1e-5


# Theirs compute biases of relative positions, and have no place for a table.
@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("Swin v2")])
def test_heads_of_one_width_become_the_librarys_own_attention(name: str) -> None:
    model, x = make(name), images()
    # Their attention has as many channels as the residual stream.
    heads = 1.0 if any(kind in name for kind in ("torchvision", "BEiT", "relative", "NesT")) else 0.7
    mask = ModelMask.random(model, {"heads": heads, "hidden": 0.5}, torch.Generator().manual_seed(0))
    plain = gohsp.densify(gohsp.compress(model, mask))
    opened = open_model(model)
    by_head = any(block.attention.rope is not None and block.attention.rope.shape[1] > 1 for block in opened.blocks)
    normed = any(not isinstance(half.inner_norm, nn.Identity) for half in opened.sublayers)
    if by_head or normed:  # timm's own has the positions of all heads, and its norms are over all columns
        shares = {} if normed else {"hidden": 0.5}
        mask = ModelMask.random(model, shares, torch.Generator().manual_seed(0))
        plain = gohsp.densify(gohsp.compress(model, mask))
    # EvaAttention wants as many channels as the stream has features; AttentionRope is the same without that.
    theirs = [{EvaAttention: AttentionRope}.get(type(b.attention.body), type(b.attention.body)) for b in opened.blocks]
    assert sum(isinstance(part, theirs[0]) for part in plain.modules()) >= len(theirs)
    assert len(open_model(plain).blocks) == len(theirs)  # and so it can be pruned further
    with torch.no_grad():
        assert difference(plain(x), mask.apply_(model)(x)) < 1e-12


@EACH
def test_the_open_model_computes_what_the_model_does(name: str) -> None:
    model, x = make(name), images()
    opened = open_model(model)
    seen: list[Any] = []
    hooks = [block.module.register_forward_hook(lambda module, args, out: seen.append(out)) for block in opened.blocks]
    with torch.no_grad():
        answer = model(x)
        for hook in hooks:
            hook.remove()
        stream = opened.embed(x)
        for layer in opened.sublayers:
            stream = layer.trace(layer.enter(stream)).after
        behind = getattr(opened.blocks[-1].module, "norm3", nn.Identity())
        assert difference(behind(stream), seen[-1].flatten(1, -2)) < 1e-12  # of some models [B, H, W, D]
        assert opened.features(stream).shape[0] == len(x)
        logits = opened.family.answers(model, stream)
    if logits is not None:
        assert difference(logits, logits_of(answer)) < 1e-12
    else:
        assert not hasattr(answer, "logits")
    places = opened.family.stream_places(model)
    assert [block.module for block in opened.blocks] == places[: len(opened.blocks)]
    assert opened.family.stream_shape(model) == (len(opened.blocks), *stream.shape[1:])


@pytest.mark.slow
@EACH
def test_costs_are_those_of_the_parameters_and_products(name: str) -> None:
    model = make(name)
    mask = masks(model)[0]
    small = gohsp.compress(model, mask)
    counted = gohsp.count(small)
    assert counted == gohsp.count(model, mask=mask)
    assert counted.params == sum(parameter.numel() for parameter in small.parameters())
    assert "MACs" in mask.summary(model)
    assert gohsp.count(model).params == sum(parameter.numel() for parameter in model.parameters())
    # On the meta device attention is spelled out as the products that torch's counter knows.
    shadow: Any = copy.deepcopy(model).float().to("meta").requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        shadow(torch.empty(1, 3, SIDE, SIDE, device="meta"))
    # What makes biases of relative positions reads no image.
    with FlopCounterMode(display=False) as of_biases:
        for part in shadow.modules():
            for call in ("get_bias", "_relative_positional_encodings"):
                getattr(part, call, lambda: None)()
            if hasattr(part, "cpb_mlp"):
                part.cpb_mlp(part.relative_coords_table)
    assert gohsp.count(model).macs == (counter.get_total_flops() - of_biases.get_total_flops()) // 2


@pytest.mark.slow
@EACH
def test_saved_and_loaded_copied_and_pickled_it_is_the_same(name: str, tmp_path: Path) -> None:
    small, x = compressed(make(name)), images()
    gohsp.save(small, tmp_path)
    with torch.no_grad():
        wanted = small(x)
        loaded = gohsp.load(tmp_path)
        assert type(loaded) is type(small)
        for other in (loaded, pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
            assert all(map(torch.equal, tensors(other(x)), tensors(wanted)))
    family = family_of(small)
    assert family.image_shape(loaded) == (3, SIDE, SIDE)


@EACH
def test_gradients_are_those_of_the_masked_model(name: str) -> None:
    model, x = make(name), images()
    mask = masks(model)[0]
    masked, small = mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for one, given in zip((masked, small), inputs, strict=True):
        sum(tensor.square().sum() for tensor in tensors(one(given))).backward()
    assert difference(inputs[1].grad, inputs[0].grad) < 1e-12
    before = {name: parameter.grad is not None for name, parameter in small.named_parameters()}
    assert any(before.values())
    # What is left of a row or column has the gradient that the row or column of the masked one has there.
    block, kept = open_model(masked).blocks[0], mask.blocks[0].layout()
    fc2 = block.mlp.write.layers[0].weight.grad
    rows = slice(None) if kept.mlp_out is None else kept.mlp_out
    compact = next(part for part in small.modules() if hasattr(part, "mlp") and hasattr(part, "geometry"))
    assert difference(compact.mlp.fc2.weight.grad, fc2[rows][:, kept.hidden]) < 1e-12


@pytest.mark.slow
@EACH
def test_it_is_ranked_and_pruned_in_all_groups(name: str) -> None:
    model, x = make(name), images(6)
    heads = [(block.geometry.num_heads,) for block in open_model(model).blocks]
    assert [scores.shape for scores in gohsp.rank_heads(model, [x])] == heads
    sizes = open_model(model).geometry.blocks
    whole = {"qk"} if any(size.qk_whole for size in sizes) else set()
    whole |= {"attn_out", "mlp_out"} if any(size.writes_whole for size in sizes) else set()
    groups = [group for group in GROUPS if group not in whole]
    result = gohsp.prune(model, [x], {"params": 0.75}, groups=groups)
    assert result.report.pruned.params <= 0.75 * result.report.dense.params
    with torch.no_grad():
        assert difference(gohsp.compress(result.model, result.mask)(x), result.model(x)) < 1e-10


@pytest.mark.parametrize("name", [name for name in ZOO if "ForImage" in name])
def test_a_classifier_is_trained_and_judged(name: str) -> None:
    pytest.importorskip("accelerate")
    model = make(name).float()
    data = [(image.float(), index % 5) for index, image in enumerate(images(6))]
    small = compressed(model)
    fit = gohsp.Fit(epochs=1, batch_size=2)
    trained = gohsp.train(small, data, fit=fit, distill=gohsp.Distillation(), teacher=model, test=data)
    assert type(trained.model) is type(small)
    changed = [not torch.equal(a, b) for a, b in zip(trained.model.parameters(), small.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 2
