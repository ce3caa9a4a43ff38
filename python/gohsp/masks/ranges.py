# SPDX-License-Identifier: Apache-2.0
"""Kept entries as text: ranges of indices such as ``"0-3,7"``, ``"all"``, or ``""`` for none."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from gohsp.files import shown

_RANGES = re.compile(r"(\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*)?", re.ASCII)


def to_ranges(kept: Tensor) -> str | list[str]:
    """Return the kept entries as ranges, one string a row where there are two dimensions."""
    if kept.dim() == 2:
        return [_row_to_ranges(row) for row in kept]
    return _row_to_ranges(kept)


def _row_to_ranges(row: Tensor) -> str:
    if bool(row.all()):
        return "all"
    runs: list[list[int]] = []
    for index in row.nonzero().flatten().tolist():
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_ranges(value: Any, shape: tuple[int, ...], where: str) -> Tensor:
    """Return the boolean tensor of a shape that :func:`to_ranges` wrote.

    Raises:
        ValueError: The value is malformed; the message begins with ``where``.
    """
    if len(shape) == 1:
        return _row_from_ranges(value, shape[0], where)
    if not isinstance(value, list) or len(value) != shape[0]:
        raise ValueError(f"{where}: wanted a list of {shape[0]} strings, got {shown(value)}")
    rows = [_row_from_ranges(row, shape[1], f"{where}[{i}]") for i, row in enumerate(value)]
    return torch.stack(rows)


def _row_from_ranges(value: Any, size: int, where: str) -> Tensor:
    if value == "all":
        return torch.ones(size, dtype=torch.bool, device="cpu")
    longest = size * (len(str(size)) + 1)  # every index by itself
    if not isinstance(value, str) or len(value) > longest or not _RANGES.fullmatch(value):
        raise ValueError(f"{where}: wanted ranges such as '0-3,7', 'all' or '', got {shown(value)}")
    kept = torch.zeros(size, dtype=torch.bool, device="cpu")
    for run in filter(None, value.split(",")):
        first, _, last = run.partition("-")
        start, stop = int(first), int(last or first)
        if not start <= stop < size:
            raise ValueError(f"{where}: wanted ascending indices below {size}, got {shown(run)}")
        kept[start : stop + 1] = True
    return kept
