# SPDX-License-Identifier: Apache-2.0
"""Tiles that were measured on a device, kept as JSON: those shipped with the package first, then the user's own.

    {"device": "NVIDIA H100 80GB HBM3", "tiles": {"linear float16 16384 768x384": {"BLOCK_M": 128, ...}}, ...}

A key has the operator, the dtype and the sizes, rounded up so that near shapes share an entry: rows and tokens to a
power of two, columns to a multiple of 64.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

SHIPPED = Path(__file__).parent / "configs"


def user_directory() -> Path:
    """Where :mod:`gohsp_kernels.tune` writes: never into the package."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gohsp_kernels" / "tiles"


def file_name(device: str) -> str:
    """Name of a device's file: its letters and digits, joined by underscores."""
    return "_".join(re.findall(r"[A-Za-z0-9]+", device)) + ".json"


def _bucket(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _columns(n: int) -> int:
    return -(-n // 64) * 64


def linear_key(dtype: torch.dtype, rows: int, outputs: int, inputs: int, indexed: bool) -> str:
    """Key of a linear layer; ``indexed`` where it gathers or scatters columns."""
    sizes = f"{_bucket(rows)} {_columns(outputs)}x{_columns(inputs)}"
    return f"linear {str(dtype).removeprefix('torch.')} {sizes}{' indexed' if indexed else ''}"


def attention_key(dtype: torch.dtype, queries: int, tokens: int, widest: int, aligned: bool) -> str:
    """Key of attention over heads padded to at most ``widest`` channels."""
    sizes = f"{_bucket(queries)} of {_bucket(tokens)}, {widest}"
    return f"attention {str(dtype).removeprefix('torch.')} {sizes}{'' if aligned else ' unaligned'}"


@functools.cache
def tiles(device: str) -> dict[str, dict[str, int]]:
    """All entries for a device.

    Raises:
        ValueError: for a file that does not read as one of these.
    """
    found: dict[str, dict[str, int]] = {}
    for directory in (user_directory(), SHIPPED):  # the later one wins
        path = directory / file_name(device)
        if path.exists():
            try:
                found |= json.loads(path.read_text())["tiles"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}: wanted a file that python -m gohsp_kernels.tune wrote; {error!r}") from error
    return found


def lookup(device: str, key: str) -> dict[str, int] | None:
    """The entry of a device under a key, or None."""
    return tiles(device).get(key) if device else None


def save(device: str, entries: dict[str, dict[str, int]], about: dict[str, Any]) -> Path:
    """Add entries to the user's file of a device, and return its path."""
    path = user_directory() / file_name(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text())["tiles"] if path.exists() else {}
    text = json.dumps({"device": device, **about, "tiles": before | entries}, indent=1, sort_keys=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(text + "\n")
    temporary.replace(path)
    tiles.cache_clear()
    return path
