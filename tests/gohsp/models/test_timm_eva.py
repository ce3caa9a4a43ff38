# SPDX-License-Identifier: Apache-2.0
"""What is timm's Eva alone: rotary positions of other images, those that are learnt, and what is refused."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.eva import Eva

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import family_of
from gohsp.models.timm_eva import angles_of
from tests.gohsp.models.zoo import difference, images, make

DINO, MIXED = "DINOv3", "rotary positions of every block and head"
needs_cpu = pytest.mark.skipif(not gk.can_run("cpu"), reason=gk.can_run("cpu").reason)


def pair(name: str) -> tuple[Any, Any]:
    """The masked dense model and the compressed one, in float64."""
    model = make(name)
    mask = ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))
    return mask.apply_(copy.deepcopy(model)), gohsp.compress(model, mask)


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
@pytest.mark.parametrize("by_head", [False, True])
def test_angles_are_those_that_timm_turns_by(pairs: str, by_head: bool) -> None:
    from timm.layers import apply_rot_embed_cat

    from gohsp_kernels.reference import turned

    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    angles = torch.randn(3, 5, 4, dtype=torch.float64) if by_head else torch.randn(5, 4, dtype=torch.float64)
    both = torch.cat((angles, angles), -1) if pairs == "halves" else angles.repeat_interleave(2, dim=-1)
    rope = torch.cat((both.sin(), both.cos()), dim=-1)
    wanted = torch.cat((x[:, :, :2], apply_rot_embed_cat(x[:, :, 2:], rope, half=pairs == "halves")), dim=2)
    assert difference(turned(x, angles_of(rope, pairs, 7), pairs), wanted) < 1e-14
    with pytest.raises(ValueError, match="rope: wanted one for all images"):
        angles_of(rope[None, None, None], pairs, 7)


@pytest.mark.parametrize("size", [(48, 24), (24, 48), (32, 32)])
def test_images_of_another_size_have_their_own_positions(size: tuple[int, int]) -> None:
    masked, small = pair(DINO)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert difference(small(images()), masked(images())) < 1e-12
        assert difference(small(x), masked(x)) < 1e-12
        assert difference(small(images()), masked(images())) < 1e-12
        for theirs, ours in zip(
            masked.forward_intermediates(x, intermediates_only=True),
            small.forward_intermediates(x, intermediates_only=True),
            strict=True,
        ):
            assert difference(ours, theirs) < 1e-12


@needs_cpu
def test_a_frozen_model_refuses_images_of_another_size() -> None:
    masked, small = pair(DINO)
    frozen, x = gohsp.freeze(small.float()), torch.randn(2, 3, 48, 24)
    with torch.no_grad():
        assert difference(frozen(images().float()), masked(images())) < 1e-5
        ours = frozen.forward_intermediates(images().float(), intermediates_only=True)
        assert difference(ours[-1], masked.forward_intermediates(images(), intermediates_only=True)[-1]) < 1e-5
        for wrong in (x, torch.randn(2, 3, 16, 64)):  # the latter has as many patches
            with pytest.raises(ValueError, match=r"x: wanted images of \(32, 32\), whose rotary positions"):
                frozen(wrong)


def test_a_model_that_is_given_another_size_takes_its_positions_over() -> None:
    masked, small = pair(DINO)
    for model in (masked, small):
        model.set_input_size((48, 24))
    x = torch.randn(2, 3, 48, 24, dtype=torch.float64)
    before = small.blocks[0].attn.rope
    with torch.no_grad():
        assert difference(small(x), masked(x)) < 1e-12
    assert small.blocks[0].attn.rope.shape != before.shape
    if gk.can_run("cpu"):
        assert difference(gohsp.freeze(small.float())(x.float()), masked(x)) < 1e-5


def test_positions_that_are_learnt_are_learnt_and_seen(tmp_path: Path) -> None:
    masked, small = pair(MIXED)
    x = images()
    for model in (masked, small):
        model.train()(x).square().sum().backward()
    assert difference(small.rope.freqs.grad, masked.rope.freqs.grad) < 1e-6  # timm keeps positions in float32
    with torch.no_grad():
        for model in (masked, small):
            model.eval().rope.freqs.add_(0.3)
        wanted = masked(x)
        if gk.can_run("cpu"):
            assert difference(gohsp.freeze(copy.deepcopy(small).float())(x.float()), wanted) < 1e-5
        assert difference(small(x), wanted) < 1e-12
        gohsp.save(small, tmp_path)
        assert difference(gohsp.load(tmp_path)(x), wanted) < 1e-12


def test_positions_taken_over_in_inference_mode_do_not_hinder_training() -> None:
    _, small = pair(MIXED)
    with torch.no_grad():
        small.rope.freqs.add_(0.3)
    with torch.inference_mode():
        small(images())
    small.train()(images()).sum().backward()
    tokens = torch.randn(1, 17, 24, dtype=torch.float64)
    small.blocks[0](tokens).sum().backward()  # by the positions that it holds


def test_hooks_and_checkpointing_see_the_positions() -> None:
    masked, small = pair(DINO)
    with torch.no_grad():
        wanted = masked(images())
    seen: list[Any] = []
    small.blocks[1].attn.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        assert difference(small(images()), wanted) < 1e-12 and len(seen) == 1
    small.set_grad_checkpointing()
    small.train()(images()).sum().backward()
    with torch.no_grad():
        assert difference(small.eval()(images()), wanted) < 1e-12
        mask = torch.ones(1, 1, 21, 21, dtype=torch.bool).tril()
        assert difference(small(images(), attn_mask=mask), masked(images(), attn_mask=mask)) < 1e-12
        assert difference(small(images(), is_causal=True), masked(images(), is_causal=True)) < 1e-12


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    masked, small = pair(DINO)
    compiled = torch.compile(small, backend="aot_eager")
    with torch.no_grad():
        for x in (images(), torch.randn(2, 3, 48, 24, dtype=torch.float64)):
            assert difference(compiled(x), masked(x)) < 1e-12


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "eva02_tiny_patch14_224": ({"patch_drop_rate": 0.5}, "wanted no patch dropout"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_pruned_exactly_is_refused(name: str) -> None:
    options, reason = REFUSED[name]
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    with pytest.raises(ValueError, match=reason):
        ModelMask.full(timm.create_model(name, **sizes, **options))


def test_heads_that_share_keys_are_refused() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    model = timm.create_model("vit_base_patch16_sapiens2", **sizes, num_kv_heads=1)
    with pytest.raises(ValueError, match="3 heads of queries that share 1 of keys and values"):
        ModelMask.full(model)


def test_single_channels_of_turned_heads_stay() -> None:
    model = make(DINO)
    mask = ModelMask.full(model)
    mask.blocks[0].qk[1, 3] = False
    with pytest.raises(ValueError, match="rotary positions turn the channels of a head in pairs"):
        gohsp.compress(model, mask)
    with pytest.raises(ValueError, match="groups: wanted no 'qk' for this model, because rotary positions"):
        gohsp.prune(model, [images()], {"params": 0.8}, groups=("heads", "qk"))
    with pytest.raises(ValueError, match=r"images: wanted \(32, 32\), which the model's rotary positions are for"):
        gohsp.prune(model, [torch.randn(2, 3, 48, 24)], {"params": 0.8})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("pretrained", True, "arguments: wanted no 'pretrained'"),
        ("checkpoint_path", "/etc/hostname", "arguments: wanted no 'checkpoint_path'"),
        ("depth", 3, "depth is 3"),
        ("depth", "2", "depth is '2'"),
        ("embed_dim", 10**9, "arguments.embed_dim: wanted a number up to"),
        ("embed_dim", -24, "do not make a"),
        ("img_size", [2**17, 2**17], "img_size: wanted at most 1048576 patches"),
        ("rope_type", {"a": 1}, "arguments.rope_type: wanted a number up to"),
    ],
)
def test_a_plan_names_nothing_but_what_save_writes(name: str, value: Any, message: str) -> None:
    small = gohsp.compress(make(DINO), ModelMask.full(make(DINO)))
    family, geometry = family_of(small), ModelMask.of(small).geometry
    description = family.describe(small, geometry)
    description["arguments"][name] = value
    with pytest.raises(ValueError, match=re.escape(message)):
        family.check_description(description, geometry)
        family.build(description)


def test_a_model_made_by_hand_is_not_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Eva(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, use_rot_pos_emb=True)
    small = gohsp.compress(model.eval(), ModelMask.full(model))
    with pytest.raises(ValueError, match=r"wanted one of Eva made by timm\.create_model"):
        gohsp.save(small, tmp_path)


def test_pruning_keeps_more_than_chance() -> None:
    """Half of the neurons of a random DINOv3 with its norms and positions: refitting gives an error below cutting."""
    model = make(DINO).float()
    x = torch.randn(24, 3, 32, 32)
    fitted = gohsp.prune(model, x.split(12), {"params": 0.6})
    cut = gohsp.prune(model, x.split(12), {"params": 0.6}, optimiser="drop")
    assert fitted.report.errors[-1] < cut.report.errors[-1]
