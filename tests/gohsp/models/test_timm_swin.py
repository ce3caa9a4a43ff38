# SPDX-License-Identifier: Apache-2.0
"""What is timm's SwinTransformer alone: windows, stages, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import open_model
from tests.gohsp.models.zoo import difference, images, make

SWIN = "Swin, three stages"
SIZES = {"img_size": 32, "patch_size": 2, "embed_dim": 24, "depths": (2, 3, 1), "num_heads": (3, 6, 12)}
needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


def pair() -> tuple[Any, Any]:
    """The masked dense model and the compressed one, in float64."""
    model = make(SWIN)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


def test_windows_are_timms_shifted_ones() -> None:
    model = make(SWIN)
    for block in model.layers[0].blocks:
        block.attn.proj.weight.data.copy_(torch.eye(24))
        block.attn.proj.bias.data.zero_()
    plain, shifted = (block.attention for block in open_model(model).blocks[:2])
    assert not model.layers[0].blocks[0].shift_size[0] and all(model.layers[0].blocks[1].shift_size)
    x = torch.randn(3, 256, 24, dtype=torch.float64)
    with torch.no_grad():
        for own, block in ((plain, model.layers[0].blocks[0]), (shifted, model.layers[0].blocks[1])):
            seen = own.norm(x)
            assert (
                difference(own.hidden(own.read(seen)), block._attn(seen.unflatten(1, (16, 16))).flatten(1, 2)) < 1e-12
            )
            assert own.windows is not None
            assert torch.equal(own.windows.join(own.windows.split(x)), x)


@needs_cpu
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_frozen_in_every_format(weights: str) -> None:
    masked, small = pair()
    with torch.no_grad():
        wanted = masked(images())
    result = gohsp.freeze(small.float(), weights=weights)
    assert isinstance(result, SwinTransformer)
    assert difference(result(images().float()), wanted) < (1e-5 if weights == "float32" else 0.05)
    intermediate = result.forward_intermediates(images().float(), intermediates_only=True)
    assert [tuple(found.shape[1:]) for found in intermediate] == [(24, 16, 16), (48, 8, 8), (96, 4, 4)]


def test_it_is_pruned_by_every_way_that_looks_at_one_block_at_a_time() -> None:
    model, x = make(SWIN), images(6)
    for method, options in (("gohsp", {"refine": 2}), ("taylor", {}), ("random", {})):
        result = gohsp.prune(model, [x], {"macs": 0.6}, method, **options)
        assert result.report.pruned.macs <= 0.6 * result.report.dense.macs
        with torch.no_grad():
            assert difference(gohsp.compress(result.model, result.mask)(x), result.model(x)) < 1e-10
    with pytest.raises(ValueError, match="method: wanted one that looks at one block at a time"):
        gohsp.prune(model, [x], {"macs": 0.6}, "graph")
    with pytest.raises(ValueError, match="wanted blocks that agree on it"):
        gohsp.LatencyTable.measure(model.float(), rounds=1)


def test_heads_in_principal_axes_are_the_same_function() -> None:
    model, x = make(SWIN), images(6)
    result = gohsp.prune(model, [x], {"params": 1.0})
    assert result.mask.turned == ("qk", "v")
    with torch.no_grad():
        assert difference(result.model(x), model(x)) < 1e-9


def test_pruning_keeps_more_than_chance() -> None:
    model, x = make(SWIN), images(16)
    with torch.no_grad():
        wanted = model(x)
        errors = {
            method: difference(gohsp.prune(model, [x], {"params": 0.6}, method, optimiser=how).model(x), wanted)
            for method, how in (("gohsp", "ridge"), ("random", "drop"))
        }
    assert errors["gohsp"] < 0.8 * errors["random"]


def test_a_path_is_dropped_for_an_image_and_not_for_a_window() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", **SIZES, window_size=4, drop_path_rate=0.5).double()
    small = gohsp.compress(model, ModelMask.full(model)).train()
    block = small.layers[1].blocks[2]
    x = torch.randn(64, 8, 8, 48, dtype=torch.float64)
    with torch.no_grad():
        kept = [(block(x[:1]) != x[:1]).flatten(0, 2).any(dim=1) for _ in range(8)]
        assert all(found.all() or not found.any() for found in kept)
        torch.manual_seed(0)
        ours = block(x)
        torch.manual_seed(0)
        theirs = model.train().layers[1].blocks[2](x)
    assert difference(ours, theirs) < 1e-12


@pytest.mark.slow
def test_it_learns_from_the_dense_models_stream() -> None:
    pytest.importorskip("accelerate")
    model = make(SWIN).float()
    data = [(image.float(), index % 5) for index, image in enumerate(images(6))]
    small = gohsp.compress(model, ModelMask.random(model, 0.7, torch.Generator().manual_seed(2)))
    fit, distill = gohsp.Fit(epochs=1, batch_size=2), gohsp.Distillation(features=1.0)
    trained = gohsp.train(small, data, fit=fit, distill=distill, teacher=model)
    assert all(torch.isfinite(parameter).all() for parameter in trained.model.parameters())


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    masked, small = pair()
    with torch.no_grad():
        assert difference(torch.compile(small, backend="aot_eager")(images()), masked(images())) < 1e-12


def test_single_blocks_are_replaced_in_models_of_other_classes() -> None:
    class Other(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = make(SWIN)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside.layers(self.inside.patch_embed(x))

    other, x = Other(), images()
    fast = gohsp.accelerate(other)
    assert not any(type(part) is SwinTransformerBlock for part in fast.modules())
    with torch.no_grad():
        assert difference(fast(x), other(x)) < 1e-12


def test_maps_of_another_size_are_refused() -> None:
    _, small = pair()
    with pytest.raises(ValueError, match=r"x: wanted a map of \(16, 16\) tokens, which the windows are for"):
        small.layers[0].blocks[0](torch.randn(1, 8, 8, 24, dtype=torch.float64))
    with pytest.raises(ValueError, match="wanted the dense model, whose set_input_size gives it another"):
        small.set_input_size((64, 64))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "windows that do not divide": ({"window_size": 7}, r"windows of \(7, 7\) do not divide its \(16, 16\) tokens"),
    "images of any size": ({"window_size": 4, "strict_img_size": False}, "wanted strict_img_size"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_exactly_is_refused(case: str) -> None:
    options, reason = REFUSED[case]
    model = timm.create_model("swin_tiny_patch4_window7_224", **SIZES, **options)
    with pytest.raises(ValueError, match=reason):
        ModelMask.full(model)
