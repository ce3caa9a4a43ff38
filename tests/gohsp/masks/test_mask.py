# SPDX-License-Identifier: Apache-2.0
"""Masks: rules, layouts, meaning, files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gohsp
from gohsp.masks.mask import FIELDS, BlockMask, ModelMask
from gohsp.models.base import Geometry

SIZE = Geometry.uniform(2, dim=6, num_heads=3, head_dim=2, hidden=4)


def full_mask(size: Geometry = SIZE) -> ModelMask:
    blocks = [BlockMask.full(size.dim, size.num_heads, size.head_dim, size.hidden) for _ in range(size.depth)]
    return ModelMask(blocks, "made by hand", size)


def test_full_keeps_everything(make_model: Callable[..., Any]) -> None:
    mask = ModelMask.full(make_model())
    assert mask.model == "vit_tiny_patch16_224"
    assert mask.geometry == Geometry.uniform(2, dim=192, num_heads=3, head_dim=64, hidden=768)
    assert len(mask.blocks) == 2
    for block in mask.blocks:
        assert all(getattr(block, name).all() for name in FIELDS)


def test_layout_of_a_mask_worked_out_by_hand() -> None:
    block = full_mask().blocks[0]
    block.heads[1] = False
    block.qk[0, 0] = False
    block.v[2, 1] = False
    block.hidden[[0, 3]] = False
    block.attn_in[0] = False
    block.mlp_out[:] = False
    layout = block.layout()
    assert layout.heads == (0, 2)
    assert layout.qk_widths == (1, 2)
    assert layout.v_widths == (2, 1)
    assert layout.q_rows.tolist() == [1, 4, 5]
    assert layout.k_rows.tolist() == [7, 10, 11]
    assert layout.v_rows.tolist() == [12, 13, 16]
    assert layout.qkv_rows.tolist() == [1, 4, 5, 7, 10, 11, 12, 13, 16]
    assert layout.proj_cols.tolist() == [0, 1, 4]
    assert layout.hidden.tolist() == [1, 2]
    assert layout.attn_in is not None and layout.attn_in.tolist() == [1, 2, 3, 4, 5]
    assert layout.attn_out is None and layout.mlp_in is None
    assert layout.mlp_out is not None and layout.mlp_out.tolist() == []


def test_head_without_v_leaves_and_head_without_qk_stays() -> None:
    block = full_mask().blocks[0]
    block.v[0] = False
    block.qk[1] = False
    layout = block.layout()
    assert layout.heads == (1, 2)
    assert layout.qk_widths == (0, 2)
    assert layout.q_rows.tolist() == [4, 5], "the q rows of head 0 leave with it"


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_layout_lists_are_sorted_unique_and_of_the_right_length(
    data: st.DataObject, make_model: Callable[..., Any], masks: Any
) -> None:
    for block in data.draw(masks(make_model())).blocks:
        layout = block.layout()
        assert layout.q_rows.numel() == layout.k_rows.numel() == sum(layout.qk_widths)
        assert layout.proj_cols.numel() == layout.v_rows.numel() == sum(layout.v_widths)
        assert all(width > 0 for width in layout.v_widths)
        for rows in (layout.qkv_rows, layout.proj_cols, layout.hidden, layout.attn_in, layout.attn_out, layout.mlp_in):
            if rows is not None:
                assert rows.dtype == torch.int64
                assert torch.equal(rows, rows.unique())


def test_random_masks_differ_everywhere_and_repeat_with_the_seed(make_model: Callable[..., Any]) -> None:
    model = make_model(depth=4)
    mask = ModelMask.random(model, 0.6, torch.Generator().manual_seed(1))
    again = ModelMask.random(model, 0.6, torch.Generator().manual_seed(1))
    other = ModelMask.random(model, 0.6, torch.Generator().manual_seed(2))
    assert mask == again
    assert mask != other
    for name in set(FIELDS) - {"heads"}:
        counts = {int(getattr(block, name).sum()) for block in mask.blocks}
        assert len(counts) > 1, f"every block keeps the same number in {name}"
    widths = [width for block in mask.blocks for width in (*block.layout().qk_widths, *block.layout().v_widths)]
    assert len(set(widths)) > 4


def test_random_never_empties_a_field_unless_asked(make_model: Callable[..., Any]) -> None:
    model = make_model()
    for seed in range(20):
        mask = ModelMask.random(model, 1e-6, torch.Generator().manual_seed(seed))
        for block in mask.blocks:
            layout = block.layout()
            assert len(layout.heads) >= 1
            assert min(block.v.sum(dim=1)) >= 1
            assert all(getattr(block, name).any() for name in set(FIELDS) - {"qk"})
    emptied = ModelMask.random(model, {"hidden": 0.0})
    assert not any(block.hidden.any() for block in emptied.blocks)
    assert all(block.attn_in.all() and block.heads.all() for block in emptied.blocks)


def test_random_takes_a_share_for_each_field(make_model: Callable[..., Any]) -> None:
    mask = ModelMask.random(make_model(), {"hidden": 0.25, "mlp_in": 0.75}, torch.Generator().manual_seed(0))
    for block in mask.blocks:
        assert block.hidden.double().mean() == pytest.approx(0.25, abs=0.07)
        assert block.mlp_in.double().mean() == pytest.approx(0.75, abs=0.12)
        assert block.qk.all()


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (1.5, r"keep\['heads'\]: wanted a finite number from 0 to 1, got 1.5"),
        ({"qk": -0.1}, r"keep\['qk'\]: wanted a finite number from 0 to 1, got -0.1"),
        ({"neurons": 0.5}, "unknown field 'neurons'"),
    ],
)
def test_random_refuses_wrong_shares(make_model: Callable[..., Any], keep: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelMask.random(make_model(), keep)


def test_qk_norm_keeps_its_channels(make_model: Callable[..., Any]) -> None:
    model = make_model(qk_norm=True)
    mask = ModelMask.random(model, 0.5)
    assert all(block.qk.all() for block in mask.blocks)
    with pytest.raises(ValueError, match=r"blocks\[0\].qk: wanted every QK channel .* qk-norm"):
        ModelMask.random(model, {"qk": 0.5})
    mask.blocks[1].heads[0] = False
    mask.blocks[1].qk[0] = False
    mask.validate(model)  # a pruned head has no channels to keep


def test_keep_first(make_model: Callable[..., Any]) -> None:
    model = make_model()
    mask = ModelMask.keep_first(model, heads=2, hidden=100)
    for block in mask.blocks:
        layout = block.layout()
        assert layout.heads == (0, 1)
        assert layout.hidden.tolist() == list(range(100))
        assert layout.attn_in is None
    assert ModelMask.keep_first(model) == ModelMask.full(model)
    with pytest.raises(ValueError, match="heads: wanted a whole number from 0 to 3, got 4"):
        ModelMask.keep_first(model, heads=4)
    with pytest.raises(ValueError, match="hidden: wanted a whole number from 0 to 768, got -1"):
        ModelMask.keep_first(model, hidden=-1)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("heads", [True, True, True], "heads: wanted a tensor, got list"),
        ("qk", torch.ones(3, 2), "qk: wanted dtype torch.bool, got torch.float32"),
        ("v", torch.ones(2, 3, dtype=torch.bool), r"v: wanted shape \(3, 2\), got \(2, 3\)"),
        ("hidden", torch.ones(4, dtype=torch.bool, device="meta"), "hidden: wanted a CPU tensor, got one on meta"),
        ("attn_in", torch.ones(5, dtype=torch.bool), r"attn_in: wanted shape \(6,\), got \(5,\)"),
    ],
)
def test_validate_names_block_and_field(field: str, value: Any, message: str) -> None:
    mask = full_mask()
    setattr(mask.blocks[1], field, value)
    with pytest.raises(ValueError, match=r"blocks\[1\]\." + message):
        mask.validate()


def test_validate_counts_the_blocks_and_knows_their_type() -> None:
    mask = full_mask()
    mask.blocks.pop()
    with pytest.raises(ValueError, match=r"mask\.blocks: wanted 2 blocks, got 1"):
        mask.validate()
    mask.blocks.append({"heads": None})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"blocks\[1\]: wanted a BlockMask, got dict"):
        mask.validate()


def test_mask_of_another_model_is_refused(make_model: Callable[..., Any]) -> None:
    mask = ModelMask.full(make_model(depth=3))
    for use in (mask.validate, mask.apply_, mask.summary):
        with pytest.raises(ValueError, match=r"mask: it is made for .*depth=3.* but the model is .*depth=2"):
            use(make_model())


def test_apply_zeroes_exactly_the_pruned_entries(make_model: Callable[..., Any]) -> None:
    model, dense = make_model(init_values=1.0), make_model(init_values=1.0)
    mask = ModelMask.random(model, 0.5, torch.Generator().manual_seed(3))
    mask.blocks[0].heads = torch.tensor([True, False, True])
    assert mask.apply_(model) is model
    span = 3 * 64
    for index, kept in enumerate(mask.blocks):
        qk = torch.tensor([bool(kept.heads[r // 64] and kept.qk[r // 64, r % 64]) for r in range(span)])
        v = torch.tensor([bool(kept.heads[r // 64] and kept.v[r // 64, r % 64]) for r in range(span)])
        rows = torch.cat((qk, qk, v))
        factors = {
            "attn.qkv.weight": torch.outer(rows, kept.attn_in),
            "attn.qkv.bias": rows,
            "attn.proj.weight": torch.outer(kept.attn_out, v),
            "attn.proj.bias": kept.attn_out,
            "mlp.fc1.weight": torch.outer(kept.hidden, kept.mlp_in),
            "mlp.fc1.bias": kept.hidden,
            "mlp.fc2.weight": torch.outer(kept.mlp_out, kept.hidden),
            "mlp.fc2.bias": kept.mlp_out,
        }
        before, after = dense.blocks[index].state_dict(), model.blocks[index].state_dict()
        for name, value in before.items():
            assert torch.equal(after[name], value * factors.get(name, 1)), name
    outside = {name: value for name, value in model.state_dict().items() if not name.startswith("blocks.")}
    assert outside and all(torch.equal(value, dense.state_dict()[name]) for name, value in outside.items())


def test_apply_and_full_refuse_a_compressed_model(make_model: Callable[..., Any]) -> None:
    model = make_model()
    mask = ModelMask.full(model)
    compact = gohsp.compress(model, mask)
    with pytest.raises(ValueError, match="already compressed"):
        mask.apply_(compact)
    with pytest.raises(ValueError, match="already compressed"):
        ModelMask.full(compact)


def test_mask_of_a_compressed_model_is_a_copy(make_model: Callable[..., Any]) -> None:
    model = make_model()
    mask = ModelMask.random(model)
    compact = gohsp.compress(model, mask)
    found = ModelMask.of(compact)
    assert found == mask
    found.blocks[0].heads[:] = False
    mask.blocks[1].hidden[:] = False
    assert ModelMask.of(compact).blocks[0].heads.any() and ModelMask.of(compact).blocks[1].hidden.any()
    with pytest.raises(ValueError, match=r"wanted a model made by gohsp\.compress, got VisionTransformer"):
        ModelMask.of(model)


def test_summary_shows_what_is_kept(make_model: Callable[..., Any]) -> None:
    model = make_model()
    mask = ModelMask.keep_first(model, heads=2, hidden=96)
    mask.blocks[1].qk[0, 10:] = False
    mask.blocks[1].heads[1] = False
    lines = mask.summary(model).splitlines()
    first, second, total = (next(line for line in lines if line.startswith(f"│ {n:>5} ")) for n in ("0", "1", "model"))
    assert "2/3" in first and "2 x 64" in first and "96/768" in first and "192/192" in first
    assert "1/3" in second and " 10 " in second
    kept, whole = gohsp.count(model, mask=mask), gohsp.count(model)
    assert f"{kept.params / 1e6:.3f} M" in total and f"{kept.params / whole.params:.0%}" in total
    assert f"{kept.macs / 1e6:.1f} M" in total


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_json_form_gives_the_mask_back(data: st.DataObject, make_model: Callable[..., Any], masks: Any) -> None:
    mask = data.draw(masks(make_model()))
    assert ModelMask.from_dict(json.loads(json.dumps(mask.to_dict()))) == mask


def test_json_form_is_readable() -> None:
    mask = full_mask()
    mask.blocks[0].attn_in = torch.tensor([True, True, True, False, False, True])
    mask.blocks[0].heads[:] = False
    mask.blocks[0].qk[0, 1] = False
    entry = mask.to_dict()["blocks"][0]
    assert entry["attn_in"] == "0-2,5"
    assert entry["heads"] == ""
    assert entry["qk"] == ["0", "all", "all"]


def test_file_round_trip_and_missing_file(tmp_path: Any) -> None:
    mask = full_mask()
    mask.blocks[1].hidden[2] = False
    mask.save(tmp_path / "mask.json")
    assert ModelMask.load(tmp_path / "mask.json") == mask
    assert os.listdir(tmp_path) == ["mask.json"]
    with pytest.raises(FileNotFoundError):
        ModelMask.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken.json: wanted JSON"):
        ModelMask.load(tmp_path / "broken.json")


def test_a_failed_save_leaves_the_old_file(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mask.json"
    full_mask().save(path)
    old = path.read_text()
    changed = full_mask()
    changed.blocks[0].hidden[0] = False

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("gohsp.files.os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        changed.save(path)
    assert path.read_text() == old


def test_a_mask_that_would_fill_the_memory_is_refused() -> None:
    sizes = {"dim": 2**16, "num_heads": 2**8, "head_dim": 2**8, "hidden": 2**16, "qk_norm": False}
    entry: dict[str, Any] = dict.fromkeys(FIELDS, "all") | {"qk": ["all"] * 2**8, "v": ["all"] * 2**8}
    data = {"format": 1, "model": "x", "geometry": {"depth": 10_000, **sizes}, "blocks": [entry] * 10_000}
    with pytest.raises(ValueError, match=r"mask\.geometry: wanted at most \d+ entries"):
        ModelMask.from_dict(data)
    data |= {"geometry": {"depth": 1, **sizes, "num_heads": 2**16, "head_dim": 2**16}, "blocks": [entry]}
    with pytest.raises(ValueError, match=r"mask\.geometry: wanted at most \d+ entries"):
        ModelMask.from_dict(data)


def test_a_message_names_the_file_and_stays_short(tmp_path: Any) -> None:
    data = full_mask().to_dict()
    data["blocks"][0]["hidden"] = "x\n" * 100_000
    (tmp_path / "long.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"long\.json: mask\.blocks\[0\]\.hidden: wanted ranges") as raised:
        ModelMask.load(tmp_path / "long.json")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


def test_an_invalid_mask_is_not_saved(tmp_path: Any) -> None:
    mask = full_mask()
    mask.blocks[0].heads = torch.ones(7, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"blocks\[0\].heads"):
        mask.save(tmp_path / "mask.json")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), 3, r"mask.format: wanted 1 or 2, got 3"),
        (("surprise",), 1, r"mask: missing keys \[\], unknown keys \['surprise'\]"),
        (("geometry", "dimm"), 1, r"mask.geometry: missing keys \[\], unknown keys \['dimm'\]"),
        (("blocks", 0, "extra"), "", r"mask.blocks\[0\]: missing keys \[\], unknown keys \['extra'\]"),
        (("blocks", 0, "heads"), "0-3", r"mask.blocks\[0\].heads: wanted ascending indices below 3, got '0-3'"),
        (("blocks", 0, "heads"), "2-1", r"mask.blocks\[0\].heads: wanted ascending indices below 3, got '2-1'"),
        (("blocks", 0, "heads"), "0;1", r"mask.blocks\[0\].heads: wanted ranges"),
        (("blocks", 0, "heads"), 5, r"mask.blocks\[0\].heads: wanted ranges"),
        (("blocks", 1, "v"), ["all"], r"mask.blocks\[1\].v: wanted a list of 3 strings"),
        (("blocks", 1, "v"), ["all", "all", "9"], r"mask.blocks\[1\].v\[2\]: wanted ascending indices below 2"),
        (("blocks", 1), "all", r"mask.blocks\[1\]: wanted a mapping, got str"),
        (("geometry",), None, "mask.geometry: wanted a mapping, got NoneType"),
        (("geometry", "depth"), "2", "mask.geometry.depth: wanted an int from 1 to 10000, got '2'"),
        (("geometry", "dim"), -6, "mask.geometry.dim: wanted an int from 1 to 65536, got -6"),
        (("geometry", "qk_norm"), 0, "mask.geometry.qk_norm: wanted a bool, got 0"),
        (("geometry", "depth"), 0, "mask.geometry.depth: wanted an int from 1 to 10000, got 0"),
        (("geometry", "depth"), 10**9, "mask.geometry.depth: wanted an int from 1 to 10000, got 1000000000"),
        (("geometry", "num_heads"), 0, "mask.geometry.num_heads: wanted an int from 1 to 65536, got 0"),
        (("geometry", "hidden"), 3 * 10**9, "mask.geometry.hidden: wanted an int from 1 to 65536, got 3000000000"),
        (("geometry", "dim"), True, "mask.geometry.dim: wanted an int from 1 to 65536, got True"),
        (("blocks", 0, "heads"), "0," * 30, r"mask.blocks\[0\].heads: wanted ranges such as"),
        (("blocks", 0, "heads"), "9" * 9, r"mask.blocks\[0\].heads: wanted ranges such as"),
        (("model",), 3, "mask.model: wanted a str, got 3"),
        (("blocks",), {}, "mask.blocks: wanted a list, got {}"),
    ],
)
def test_wrong_json_is_refused(path: tuple[Any, ...], value: Any, message: str) -> None:
    data = full_mask().to_dict()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        ModelMask.from_dict(data)


def test_missing_keys_are_named() -> None:
    data = full_mask().to_dict()
    del data["blocks"][0]["hidden"]
    with pytest.raises(ValueError, match=r"mask.blocks\[0\]: missing keys \['hidden'\]"):
        ModelMask.from_dict(data)


def test_masks_compare_by_value() -> None:
    one, two = full_mask(), full_mask()
    assert one == two
    two.blocks[0].v[0, 0] = False
    assert one != two
    assert one.blocks[0] != "mask"
    assert replace(one, model="other") != one
