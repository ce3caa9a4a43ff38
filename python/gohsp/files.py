# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside ``path`` to write to; the file takes the place of ``path`` when the block ends well.

    It keeps the ending of the name, by which some writers choose a format.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON, naming the file in the error.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: wanted JSON, but {error}") from error


def check_keys(data: Any, wanted: Sequence[str], where: str) -> None:
    """Check that a mapping has these keys and no others.

    Raises:
        ValueError: It has not; the message begins with ``where``.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: wanted a mapping, got {type(data).__name__}")
    missing = [key for key in wanted if key not in data]
    unknown = [key for key in data if key not in wanted]
    if missing or unknown:
        raise ValueError(f"{where}: missing keys {missing}, unknown keys {unknown}")
