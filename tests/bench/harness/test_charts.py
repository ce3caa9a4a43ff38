# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from bench.harness import charts, results
from bench.harness.results import Row
from bench.studies import one_shot

from ..conftest import make_row

CONTENDERS = {"gohsp": 30.0, "openvino": 42.0, "sliced": 47.0, "dense": 70.0}


def _end_to_end(run: str = "2026-01-01T00:00:00Z", factor: float = 1.0) -> list[Row]:
    return [
        make_row(contender=name, batch=batch, value=ms, p20=ms * 0.9, p80=ms * 1.1, run=run)
        for batch in (1, 8)
        for name, ms in ((name, factor * batch * ms) for name, ms in CONTENDERS.items())
    ]


def _roofline() -> list[Row]:
    values = {"intensity": (80.0, "FLOP/byte"), "rate": (150.0, "GFLOP/s"), "share of limit": (0.8, "x")}
    return [
        make_row(routine="roofline", part="machine", contender="torch", metric="gemm rate", value=190.0),
        make_row(routine="roofline", part="machine", contender="torch", metric="copy rate", value=12.0),
        *(
            make_row(routine="roofline", part=part, metric=metric, value=value, unit=unit)
            for part in ("attention", "mlp", "encoder")
            for metric, (value, unit) in values.items()
        ),
    ]


def _texts(path: Path) -> list[str]:
    root = ET.parse(path).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(node.itertext()).strip() for node in root.iter("{http://www.w3.org/2000/svg}text")]


def _write(path: Path, rows: list[Row]) -> Path:
    results.append(path, rows)
    return path


def test_charts_come_from_the_csv_alone(tmp_path: Path) -> None:
    source = _write(tmp_path / "results.csv", [*_end_to_end(), *_roofline()])
    drawn = charts.draw_all(source, tmp_path / "charts")
    assert [path.name for path in drawn] == ["end-to-end.svg", "roofline.svg"]
    assert sorted(path.name for path in (tmp_path / "charts").iterdir()) == ["end-to-end.svg", "roofline.svg"]


def test_the_chart_names_every_contender_value_case_and_machine(tmp_path: Path) -> None:
    texts = _texts(charts.draw_all(_write(tmp_path / "results.csv", _end_to_end()), tmp_path)[0])
    assert all(texts.count(name) == 2 for name in CONTENDERS)  # a panel for each batch size
    assert "vit/4x960 model, batch 1" in texts and "vit/4x960 model, batch 8" in texts
    assert {"30", "42", "47", "70", "240", "336", "376", "560"} <= {*texts}
    assert "milliseconds a batch (less is better)" in texts
    (machine,) = (text for text in texts if "Some CPU" in text)
    assert all(fact in machine for fact in ("avx2", "2 threads", "float32", "torch 2.14.1", "commit 0123456789ab"))


def test_the_same_numbers_give_the_same_file(tmp_path: Path) -> None:
    source = _write(tmp_path / "results.csv", [*_end_to_end(), *_roofline()])
    first = [path.read_bytes() for path in charts.draw_all(source, tmp_path / "a")]
    assert first == [path.read_bytes() for path in charts.draw_all(source, tmp_path / "b")]


def test_only_the_last_run_of_a_case_is_drawn() -> None:
    old, new = _end_to_end(), _end_to_end("2026-02-02T00:00:00Z", factor=2)
    only_new = [row for row in new if row.batch == 8 and row.contender != "dense"]
    rows = charts.latest([*old, *only_new], "end-to-end", "time")
    assert [(row.batch, row.contender, row.value) for row in rows] == [
        *((1, name, ms) for name, ms in CONTENDERS.items()),
        *((8, name, 16 * ms) for name, ms in CONTENDERS.items() if name != "dense"),
    ]


@pytest.mark.parametrize("other", [{"cpu": "Another"}, {"isa": "avx512"}, {"threads": 64}])
def test_other_machines_do_not_stand_beside_the_last_one(other: dict[str, object]) -> None:
    here = make_row(batch=1)
    rows = [make_row(batch=8, **other), here]
    assert charts.latest(rows, "end-to-end", "time") == [here]


def test_other_routines_and_metrics_are_not_drawn() -> None:
    rows = [make_row(metric="error"), make_row(routine="sublayers"), make_row()]
    assert charts.latest(rows, "end-to-end", "time") == [make_row()]
    assert charts.latest(rows, "contention", "growth") == []


def test_gohsp_stands_out_by_its_colour(tmp_path: Path) -> None:
    svg = charts.draw_all(_write(tmp_path / "results.csv", _end_to_end()), tmp_path)[0].read_text()
    assert svg.count(f"fill: {charts.OWN_COLOUR}") == 2
    assert svg.count(f"fill: {charts.OTHER_COLOUR}") == 6


def test_roofline_shows_its_points_and_the_limits(tmp_path: Path) -> None:
    texts = _texts(charts.draw_all(_write(tmp_path / "results.csv", _roofline()), tmp_path)[0])
    assert {"attention x1", "mlp x1", "encoder x1", "vit/4x960", "GFLOP/s"} <= {*texts}


@pytest.mark.parametrize(("routine", "metric"), [("sublayers", "time"), ("kernels", "ratio"), ("contention", "growth")])
def test_every_routine_has_a_chart(routine: str, metric: str, tmp_path: Path) -> None:
    rows = [make_row(routine=routine, metric=metric), make_row(routine=routine, metric=metric, contender="sliced")]
    assert charts.draw_all(_write(tmp_path / "r.csv", rows), tmp_path) == [tmp_path / f"{routine}.svg"]


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"r\.csv: wanted rows to draw, got none"):
        charts.draw_all(_write(tmp_path / "r.csv", []), tmp_path / "charts")
    assert not (tmp_path / "charts").exists()


def test_accuracy_over_measured_time(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"method": method, "optimiser": optimiser, "top1_kept": 0.7, "top1_refitted": 0.72, "ms": ms}
        for method in ("gohsp", "l2")
        for optimiser in ("ridge", "drop")
        for ms in (3.0, 2.5, "")
    ]
    source, target = tmp_path / "study.csv", tmp_path / "charts" / "study.svg"
    results.write_table(source, one_shot.COLUMNS, rows)
    charts.draw_accuracy(source, target)
    texts = _texts(target)
    for wanted in ("ridge, head kept", "drop, head fitted anew", "gohsp", "l2", "top-1 (%)"):
        assert wanted in texts
    results.write_table(source, one_shot.COLUMNS, [row | {"ms": ""} for row in rows])
    with pytest.raises(ValueError, match="accuracy study --times adds them"):
        charts.draw_accuracy(source, target)
