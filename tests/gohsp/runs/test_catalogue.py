# SPDX-License-Identifier: Apache-2.0
"""Which models are taken: ten families tried, the walk over names, and the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from typer.testing import CliRunner

from gohsp.runs import catalogue
from gohsp.runs.catalogue import Entry
from gohsp_command.cli import app

DOCUMENT = Path(__file__).parents[3] / "docs" / "models.md"

TAKEN = [
    ("timm", "vit_tiny_patch16_224"),
    ("timm", "deit_tiny_distilled_patch16_224"),
    ("timm", "vit_tiny_r_s16_p8_224"),
    ("timm", "vit_small_patch14_reg4_dinov2"),
    ("timm", "vit_xsmall_patch16_clip_224"),
    ("timm", "vit_small_plus_patch16_dinov3"),
    ("timm", "eva02_tiny_patch14_224"),
    ("timm", "beitv2_base_patch16_224"),
    ("timm", "vit_srelpos_small_patch16_224"),
    ("timm", "swin_s3_tiny_224"),
    ("timm", "nest_tiny_jx"),
    ("timm", "maxvit_tiny_tf_224"),
    ("timm", "hiera_tiny_224"),
    ("timm", "sam2_hiera_tiny"),
    ("transformers", "DINOv3ViTModel"),
    ("transformers", "ViTForImageClassification"),
    ("transformers", "DeiTForImageClassificationWithTeacher"),
    ("transformers", "Dinov2WithRegistersModel"),
    ("transformers", "CLIPVisionModelWithProjection"),
    ("transformers", "SiglipVisionModel"),
]
OTHERS = [
    ("timm", "pit_ti_224", "blocks", "each block can be replaced"),
    ("timm", "mobilevit_xxs", "blocks", "each block can be replaced"),
    (
        *("timm", "coatnet_0_rw_224", "blocks"),
        "7 of 9 blocks can be",
    ),
    ("torchvision", "swin_t", "no", "blocks of another class: SwinTransformerBlock"),
    ("transformers", "CLIPModel", "blocks", "each block can be replaced"),
    ("transformers", "SiglipModel", "blocks", "24 of 25 blocks can be"),
    ("transformers", "BeitModel", "no", "blocks of another class: BeitLayer"),
]


@pytest.mark.parametrize(("library", "name"), TAKEN)
def test_ten_families_are_taken_and_agree(library: str, name: str) -> None:
    entry = catalogue.look(library, name)
    assert entry is not None
    assert (entry.verdict, entry.reason) == ("yes", "")
    assert entry.error is not None and entry.error < 1e-12


@pytest.mark.parametrize(("library", "name", "verdict", "reason"), OTHERS)
def test_what_is_not_taken_has_a_reason(library: str, name: str, verdict: str, reason: str) -> None:
    entry = catalogue.look(library, name)
    assert entry is not None
    assert (entry.verdict, entry.reason, entry.error) == (verdict, reason, None)


def test_a_refusal_is_told_with_the_block() -> None:
    entry = catalogue.look("timm", "vit_large_patch16_sapiens2")
    assert entry is not None
    assert entry.verdict == "no"
    assert entry.reason == "cannot prune blocks.8: 16 heads of queries that share 8 of keys and values"
    assert catalogue.look("timm", "resnet18") is None


def test_a_model_that_fails_after_it_was_taken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any) -> float:
        raise RuntimeError("too narrow")

    monkeypatch.setattr(catalogue, "agreement", fail)
    entry = catalogue.look("transformers", "ViTModel")
    assert entry is not None
    assert (entry.verdict, entry.reason) == ("no", "taken, and then: RuntimeError: RuntimeError: too narrow")


def test_a_walk_goes_on_where_another_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look(library: str, name: str) -> Entry | None:
        asked.append(name)
        return None if name == "pit_s_224" else Entry(library, name, "pit.Pit", "yes", "", 1e-16)

    monkeypatch.setattr(catalogue, "look", look)
    told: list[str] = []
    found = tmp_path / "sub" / "found.jsonl"
    entries = catalogue.walk(found, ["pit_*_224", "timm:pit_*"], told.append)
    assert asked == timm.list_models("pit_*")
    assert len(entries) == len(told) == len(asked) - 1
    assert told[0] == "timm:pit_b_224  yes  agrees to 1e-16"
    done = list(asked)
    assert catalogue.walk(found, ["pit_*"], told.append) == entries
    assert asked == done
    found.write_text(found.read_text() + "{")
    with pytest.raises(ValueError, match=r"found\.jsonl"):
        catalogue.walk(found, ["pit_*"], told.append)
    with pytest.raises(ValueError, match="names: wanted some of timm, torchvision or transformers; got no_such"):
        catalogue.walk(None, ["no_such"], told.append)


def test_the_document_has_a_row_for_each_class_and_reason() -> None:
    entries = [
        Entry("timm", "a", "m.A", "yes", "", 2e-16),
        Entry("timm", "b", "m.A", "yes", "", 3e-16),
        Entry("timm", "c", "m.A", "no", "norm", None),
        Entry("torchvision", "d", "m.D", "blocks", "1 of 2", None),
    ]
    text = catalogue.document(entries, {"timm": "1.0", "torchvision": "2.0"})
    assert "| timm | 3 | 2 | 0 | 1 | 3e-16 |" in text
    assert "| m.A | yes | 2: a, b | 3e-16 |  |" in text
    assert "| m.A | no | 1: c |  | norm |" in text
    assert "| m.D | blocks | 1: d |  | 1 of 2 |" in text
    assert "timm 1.0, torchvision 2.0." in text


def test_the_command_prints_and_writes(tmp_path: Path) -> None:
    arguments = ["models", "transformers:ViTModel", "--write", str(tmp_path / "m.md"), "--found", str(tmp_path / "f")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("transformers:ViTModel  yes  agrees to ")
    assert json.loads((tmp_path / "f").read_text())["verdict"] == "yes"
    assert "| modeling_vit.ViTModel | yes | 1: ViTModel |" in (tmp_path / "m.md").read_text()


def test_the_committed_document_says_the_same() -> None:
    rows = DOCUMENT.read_text().splitlines()
    for library, name, verdict in [(*taken, "yes") for taken in TAKEN] + [other[:3] for other in OTHERS]:
        (row,) = (row for row in rows if f" {name}," in row.replace(" |", ",") and row.count("|") == 6)
        assert f"| {verdict} |" in row, (library, name)
