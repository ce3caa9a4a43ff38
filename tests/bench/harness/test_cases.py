# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gohsp
from bench.harness import cases
from bench.harness.cases import Case, Workload, load

from ..conftest import TINY


@pytest.mark.parametrize(("preset", "heads", "hidden"), [("dense", 3, 768), ("2x300", 2, 300), ("1x16", 1, 16)])
def test_uniform_presets_keep_so_many_heads_and_neurons_in_every_block(preset: str, heads: int, hidden: int) -> None:
    work = load(Case(TINY, preset))
    assert work.uniform == (heads, hidden)
    for block in work.mask.blocks:
        layout = block.layout()
        assert (layout.qk_widths, layout.v_widths) == ((64,) * heads, (64,) * heads)
        assert layout.hidden.tolist() == list(range(hidden))
        assert layout.attn_in is layout.attn_out is layout.mlp_in is layout.mlp_out is None


def test_base35_is_deit_base_with_35_percent_of_its_parameters_gone() -> None:
    work = load(Case("deit_base_patch16_224", "base35"))
    assert work.uniform == (8, 1920)
    assert work.count.params / work.dense_count.params == pytest.approx(0.65, abs=0.01)


@pytest.mark.parametrize(
    ("model", "preset", "params", "macs"),
    [("deit_small_patch16_224", "4x960", 14.37e6, 2.97e9), ("deit_tiny_patch16_224", "3x384", 3.94e6, 0.905e9)],
)
def test_presets_have_the_published_sizes(model: str, preset: str, params: float, macs: float) -> None:
    work = load(Case(model, preset))
    assert work.count.params == pytest.approx(params, rel=0.002)
    assert work.count.macs == pytest.approx(macs, rel=0.002)


def test_ragged_differs_from_head_to_head_block_to_block_and_matrix_to_matrix(ragged_work: Workload) -> None:
    layouts = [block.layout() for block in ragged_work.mask.blocks]
    assert all(len(layout.heads) == 2 for layout in layouts)  # a quarter of three heads, rounded
    assert all(len({*layout.qk_widths, *layout.v_widths}) > 2 for layout in layouts)
    assert layouts[0].hidden.numel() != layouts[1].hidden.numel()
    columns = [getattr(layouts[0], name) for name in ("attn_in", "attn_out", "mlp_in", "mlp_out")]
    assert all(kept is not None and 0 < kept.numel() < 192 for kept in columns)
    assert len({tuple(kept.tolist()) for kept in columns}) == 4


def test_ragged_is_the_same_mask_every_time(ragged_work: Workload) -> None:
    assert load(Case(TINY, "ragged")).mask == ragged_work.mask


def test_ragged_share_sets_how_much_is_kept() -> None:
    macs = [load(Case(TINY, preset)).count.macs for preset in ("ragged:0.3", "ragged:0.6", "ragged:.9", "ragged:1")]
    assert macs == sorted(macs)
    full = load(Case(TINY, "ragged:1")).mask.blocks[0]
    assert bool(full.hidden.all()) and bool(full.qk.all()) and int(full.heads.sum()) == 2


def test_ragged_keeps_the_qk_channels_of_a_model_with_qk_norm() -> None:
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, embed_dim=64, depth=1, num_heads=2, qk_norm=True)
    mask = cases.ragged(gohsp.ModelMask.full(model))
    mask.validate(model)
    assert bool(mask.blocks[0].qk.all()) and not bool(mask.blocks[0].v.all())


def test_preset_may_be_a_mask_file(tmp_path: Path, ragged_work: Workload) -> None:
    path = tmp_path / "mask.json"
    ragged_work.mask.save(path)
    work = load(Case(TINY, str(path)))
    assert work.mask == ragged_work.mask
    assert work.uniform is None
    assert work.case.label == f"{TINY}/mask.json"


@pytest.mark.parametrize("preset", ["4x", "x960", "ragged:2", "ragged:0", "sparse", "no/such/mask.json", ""])
def test_unknown_preset_names_the_known_ones(preset: str) -> None:
    with pytest.raises(ValueError, match=r"preset: wanted dense, HEADSxNEURONS .*; got"):
        load(Case(TINY, preset))


def test_preset_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="heads: wanted a whole number from 0 to 3, got 4"):
        load(Case(TINY, "4x960"))


def test_masks_of_another_model_are_refused(tmp_path: Path, ragged_work: Workload) -> None:
    path = tmp_path / "mask.json"
    ragged_work.mask.save(path)
    with pytest.raises(ValueError, match="made for"):
        load(Case("deit_tiny_patch16_224", str(path)))


def test_weights_are_the_same_every_time_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second = load(Case(TINY, "dense")).dense, load(Case(TINY, "dense")).dense
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_constants_are_not_those_that_hide_errors(ragged_work: Workload) -> None:
    block = ragged_work.dense.blocks[0]
    for bias in (block.attn.qkv.bias, block.attn.proj.bias, block.mlp.fc1.bias, block.mlp.fc2.bias, block.norm1.bias):
        assert int((bias == 0).sum()) == 0
    assert float(block.norm1.weight.std()) > 0.05


def test_layer_scale_is_not_a_thousandth() -> None:
    work = load(Case("vit_small_patch14_dinov2", "dense", image_size=28))
    assert float(work.dense.blocks[0].ls1.gamma.min()) >= 0.5


def test_rotary_positions_leave_whole_heads_and_layer_scale_that_counts() -> None:
    work = load(Case("vit_small_patch16_dinov3", "ragged", image_size=32))
    assert float(work.dense.blocks[0].gamma_1.min()) >= 0.5
    assert all(bool(block.qk[block.heads].all()) and not bool(block.v.all()) for block in work.mask.blocks)


def test_models_of_a_workload_compute_the_same_and_not_what_the_dense_one_does(ragged_work: Workload) -> None:
    x = ragged_work.images(2)
    with torch.no_grad():
        expected = ragged_work.masked_in_double()(x.double())
        for model in (ragged_work.masked, ragged_work.sliced):
            torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)
        assert float((ragged_work.dense(x) - expected).norm() / expected.norm()) > 0.1


def test_image_size_changes_the_tokens_and_the_label() -> None:
    work = load(Case(TINY, "dense", image_size=64))
    assert work.images(3).shape == (3, 3, 64, 64)
    assert work.count.tokens == 17
    assert work.case.label == f"{TINY}@64/dense"
