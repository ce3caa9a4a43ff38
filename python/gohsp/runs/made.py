# SPDX-License-Identifier: Apache-2.0
"""What the files of a run were made from: one record a file, in made.json, so that none is taken for what it is not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gohsp.files import check_keys, read_json, write_json

FORMAT = 1
SHORT = 64  # characters of a digest, which says nothing to a reader


@dataclass(frozen=True)
class Made:
    """The records of a directory, by the names of its files; a record is a mapping of plain values."""

    directory: Path

    def of(self, path: Path) -> dict[str, Any] | None:
        """Return what a file was made from; None where there is no record, as of files that older versions wrote.

        Raises:
            ValueError: made.json is damaged.
        """
        return self._read().get(path.name)

    def record(self, path: Path, made_from: Mapping[str, Any]) -> None:
        """Record what a file was made from."""
        files = {**self._read(), path.name: dict(made_from)}
        write_json(self.directory / "made.json", {"format": FORMAT, "files": files})

    @contextmanager
    def making(self, path: Path, made_from: Mapping[str, Any]) -> Iterator[None]:
        """Record what a file is made from, once the block that writes it has ended well.

        Until then its record is empty, which fits nothing: so a file that was half replaced is not taken for whole.
        """
        self.record(path, {})
        yield
        self.record(path, made_from)

    def stamp(self, path: Path) -> str | None:
        """Return the digest of a file's record, by which another file tells that it was made from this one."""
        record = self.of(path)
        return None if record is None else hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()

    def difference(self, path: Path, made_from: Mapping[str, Any]) -> str | None:
        """Return in words how the record of a file differs from what it would be made from now; None if it does not."""
        record = self.of(path)
        if record is None:
            return "there is no record of what it was made from"
        if not record:
            return "it was not finished"
        return differences(record, made_from)

    def _read(self) -> dict[str, Any]:
        path = self.directory / "made.json"
        if not path.is_file():
            return {}
        data = read_json(path)
        check_keys(data, ("format", "files"), str(path))
        if data["format"] != FORMAT:
            raise ValueError(f"{path}: wanted format {FORMAT}, got {data['format']!r}")
        files = data["files"]
        if not isinstance(files, dict) or not all(isinstance(record, dict) for record in files.values()):
            raise ValueError(f"{path}: files: wanted a mapping of mappings")
        return files


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words what differs between two records, None if nothing does; values are named where they are short."""
    # Records are compared as the file has them: tuples are lists there.
    now = json.loads(json.dumps(now))
    names = [name for name in (*now, *(before.keys() - now.keys())) if before.get(name) != now.get(name)]
    told = []
    for name in names:
        old, new = str(before.get(name)), str(now.get(name))
        told.append(name.replace("_", " ") + (f" ({old}, not {new})" if max(len(old), len(new)) < SHORT else ""))
    return f"it was made with another {' and another '.join(told)}" if told else None
