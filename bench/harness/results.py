# SPDX-License-Identifier: Apache-2.0
"""Results as CSV files of two kinds; a file of either changes whole or not at all.

All routines share one file: a row a measured number (:class:`Row`), appended, or put in the place of the row of the
same key. Each study has a table of its own, with its own columns: :func:`read_table`, :func:`write_table`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from gohsp.files import exclusive, replacing

DEFAULT_PATH = Path("bench/results/results.csv")


@dataclass(frozen=True)
class Row:
    """One number and all that tells it from others.

    Attributes:
        routine: The one of the benchmark's commands measured it.
        case: Model and preset, or a kernel's shape.
        part: The part of the case: "model", "attention", "mlp", the name of an operator.
        batch, tokens: Images, and tokens of each.
        contender: Name of the contender that ran it.
        metric: What the value is: "time", "ratio", "growth", "rate" ...
        dtype: Type of weights and activations.
        threads: Number of threads of every contender.
        cpu, isa: Name of the processor, instruction set of the kernels.
        torch, timm, version: Versions of torch, timm and the contender's own library.
        commit: Commit of this repository; ends in "-dirty" where tracked files had changes.
        value, p20, p80: Median and percentiles over the rounds, in ``unit``.
        unit: "ms", "x" (a ratio), "GFLOP/s" ...
        rounds: Number of timed spans.
        run: UTC time at which the command started: rows that were timed in turns share it.
    """

    routine: str
    case: str
    part: str
    batch: int
    tokens: int
    contender: str
    metric: str
    dtype: str
    threads: int
    cpu: str
    isa: str
    torch: str
    timm: str
    version: str
    commit: str
    value: float
    p20: float
    p80: float
    unit: str
    rounds: int
    run: str

    @property
    def key(self) -> tuple[object, ...]:
        """All that has to be equal for one row to take another's place."""
        return tuple(getattr(self, name) for name in COLUMNS[: COLUMNS.index("value")])


COLUMNS: tuple[str, ...] = tuple(field.name for field in fields(Row))
_CONVERT = {"int": int, "float": float, "str": str}


def append(path: Path, rows: Sequence[Row]) -> None:
    """Add rows at the end of the file; older rows with the same key go.

    Raises:
        ValueError: The file is there and is not one of these.
    """
    new = {row.key: row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(path.parent):
        kept = [row for row in read(path) if row.key not in new] if path.exists() else []
        write_table(path, COLUMNS, (_cells(row) for row in [*kept, *new.values()]))


def read(path: Path) -> list[Row]:
    """Return the rows of a file, oldest first.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Its columns are not those of :class:`Row`, or a value is malformed.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: wanted the columns {', '.join(COLUMNS)}; got {reader.fieldnames}")
        return [_row(entry, f"{path}:{reader.line_num}") for entry in reader]


def _row(entry: dict[str, str], where: str) -> Row:
    # The csv module marks cells that are missing, or too many, with None.
    if None in entry or None in entry.values():
        raise ValueError(f"{where}: wanted {len(COLUMNS)} values")
    try:
        return Row(**{field.name: _CONVERT[str(field.type)](entry[field.name]) for field in fields(Row)})
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _cells(row: Row) -> dict[str, Any]:
    return {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(row).items()}


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a study's table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a table in the place of what was there; a column that a row lacks stays empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        _write(temporary, columns, rows)


def _write(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
