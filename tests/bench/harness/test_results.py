# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bench.harness import results
from bench.harness.results import COLUMNS

from ..conftest import make_row


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.csv"
    rows = [make_row(), make_row(contender="openvino", value=41.1234, case='with "quotes", and a comma')]
    results.append(path, rows)
    assert results.read(path) == rows


def test_append_keeps_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.append(path, [make_row(batch=1)])
    results.append(path, [make_row(batch=8)])
    assert [row.batch for row in results.read(path)] == [1, 8]


def test_a_row_of_the_same_key_takes_the_place_of_the_old_one_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.append(path, [make_row(value=30.0), make_row(batch=8)])
    results.append(path, [make_row(value=20.0, rounds=99, run="2026-02-02T00:00:00Z")])
    assert [(row.batch, row.value) for row in results.read(path)] == [(8, 30.0), (1, 20.0)]


@pytest.mark.parametrize("column", COLUMNS[: COLUMNS.index("value")])
def test_every_column_of_the_key_tells_rows_apart(column: str, tmp_path: Path) -> None:
    old = make_row()
    value = getattr(old, column)
    new = dataclasses.replace(old, **{column: value + 1 if isinstance(value, int) else value + "'"})
    path = tmp_path / "results.csv"
    results.append(path, [old])
    results.append(path, [new])
    assert results.read(path) == [old, new]


def test_the_key_is_what_the_contract_asks_for() -> None:
    wanted = {"routine", "case", "contender", "dtype", "threads", "cpu", "isa", "torch", "timm", "version", "commit"}
    assert wanted <= {*COLUMNS[: COLUMNS.index("value")]}


def test_two_rows_of_one_key_in_one_call_leave_the_last(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    results.append(path, [make_row(value=1.0), make_row(value=2.0)])
    assert [row.value for row in results.read(path)] == [2.0]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.csv"
    results.append(path, [make_row()])
    before = path.read_bytes()

    def fail_half_way(target: Path, *_: object) -> None:
        target.write_text("routine,ca")
        raise OSError("no space left")

    monkeypatch.setattr(results, "_write", fail_half_way)
    with pytest.raises(OSError, match="no space left"):
        results.append(path, [make_row(batch=8)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_the_file_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.csv"
    results.append(path, [make_row()])
    write, seen = results._write, []

    def look_while_writing(target: Path, *table: Any) -> None:
        write(target, *table)
        seen.append(results.read(path))

    monkeypatch.setattr(results, "_write", look_while_writing)
    results.append(path, [make_row(batch=8)])
    assert seen == [[make_row()]]
    assert len(results.read(path)) == 2


def test_a_file_of_another_kind_is_refused_and_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("name,value\na,1\n")
    with pytest.raises(ValueError, match=r"results\.csv: wanted the columns routine, .*; got \['name', 'value'\]"):
        results.append(path, [make_row()])
    assert path.read_text() == "name,value\na,1\n"


@pytest.mark.parametrize(("old", "new"), [(",197,", ",many,"), (",30,", ",fast,"), (",2026-01-01T00:00:00Z", "")])
def test_a_malformed_value_is_refused_with_its_line(tmp_path: Path, old: str, new: str) -> None:
    path = tmp_path / "results.csv"
    results.append(path, [make_row()])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=r"results\.csv:2: "):
        results.read(path)


def test_reading_what_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        results.read(tmp_path / "results.csv")


def test_two_writers_lose_no_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda batch: results.append(path, [make_row(batch=batch)]), range(1, 33)))
    assert sorted(row.batch for row in results.read(path)) == list(range(1, 33))
