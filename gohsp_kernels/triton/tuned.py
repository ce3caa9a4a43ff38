# SPDX-License-Identifier: Apache-2.0
"""Tiles that were measured on a device, kept as JSON: those shipped with the package first, then the user's own.

    {"device": "NVIDIA H100 80GB HBM3", "tiles": {"linear float16 16384 768x384": {"BLOCK_M": 128, ...}}, ...}

A key has the operator, the dtype and the sizes, rounded up so that near shapes share an entry: rows and tokens to a
power of two, columns to a multiple of 64. What was measured with another Triton, or of another text of the kernels, is
in a file of another name. A file that does not read, or an entry that is no tile, is left out with a line in the log: a
call never ends by it.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows, where writers that meet may lose entries
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger("gohsp_kernels")

REVISION = 1
"""Of the kernels: to be raised where a change of them makes measured tiles worthless."""

SHIPPED = Path(__file__).parent / "configs"


def user_directory() -> Path:
    """Where :mod:`gohsp_kernels.tune` writes: never into the package."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "gohsp_kernels" / "tiles"


def file_name(device: str) -> str:
    """Name of a device's file: letters and digits of the device, of Triton's version and of the kernels' revision."""
    import triton

    name = f"{device} triton {triton.__version__} kernels {REVISION}"
    return "_".join(re.findall(r"[A-Za-z0-9]+", name)) + ".json"


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


def _read(path: Path) -> dict[str, dict[str, int]]:
    """The entries of a file; none, and a line in the log, where it does not read as one of these."""
    if not path.exists():
        return {}
    try:
        return {key: dict(tile) for key, tile in json.loads(path.read_text())["tiles"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s is left out: wanted a file that python -m gohsp_kernels.tune wrote; got %r", path, error)
        return {}


@functools.cache
def tiles(device: str) -> dict[str, dict[str, int]]:
    """All entries for a device, those shipped before the user's own."""
    name = file_name(device)
    return _read(user_directory() / name) | _read(SHIPPED / name)


def lookup(device: str, key: str, fields: tuple[str, ...]) -> dict[str, int] | None:
    """The entry of a device under a key, or None. One that has not just these fields, or no sizes in them, counts as
    none, with a line in the log."""
    found = tiles(device).get(key) if device else None
    if found is None or (set(found) == set(fields) and all(_is_size(name, size) for name, size in found.items())):
        return found
    log.warning("tile of %r is left out: wanted sizes %s; got %s", key, ", ".join(fields), found)
    return None


def _is_size(name: str, size: object) -> bool:
    """Triton takes powers of two, but for the number of steps in flight."""
    if type(size) is not int:
        return False
    if name == "num_stages":
        return 1 <= size <= 16
    return size & (size - 1) == 0 and (1 <= size <= 32 if name == "num_warps" else 16 <= size <= 512)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes out that add to the same file."""
    with path.with_suffix(".lock").open("a") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)  # goes with the handle
        yield


def save(device: str, entries: dict[str, dict[str, int]], about: dict[str, Any]) -> Path:
    """Add entries to the user's file of a device, and return its path."""
    path = user_directory() / file_name(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path):
        contents = {"device": device, **about, "tiles": _read(path) | entries}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n")
        temporary.replace(path)
    tiles.cache_clear()
    return path
