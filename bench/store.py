# SPDX-License-Identifier: Apache-2.0
"""The one CSV file of results: a row a measured number, appended, or put in the place of the row of the same key."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from gohsp.files import replacing

DEFAULT_PATH = Path("bench/results/results.csv")


@dataclass(frozen=True)
class Row:
    """One number and all that tells it from others.

    Attributes:
        routine: Which of the benchmark's commands measured it.
        case: Model and preset, or a kernel's shape.
        part: What of the case: "model", "attention", "mlp", the name of an operator.
        batch, tokens: Images, and tokens of each.
        contender: Who ran it.
        metric: What the value is: "time", "ratio", "growth", "rate" ...
        dtype: Of weights and activations.
        threads: Of every contender.
        cpu, isa: Name of the processor, instruction set of the kernels.
        torch, timm, version: Versions of torch, timm and the contender's own library.
        commit: Of this repository; ends in "-dirty" where tracked files had changes.
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
    """Add rows at the end of the file; older rows with the same key go. The file changes whole or not at all.

    Raises:
        ValueError: The file is there and is not one of these.
    """
    new = {row.key: row for row in rows}
    kept = [row for row in read(path) if row.key not in new] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        _write(temporary, [*kept, *new.values()])


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


def _write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in asdict(row).items()})
