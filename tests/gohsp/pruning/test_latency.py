# SPDX-License-Identifier: Apache-2.0
"""The latency table: measured on a small model, linear in between, a file and back."""

from __future__ import annotations

import json

import pytest

from gohsp.pruning.budget import BlockBudget
from gohsp.pruning.latency import LatencyTable


def budget(heads: int, hidden: int, channels: int | None = None) -> BlockBudget:
    channels = 16 * heads if channels is None else channels
    return BlockBudget(heads, channels, channels, hidden, 48, 48, 48, 48)


@pytest.fixture(scope="module")
def measured(make_model) -> LatencyTable:
    model = make_model(img_size=32, embed_dim=48, num_heads=3).float()
    return LatencyTable.measure(model, batch=2, rounds=3)


def test_a_table_holds_the_model_and_ascending_times(measured: LatencyTable) -> None:
    assert (measured.dim, measured.num_heads, measured.head_dim, measured.hidden) == (48, 3, 16, 192)
    assert measured.batch == 2
    assert measured.outside > 0
    assert len(measured.attention) == 3 and measured.neurons[-1] == 192
    for values in (measured.attention, measured.mlp, measured.neurons):
        assert list(values) == sorted(values)
    assert len(measured.mlp) == len(measured.neurons)


def test_widths_between_the_measured_ones_are_linear() -> None:
    table = LatencyTable(
        dim=48,
        num_heads=3,
        head_dim=16,
        hidden=192,
        batch=1,
        threads=1,
        outside=1.0,
        attention=(1.0, 2.0, 4.0),
        neurons=(64, 192),
        mlp=(3.0, 5.0),
    )
    assert table.block_cost(budget(1, 64)) == (1.0, 3.0)
    assert table.block_cost(budget(3, 192)) == (4.0, 5.0)
    assert table.block_cost(budget(3, 128, channels=40)) == (3.0, 4.0)  # two and a half heads
    assert table.block_cost(budget(1, 16, channels=8)) == (1.0, 3.0)  # nothing is known below what was measured


def test_a_file_and_back(measured: LatencyTable, tmp_path) -> None:
    measured.save(tmp_path / "latency.json")
    assert LatencyTable.load(tmp_path / "latency.json") == measured
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]


def test_a_file_that_is_no_table_is_refused(tmp_path) -> None:
    (tmp_path / "latency.json").write_text('{"dim": 48, "speed": "fast"}')
    with pytest.raises(ValueError, match="speed"):
        LatencyTable.load(tmp_path / "latency.json")


TABLE = {
    "dim": 48, "num_heads": 3, "head_dim": 16, "hidden": 192, "batch": 1, "threads": 1, "outside": 1.0,
    "attention": [1.0, 2.0, 4.0], "neurons": [64, 192], "mlp": [3.0, 5.0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention", [1.0, 2.0]),
        ("attention", [1.0, 4.0, 2.0]),
        ("attention", [-1.0, 2.0, 4.0]),
        ("attention", "fast"),
        ("mlp", [3.0]),
        ("mlp", []),
        ("mlp", [5.0, 3.0]),
        ("neurons", []),
        ("neurons", [192, 64]),
        ("neurons", [0, 192]),
        ("neurons", [64, 128]),
        ("neurons", [192, 192]),
        ("outside", -1.0),
        ("outside", "1"),
        ("outside", None),
        ("hidden", 10**9),
        ("num_heads", 0),
        ("threads", 0),
        ("batch", True),
    ],
)
def test_values_that_no_measurement_gives_are_refused_in_a_line(tmp_path, name: str, value: object) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(TABLE))
    LatencyTable.load(path)
    path.write_text(json.dumps({**TABLE, name: value}))
    with pytest.raises(ValueError, match=r"latency\.json[.:][^\n]*$") as raised:
        LatencyTable.load(path)
    assert "\n" not in str(raised.value)
