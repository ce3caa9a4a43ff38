# SPDX-License-Identifier: Apache-2.0
"""Saving and loading: what comes back is the same model, and damaged files are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import gohsp
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import family_of
from gohsp.serialization import PLAN, WEIGHTS, _digest, digest_tensors

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "DINOv2": ("vit_small_patch14_dinov2", {"img_size": 56, "num_classes": 0}),
    "no layer scale where timm has it": ("vit_small_patch14_dinov2", {"img_size": 56, "init_values": 0.0}),
    "qk-norm, no biases": ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False, "proj_bias": False}),
    "average pool": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "attention pool": ("vit_tiny_patch16_224", {"global_pool": "map"}),
    "no class token": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False, "pos_embed": "none"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 2, "no_embed_class": True, "pool_include_prefix": True}),
    "CLIP": ("vit_base_patch32_clip_224", {"img_size": 64, "embed_dim": 96, "num_heads": 4}),
    "rates": ("vit_tiny_patch16_224", {"drop_path_rate": 0.1, "attn_drop_rate": 0.2, "patch_drop_rate": 0.3}),
    "any image size": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "in_chans": 3, "act_layer": "gelu_tanh"}),
    "odd sizes": ("vit_tiny_patch16_224", {"img_size": (32, 64), "mlp_ratio": 2.345, "final_norm": False}),
    "neurons that no ratio gives": ("vit_tiny_patch16_224", {"embed_dim": 60, "mlp_ratio": 123.5 / 60}),  # 123
}


@pytest.fixture
def saved(make_model: Callable[..., Any], tmp_path: Path) -> tuple[Any, Path]:
    """Return a compressed model and the directory that it is saved in."""
    model = make_model()
    compact = gohsp.compress(model, ModelMask.random(model, 0.6, torch.Generator().manual_seed(0)))
    gohsp.save(compact, tmp_path / "model")
    return compact, tmp_path / "model"


RECORD = {
    "input_size": (3, 48, 48),
    "test_input_size": (3, 64, 64),
    "interpolation": "bilinear",
    "mean": (0.1, 0.2, 0.3),
    "std": (0.4, 0.5, 0.6),
    "crop_pct": 0.7,
    "crop_mode": "squash",
    "label_names": tuple("abcde"),
    "label_descriptions": {"a": "the first"},
}


@pytest.mark.parametrize("registered", [True, False])
def test_what_timm_recorded_of_the_images_comes_back(
    make_model: Callable[..., Any], tmp_path: Path, registered: bool
) -> None:
    model = make_model()
    model.pretrained_cfg = {**(model.pretrained_cfg if registered else {}), **RECORD}
    config, at_test = (timm.data.resolve_model_data_config(model, use_test_size=test) for test in (False, True))
    gohsp.save(gohsp.compress(model, ModelMask.full(model)), tmp_path)
    loaded: Any = gohsp.load(tmp_path)
    assert timm.data.resolve_model_data_config(loaded) == config
    assert timm.data.resolve_model_data_config(loaded, use_test_size=True) == at_test
    assert {name: loaded.pretrained_cfg.get(name) for name in RECORD} == RECORD
    for other in (gohsp.freeze(loaded.float()), gohsp.densify(loaded)):
        assert timm.data.resolve_model_data_config(other) == config
    gohsp.save(loaded, tmp_path / "again")
    first, again = (json.loads((folder / PLAN).read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert first["preprocessing"] == again["preprocessing"]


def test_what_was_not_recorded_does_not_come_from_timm(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("vit_base_patch32_clip_224", embed_dim=96, num_heads=4, img_size=64)
    assert model.pretrained_cfg.pop("mean") != (0.485, 0.456, 0.406)
    gohsp.save(gohsp.compress(model, ModelMask.full(model)), tmp_path)
    assert timm.data.resolve_model_data_config(gohsp.load(tmp_path))["mean"] == (0.485, 0.456, 0.406)


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", (float("nan"),) * 3), ("mean", "half"), ("crop_pct", -1.0), ("label_names", (1, 2)), ("std", {1, 2})],
)
def test_a_record_that_cannot_be_kept_is_refused(
    make_model: Callable[..., Any], tmp_path: Path, name: str, value: Any
) -> None:
    compact = gohsp.compress(make_model(), ModelMask.full(make_model()))
    compact.pretrained_cfg = {**compact.pretrained_cfg, name: value}
    with pytest.raises(ValueError, match=rf"model\.pretrained_cfg(\.{name})?"):
        gohsp.save(compact, tmp_path)
    assert not list(tmp_path.iterdir())


def test_plans_without_a_record_load(saved: tuple[Any, Path]) -> None:
    model, folder = saved
    plan = json.loads((folder / PLAN).read_text())
    del plan["preprocessing"], plan["tensors_sha256"]
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"plan_sha256": _digest(plan)})
    (folder / PLAN).write_text(json.dumps(plan))
    loaded: Any = gohsp.load(folder)
    assert loaded.pretrained_cfg["mean"] == model.pretrained_cfg["mean"]


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"mean": [0.5, "x", 0.5]}, r"plan\.preprocessing\.mean\.1: "),
        ({"url": "https://example.org/weights"}, r"plan\.preprocessing\.url: "),
        ({"interpolation": "magic"}, r"plan\.preprocessing\.interpolation: "),
        ([], r"plan\.preprocessing: "),
    ],
)
def test_damaged_records_are_refused(saved: tuple[Any, Path], described: Any, message: str) -> None:
    _, folder = saved
    plan = {**json.loads((folder / PLAN).read_text()), "preprocessing": described}
    del plan["tensors_sha256"]
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"plan_sha256": _digest(plan)})
    (folder / PLAN).write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=message):
        gohsp.load(folder)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(make_model: Callable[..., Any], tmp_path: Path, variant: str) -> None:
    name, arguments = VARIANTS[variant]
    model = make_model(name, **arguments).float()
    compact = gohsp.compress(model, ModelMask.random(model, 0.6, torch.Generator().manual_seed(0))).train()
    gohsp.save(compact, tmp_path)
    loaded = gohsp.load(tmp_path)
    assert type(loaded) is type(compact)
    assert not loaded.training
    assert str(loaded) == str(compact)
    state = loaded.state_dict()
    assert list(state) == list(compact.state_dict())
    for key, value in compact.state_dict().items():
        assert torch.equal(state[key], value) and state[key].dtype == value.dtype
    assert ModelMask.of(loaded) == ModelMask.of(compact)
    assert timm.data.resolve_model_data_config(loaded) == timm.data.resolve_model_data_config(compact)
    side = model.patch_embed.img_size
    x = torch.randn(2, 3, *side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(loaded(x), compact.eval()(x))
        assert torch.equal(loaded.forward_features(x), compact.forward_features(x))


def test_round_trip_of_a_model_that_timm_has_no_name_for(tmp_path: Path) -> None:
    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5).eval()
    compact = gohsp.compress(model, ModelMask.random(model))
    gohsp.save(compact, tmp_path)
    assert json.loads((tmp_path / PLAN).read_text())["model"]["architecture"] is None
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(gohsp.load(tmp_path)(x), compact(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(make_model: Callable[..., Any], tmp_path: Path, dtype: torch.dtype) -> None:
    model = make_model()
    gohsp.save(gohsp.compress(model, ModelMask.random(model)).to(dtype), tmp_path)
    assert {parameter.dtype for parameter in gohsp.load(tmp_path).parameters()} == {dtype}


def test_loaded_model_can_be_trained_and_saved_again(
    saved: tuple[Any, Path], images: Callable[..., Tensor], tmp_path: Path
) -> None:
    loaded = gohsp.load(saved[1]).train()
    loaded(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.sub_(0.01 * parameter.grad)
    gohsp.save(loaded, tmp_path / "again")
    again = gohsp.load(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items())


def test_only_the_two_files_are_left(saved: tuple[Any, Path]) -> None:
    compact, directory = saved
    gohsp.save(compact, directory)  # over the old one
    assert sorted(os.listdir(directory)) == [WEIGHTS, PLAN]


def test_changed_head_and_pooling_come_back(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    compact = gohsp.compress(model, ModelMask.random(model))
    compact.reset_classifier(11, "avg")
    gohsp.save(compact, tmp_path)
    loaded = gohsp.load(tmp_path)
    assert loaded.num_classes == 11 and loaded.global_pool == "avg"
    x = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        compact.head.double()
        assert torch.equal(loaded.double()(x), compact(x))


def test_truncated_model_comes_back(saved: tuple[Any, Path], images: Callable[..., Tensor], tmp_path: Path) -> None:
    compact, _ = saved
    compact.prune_intermediate_layers(indices=[0], prune_head=False)
    gohsp.save(compact, tmp_path / "short")
    with torch.no_grad():
        assert torch.equal(gohsp.load(tmp_path / "short")(images()), compact(images()))


def test_what_cannot_be_saved_is_refused(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=r"wanted a model made by gohsp\.compress, got VisionTransformer"):
        gohsp.save(model, tmp_path / "x")
    compact = gohsp.compress(model, ModelMask.random(model))
    compact.head = nn.Sequential(nn.Linear(192, 8), nn.Linear(8, 5))
    with pytest.raises(ValueError, match=r"model: plan\.json cannot describe it; it has '\(head\): Sequential\('"):
        gohsp.save(compact, tmp_path / "x")
    compact = gohsp.compress(model, ModelMask.random(model))
    compact.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match=r"unknown tensors \['extra'\]"):
        gohsp.save(compact, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", [PLAN, WEIGHTS])
def test_missing_file(saved: tuple[Any, Path], name: str) -> None:
    (saved[1] / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"wanted a directory that gohsp.save wrote, but it has no {name}"):
        gohsp.load(saved[1])


def test_a_file_in_the_place_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=r"wanted a directory that gohsp\.save wrote"):
        gohsp.load(tmp_path / "file")


def edit_plan(directory: Path, edit: Callable[[Any], None], sign: bool) -> None:
    """Change the plan; with ``sign`` the weights are made to vouch for the change."""
    plan = json.loads((directory / PLAN).read_text())
    edit(plan)
    if sign:
        tensors = load_file(directory / WEIGHTS)
        digest = _digest(plan)
        save_file(tensors, directory / WEIGHTS, metadata={"plan_sha256": digest})
        plan["tensors_sha256"] = digest_tensors(tensors, digest)
    (directory / PLAN).write_text(json.dumps(plan))


def make_old(directory: Path) -> None:
    """Make of a saved model what versions wrote that did not know the digest of the weights."""
    plan = json.loads((directory / PLAN).read_text())
    del plan["tensors_sha256"]
    (directory / PLAN).write_text(json.dumps(plan))


def test_a_model_of_an_earlier_version_is_loaded(saved: tuple[Any, Path]) -> None:
    compact, directory = saved
    make_old(directory)
    loaded = gohsp.load(directory).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in compact.state_dict().items())
    gohsp.save(compact, directory)
    assert "tensors_sha256" in json.loads((directory / PLAN).read_text())


def test_a_changed_plan_is_noticed_even_if_the_shapes_fit(saved: tuple[Any, Path]) -> None:
    def other_columns(plan: Any) -> None:
        first = plan["mask"]["blocks"][0]
        kept = ModelMask.from_dict(plan["mask"]).blocks[0].attn_in.roll(1)
        first["attn_in"] = ",".join(map(str, kept.nonzero().flatten().tolist()))

    edit_plan(saved[1], other_columns, sign=False)
    with pytest.raises(ValueError, match="are not of one save, or one of them was changed"):
        gohsp.load(saved[1])


def test_files_of_two_saves_are_not_mixed(saved: tuple[Any, Path], make_model: Callable[..., Any]) -> None:
    model = make_model()
    other = saved[1].with_name("other")
    gohsp.save(gohsp.compress(model, ModelMask.random(model)), other)
    os.replace(other / PLAN, saved[1] / PLAN)
    with pytest.raises(ValueError, match="are not of one save"):
        gohsp.load(saved[1])


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    def edit(plan: Any) -> None:
        for key in path[:-1]:
            plan = plan[key]
        plan[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (put("format", value=2), r"plan\.json: wanted format 1, got 2"),
        (put("note", value=""), r"plan\.json: missing keys \[\], unknown keys \['note'\]"),
        (put("model", "class", value="os.system"), r"plan\.model\.class: wanted one of .*VisionTransformer"),
        (put("model", "architecture", value="hf-hub:x/y"), r"plan\.model\.architecture: .* knows no 'hf-hub:x/y'"),
        (put("model", "architecture", value="resnet18"), r"plan\.model"),
        (put("model", "extra", value=1), r"plan\.model: missing keys \[\], unknown keys \['extra'\]"),
        (put("model", "arguments", "embed_dimm", value=1), r"plan\.model\.arguments\.embed_dimm: Extra inputs are not"),
        (put("model", "arguments", "activation", value="eval"), r"plan\.model\.arguments\.activation: .*got 'eval'"),
        (put("model", "arguments", "depth", value=3), r"mask: it is made for .*depth=2"),
        (put("model", "arguments", "num_classes", value=6), r"head\.bias: wanted shape \(6,\), got \(5,\)"),
        (put("model", "arguments", "qkv_bias", value=False), r"unknown tensors \['blocks\.0\.attn\.qkv\.bias'"),
        (put("mask", "blocks", 0, "hidden", value="0-9"), r"blocks\.0\.mlp\.fc1\.bias: wanted shape \(10,\), got"),
        (put("mask", "blocks", 0, "hidden", value="0-900"), r"mask\.blocks\[0\]\.hidden: wanted ascending indices"),
    ],
)
def test_wrong_plans_are_refused(saved: tuple[Any, Path], edit: Callable[[Any], None], message: str) -> None:
    edit_plan(saved[1], edit, sign=True)
    with pytest.raises(ValueError, match=message):
        gohsp.load(saved[1])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pretrained", True),
        ("pretrained", [1]),
        ("pretrained_cfg", {"url": "http://localhost:1/x.pth"}),
        ("pretrained_cfg_overlay", {"file": "/etc/hostname"}),
        ("checkpoint_path", "/etc/hostname"),
        ("cache_dir", "/nowhere"),
        ("scriptable", True),
        ("weight_init", "jax"),
        ("norm_layer", "layernorm"),
        ("embed_layer", "os.system"),
        ("embed_dim", True),
        ("embed_dim", -192),
        ("num_heads", 0),
        ("depth", 10**5),
        ("depth", "2"),
        ("img_size", [32, 32, 32]),
        ("img_size", [0, 32]),
        ("patch_size", 10**9),
        ("global_pool", "mean"),
        ("class_token", 1),
        ("norm_eps", -1.0),
        ("norm_eps", float("nan")),
        ("drop_rate", 2.0),
        ("mlp_ratio", float("inf")),
        ("mlp_ratio", "4"),
    ],
)
def test_a_plan_names_nothing_but_what_save_writes(
    make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    compact = gohsp.compress(make_model(), ModelMask.full(make_model()))
    description = family_of(compact).describe(compact, ModelMask.of(compact).geometry)
    description["arguments"][name] = value
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(ValueError, match=rf"^plan\.model\.arguments\.{name}.*: ") as raised:
        family_of(compact).build(description)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("arguments", [5, None, [], "x"])
def test_arguments_that_are_no_mapping(make_model: Callable[..., Any], arguments: Any) -> None:
    family = family_of(make_model())
    with pytest.raises(ValueError, match=r"^plan\.model\.arguments: "):
        family.build({"class": "VisionTransformer", "architecture": None, "arguments": arguments})


@pytest.mark.parametrize("architecture", [5, ["vit_tiny_patch16_224"], "hf-hub:x/y", "local-dir:/tmp", "", "x" * 5000])
def test_an_architecture_is_one_that_timm_registers(make_model: Callable[..., Any], architecture: Any) -> None:
    compact = gohsp.compress(make_model(), ModelMask.full(make_model()))
    description = family_of(compact).describe(compact, ModelMask.of(compact).geometry)
    with pytest.raises(ValueError, match=r"^plan\.model\.architecture: .{,300}$"):
        family_of(compact).build({**description, "architecture": architecture})


def test_the_depth_is_compared_before_anything_is_built(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_plan(saved[1], put("model", "arguments", "depth", value=9000), sign=True)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=r"mask: it is made for .*depth=2.*9000"):
        gohsp.load(saved[1])


def test_what_timm_cannot_build_is_one_line(saved: tuple[Any, Path]) -> None:
    def no_token(plan: Any) -> None:
        plan["model"]["arguments"] |= {"class_token": False, "global_pool": "token"}

    edit_plan(saved[1], no_token, sign=True)
    with pytest.raises(ValueError, match=r"plan\.model\.arguments: they do not make a VisionTransformer: [^\n]*$"):
        gohsp.load(saved[1])


def test_damaged_files_are_refused(saved: tuple[Any, Path]) -> None:
    directory = saved[1]
    weights = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors: wanted a safetensors file, but"):
        gohsp.load(directory)
    (directory / WEIGHTS).write_bytes(weights)
    plan = (directory / PLAN).read_text()
    (directory / PLAN).write_text(plan[: len(plan) // 2])
    with pytest.raises(ValueError, match=r"plan\.json: wanted JSON"):
        gohsp.load(directory)


def test_damage_is_believed_where_the_caller_says_so(saved: tuple[Any, Path]) -> None:
    compact, directory = saved
    data = bytearray((directory / WEIGHTS).read_bytes())
    data[-5] ^= 1
    (directory / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        gohsp.load(directory)
    loaded = gohsp.load(directory, verify=False).state_dict()
    assert sum(not torch.equal(loaded[name], value) for name, value in compact.state_dict().items()) == 1


def test_a_save_of_equal_tensors_under_another_mask_fails_between_its_files(
    tmp_path: Path, make_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights that wait for their plan have a name of their own, even if they hold the same numbers."""

    def ones(first: int) -> nn.Module:
        model = make_model()
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        mask = ModelMask.keep_first(model)
        mask.blocks[0].hidden[first] = False
        return gohsp.compress(model, mask)

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    gohsp.save(ones(0), tmp_path)
    monkeypatch.setattr("gohsp.serialization.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        gohsp.save(ones(1), tmp_path)
    assert ModelMask.of(gohsp.load(tmp_path)).blocks[0].hidden.tolist().index(False) == 0


def test_a_failed_save_leaves_no_half_model(
    saved: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch, images: Callable[..., Tensor]
) -> None:
    compact, directory = saved
    with torch.no_grad():
        old = compact(images())
        compact.head.bias.add_(1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("gohsp.serialization.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        gohsp.save(compact, directory)
    with torch.no_grad():
        assert torch.equal(gohsp.load(directory)(images()), old)
