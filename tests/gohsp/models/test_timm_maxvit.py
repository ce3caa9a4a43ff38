# SPDX-License-Identifier: Apache-2.0
"""What is timm's MaxxVit alone: windows and grids, heads apart, three kinds of positions, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from timm.models.maxxvit import AttentionCl, MaxxVit, PartitionAttentionCl
from torch import nn

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import open_model
from gohsp.models.timm_parts import HeadByHead
from gohsp.models.timm_positions import bias_of, why_positions
from tests.gohsp.models.zoo import MAXVIT, ZOO, difference, images, make

MAXVITS = [name for name in ZOO if name.startswith(("MaxViT", "MaxxViT"))]
EACH = pytest.mark.parametrize("name", MAXVITS)
needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


def pair(name: str = MAXVITS[0]) -> tuple[Any, Any]:
    """The masked dense model and the compressed one, in float64."""
    model = make(name)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


@EACH
def test_windows_and_grids_are_timms(name: str) -> None:
    model = make(name)
    for own in open_model(model).blocks:
        block, half = own.module, own.attention
        assert half.windows is not None
        width = half.geometry.dim
        block.attn.proj.weight.data.copy_(torch.eye(width))
        block.attn.proj.bias.data.zero_()
        tokens = half.windows.order.numel()
        x = torch.randn(3, tokens, width, dtype=torch.float64)
        side = round(tokens**0.5)
        with torch.no_grad():
            seen = half.norm(x)
            wanted = block._partition_attn(seen.unflatten(1, (side, side))).flatten(1, 2)
            assert difference(half.hidden(half.read(seen)), wanted) < 1e-12
        assert torch.equal(half.windows.join(half.windows.split(x)), x)


def test_a_matrix_of_heads_apart_is_seen_as_all_q_all_k_all_v() -> None:
    layer = nn.Linear(5, 3 * 2 * 4).double()
    seen, x = HeadByHead(layer, 2), torch.randn(3, 7, 5, dtype=torch.float64)
    with torch.no_grad():
        wanted = layer(x).unflatten(-1, (2, 3, 4)).transpose(2, 3).flatten(2)
        assert torch.equal(seen(x), wanted)
        assert difference(x @ seen.weight.T + seen.bias, wanted) < 1e-12
        weight, bias = seen.weight.clone(), seen.bias
        assert bias is not None
        seen.write_(2 * weight, 3 * bias)
        assert torch.equal(seen.weight, 2 * weight) and torch.equal(layer.bias, 3 * bias[seen._order.argsort()])
        by_head = seen.rows_by_head(layer.weight, 2)
        assert torch.equal(by_head, seen.weight.view(3, 2, 4, 5).transpose(0, 1)) and by_head._base is not None
        gone = torch.zeros(24, dtype=torch.bool)
        gone[4:8] = True  # q of the second head
        seen.clear_(rows=gone)
        assert torch.equal((layer.weight == 0).all(dim=1).nonzero().flatten(), torch.arange(12, 16))
        assert torch.equal(layer.bias == 0, (layer.weight == 0).all(dim=1))
    plain = HeadByHead(nn.Linear(5, 6, bias=False), 2)
    assert plain.bias is None
    plain.write_(plain.weight + 1)


@pytest.mark.parametrize("kind", [RelPosBias, RelPosBiasTf, RelPosMlp])
def test_positions_of_every_kind_are_a_table(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    source: Any = kind(window_size=(3, 4), num_heads=2)
    source = source.double()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
        wanted = source.eval().get_bias()
    found = bias_of(source.train())  # whose dropout a table has not
    assert found is not None and found.trains
    assert difference(found(1), wanted.view(1, 2, 12, 12)) < 1e-12
    assert why_positions(source) is None
    assert bias_of(source.requires_grad_(False)).trains is False  # type: ignore[union-attr]


@needs_cpu
@EACH
def test_frozen_in_every_format(name: str) -> None:
    masked, small = pair(name)
    with torch.no_grad():
        wanted = masked(images())
    for weights, most in (("float32", 1e-5), ("int8", 0.05)):
        result = gohsp.freeze(copy.deepcopy(small).float(), weights=weights)
        assert isinstance(result, MaxxVit)
        assert difference(result(images().float()), wanted) < most
    maps = result.forward_intermediates(images().float(), intermediates_only=True)
    assert [tuple(found.shape[1:]) for found in maps] == [(8, 16, 16), (24, 8, 8), (48, 4, 4)]


@pytest.mark.parametrize("name", [MAXVITS[0], *MAXVITS[2:]])  # what makes positions of the other drops neurons
def test_in_training_it_is_the_masked_one(name: str) -> None:
    masked, small = pair(name)
    x = [images(4).requires_grad_() for _ in range(2)]
    for model, given in zip((masked.train(), small.train()), x, strict=True):
        model(given).square().sum().backward()
    assert difference(x[1].grad, x[0].grad) < 1e-12
    with torch.no_grad():
        assert difference(small(images(4)), masked(images(4))) < 1e-12
    means = [[part.running_mean for part in of.modules() if isinstance(part, nn.BatchNorm2d)] for of in (small, masked)]
    assert all(difference(ours, theirs) < 1e-12 for ours, theirs in zip(*means, strict=True))


def test_a_path_is_dropped_for_an_image_and_not_for_a_window() -> None:
    model = timm.create_model("maxvit_tiny_tf_224", **MAXVIT, drop_path_rate=0.5).double().train()
    small = gohsp.compress(model, ModelMask.full(model))
    x = torch.randn(32, 4, 4, 48, dtype=torch.float64)
    with torch.no_grad():
        for name in ("attn_block", "attn_grid"):
            torch.manual_seed(0)
            ours = getattr(small.stages[1].blocks[1], name)(x)
            torch.manual_seed(0)
            theirs = getattr(model.stages[1].blocks[1], name)(x)
            assert difference(ours, theirs) < 1e-12
            kept = (ours != x).flatten(1).any(dim=1)
            assert kept.any() and not kept.all()


def test_it_is_pruned_by_every_way_that_looks_at_one_block_at_a_time() -> None:
    for name in MAXVITS[:2]:
        model, x = make(name), images(6)
        for method, options in (("gohsp", {"refine": 2}), ("taylor", {}), ("learned", {})):
            result = gohsp.prune(model, [x], {"macs": 0.8}, method, **options)
            assert result.report.pruned.macs <= 0.8 * result.report.dense.macs
            with torch.no_grad():
                assert difference(gohsp.compress(result.model, result.mask)(x), result.model(x)) < 1e-10
    with pytest.raises(ValueError, match="method: wanted one that looks at one block at a time"):
        gohsp.prune(model, [x], {"macs": 0.8}, "graph")


@EACH
def test_heads_in_principal_axes_are_the_same_function(name: str) -> None:
    model, x = make(name), images(6)
    result = gohsp.prune(model, [x], {"params": 1.0})
    assert result.mask.turned == ("qk", "v")
    with torch.no_grad():
        assert difference(result.model(x), model(x)) < 1e-9


def test_single_blocks_are_replaced_in_models_of_other_classes() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = make(MAXVITS[1])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inside(x)

    other = Other()
    fast = gohsp.accelerate(other)
    assert not any(type(part) is PartitionAttentionCl for part in fast.modules())
    with torch.no_grad():
        for side in (32, 64):
            x = torch.randn(2, 3, side, side, dtype=torch.float64)
            assert difference(fast(x), other(x)) < 1e-12


def test_images_of_other_sizes_that_windows_divide() -> None:
    masked, small = pair()
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        assert difference(small(x), masked(x)) < 1e-12
        assert difference(gohsp.densify(small)(x), masked(x)) < 1e-12
    with pytest.raises(ValueError, match=r"wanted \(32, 32\), which the windows are made for, got \(64, 96\)"):
        gohsp.count(small, (64, 96))
    with pytest.raises(ValueError, match=r"wanted \(32, 32\), which the windows are made for, got \(64, 96\)"):
        gohsp.prune(make(MAXVITS[0]), [x.expand(4, -1, -1, -1)], {"params": 0.9})
    with pytest.raises(ValueError, match="wanted the dense model, whose set_input_size gives it another"):
        small.set_input_size((64, 64))


def test_what_is_made_plain_can_be_given_another_size() -> None:
    model = make(MAXVITS[0])
    plain: Any = gohsp.densify(gohsp.compress(model, ModelMask.full(model)))
    assert type(plain.stages[0].blocks[0].attn_grid.attn) is AttentionCl
    size = {"img_size": (64, 64), "window_size": (8, 4), "grid_size": (4, 8)}
    for one in (plain, model):
        one.set_input_size(**size)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        assert difference(plain(x), model(x)) < 1e-3  # timm interpolates in single precision
    small = gohsp.compress(model, ModelMask.full(model))
    with torch.no_grad():
        assert difference(small(x), model(x)) < 1e-12


@pytest.mark.slow
@EACH
def test_compiled_it_is_the_same(name: str) -> None:
    masked, small = pair(name)
    with torch.no_grad():
        assert difference(torch.compile(small, backend="aot_eager")(images()), masked(images())) < 1e-12


@pytest.mark.slow
def test_it_learns_from_the_dense_models_stream() -> None:
    pytest.importorskip("accelerate")
    model = make(MAXVITS[0]).float()
    data = [(image.float(), index % 5) for index, image in enumerate(images(6))]
    small = gohsp.compress(model, ModelMask.random(model, 0.7, torch.Generator().manual_seed(2)))
    fit, distill = gohsp.Fit(epochs=1, batch_size=2), gohsp.Distillation(features=1.0)
    trained = gohsp.train(small, data, fit=fit, distill=distill, teacher=model)
    assert all(torch.isfinite(parameter).all() for parameter in trained.model.parameters())


COAT = {"img_size": 64, "embed_dim": (16, 32), "depths": (1, 1), "stem_width": 8, "transformer_dim_head": 8}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "partitions side by side": ("maxvit_tiny_pm_256", {**MAXVIT, "transformer_grid_size": (4, 2)}, "got ParallelMaxx"),
    "channels first": (
        *("maxvit_pico_rw_256", {**MAXVIT, "transformer_use_nchw_attn": True}),
        "prune stages.0.blocks.0.attn_block: wanted timm's PartitionAttentionCl, got PartitionAttention2d",
    ),
    "windows that do not divide": (
        *("maxvit_tiny_tf_224", {**MAXVIT, "transformer_window_size": (3, 2)}),
        r"stages.0.blocks.0.attn_block: windows of \(3, 2\) do not divide its \(8, 8\) tokens",
    ),
    "grids that do not divide": (
        *("maxvit_tiny_tf_224", {**MAXVIT, "transformer_grid_size": (8, 2)}),
        r"stages.1.blocks.0.attn_grid: grids of \(8, 2\) do not divide its \(4, 4\) tokens",
    ),
}


def test_coatnet_is_of_the_same_class_and_none_of_its_own() -> None:
    with pytest.raises(TypeError, match=r"model: wanted .* a timm MaxxVit \(not a subclass\).* got .*MaxxVit"):
        ModelMask.full(timm.create_model("coatnet_0_rw_224", **COAT))


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_pruned_exactly_is_refused(case: str) -> None:
    name, options, reason = REFUSED[case]
    model = timm.create_model(name, **options)
    with pytest.raises(ValueError, match=reason):
        ModelMask.full(model)


def test_attention_and_positions_of_other_classes_are_refused() -> None:
    class Other(AttentionCl):
        pass

    class Others(RelPosBias):
        pass

    model = make(MAXVITS[0])
    block = model.stages[0].blocks[0].attn_block
    rel_pos, block.attn.rel_pos = block.attn.rel_pos, Others((4, 2), 3)
    with pytest.raises(ValueError, match=r"attn\.rel_pos is Others; wanted timm's RelPosBias, RelPosBiasTf or"):
        ModelMask.full(model)
    block.attn.rel_pos, block.attn.__class__ = rel_pos, Other
    with pytest.raises(ValueError, match="block: cannot prune it: attn is Other; wanted timm's AttentionCl"):
        gohsp.BlockMask.of_block(block)
