# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxother, _repr.maxlong = 3, 8, 4, 120, 120, 40


def shown(value: Any) -> str:
    """Return a value for a message: what ``repr`` gives, cut where it is long."""
    return _repr.repr(value)


def explain(error: ValidationError, where: str) -> str:
    """Return the first fault that pydantic found, as one line that begins with ``where`` and the name of the field."""
    first = error.errors(include_url=False)[0]
    name = ".".join((where, *(shown(str(part)).strip("'\"") for part in first["loc"])))
    return f"{name}: {first['msg']}, got {shown(first['input'])}"


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
