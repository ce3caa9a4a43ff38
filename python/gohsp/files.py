# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all, and files of strangers, which are checked before they are believed."""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError

try:
    import fcntl
except ImportError:  # Windows, where folders cannot be opened: they are neither locked nor flushed
    fcntl = None  # type: ignore[assignment]

MAX_JSON = 2**26
"""Bytes of a JSON file that are read."""

MAX_NESTING = 32
"""Lists and mappings within each other in a JSON file."""

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxdict, _repr.maxstring, _repr.maxother, _repr.maxlong = 3, 8, 4, 120, 120, 40

_of_thread = threading.local()


@contextmanager
def scratch(directory: Path) -> Iterator[Path]:
    """Give a new folder inside ``directory`` that is one's own until the block ends; then it goes.

    Nobody can guess its name or put a link into it. Those that killed writers left behind are removed first; on Windows
    they stay.
    """
    for left in directory.glob(".gohsp-*.tmp"):
        _remove_if_left(left)
    folder, handle = _own_folder(directory)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _release(handle)


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Let no other writer that asks for the same directory in until the block ends: they wait. A kill ends it too.

    Who holds the directory already, by this or by :func:`alone`, in the same thread, does not wait for itself.
    """
    with _held(directory, _acquire):
        yield


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """As :func:`exclusive`, for work that takes too long for others to wait for.

    Raises:
        ValueError: Somebody else has the directory; the message names it.
    """

    def acquire(handle: int) -> None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{directory}: another process or thread works there; wait for its end") from error
        except OSError:  # some network disks have no locks
            pass

    with _held(directory, acquire):
        yield


@contextmanager
def _held(directory: Path, acquire: Callable[[int], None]) -> Iterator[None]:
    """Hold the lock on a directory in the block, unless this thread has it."""
    if fcntl is None:
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        found = os.fstat(handle)
        folder, mine = (found.st_dev, found.st_ino), _of_thread.__dict__.setdefault("folders", set())
        if folder in mine:
            yield
            return
        acquire(handle)
        mine.add(folder)
        try:
            yield
        finally:
            mine.remove(folder)
    finally:
        _release(handle)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in what the system says while it is written: elsewhere, or by other libraries, as it may be."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def publish(written: Path, path: Path) -> None:
    """Rename a file of a :func:`scratch` folder to its place, on the disk and with the mode that new files have."""
    probe = written.with_name(".mode")
    os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    written.chmod(stat.S_IMODE(probe.stat().st_mode))  # some writers leave 0600
    probe.unlink()
    _flush(written)
    rename(written, path)


def rename(old: Path, new: Path) -> None:
    """Rename a file within a disk, and have the disk know before anything that comes after."""
    os.replace(old, new)
    _flush(new.parent)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; the file takes the place of ``path`` when the block ends well.

    It has the same name in another folder: by its ending some writers choose a format.
    """
    with naming(path), scratch(path.parent) as folder:
        yield folder / path.name
        publish(folder / path.name, path)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON."""
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a file of at most so many bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is larger, no ordinary file, or cannot be read.
    """
    with refusing(path, limit) as size, path.open("rb") as file:
        return file.read(size)


@contextmanager
def refusing(path: Path, limit: int) -> Iterator[int]:
    """Give the size of a file that may be read in the block, if it is an ordinary one of at most so many bytes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is larger, no ordinary file, or the block could not read it.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # to open a pipe would wait for a writer
            raise ValueError(f"{path}: wanted a file, got a folder or a device")
        if found.st_size > limit:
            raise ValueError(f"{path}: wanted at most {limit} bytes, got {found.st_size}")
        yield found.st_size
    except NotADirectoryError as error:
        raise FileNotFoundError(f"{path}: there is no such file") from error
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise ValueError(f"{path}: wanted a file that can be read, but: {reason}") from error


def read_json(path: Path) -> Any:
    """Read JSON, naming the file in the error.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON, or see :func:`parse_json` and :func:`read_bytes`.
    """
    return parse_json(read_bytes(path, MAX_JSON), str(path))


def parse_json(data: bytes, where: str, finite: bool = True) -> Any:
    """Return what JSON in UTF-8 says.

    Args:
        data: The text.
        where: What the message of an error begins with.
        finite: Refuse numbers that are infinite or none.

    Raises:
        ValueError: It is not JSON, is nested too deeply, or has such a number.
    """
    try:
        hooks: dict[str, Any] = {"parse_constant": _number, "parse_float": _number} if finite else {}
        value = json.loads(data.decode("utf-8"), **hooks)
    except RecursionError as error:
        raise _too_deep(where) from error
    except ValueError as error:
        raise ValueError(f"{where}: wanted JSON, but {error}") from error
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [entry for node in level for entry in _inner(node)]
        if not level:
            return value
    raise _too_deep(where)


def check_keys(data: Any, wanted: Sequence[str], where: str, optional: Sequence[str] = ()) -> None:
    """Check that a mapping has these keys and, but for optional ones, no others.

    Raises:
        ValueError: It has not; the message begins with ``where``.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: wanted a mapping, got {type(data).__name__}")
    missing = [key for key in wanted if key not in data]
    unknown = [key for key in data if key not in wanted and key not in optional]
    if missing or unknown:
        raise ValueError(f"{where}: missing keys {shown(missing)}, unknown keys {shown(unknown)}")


def shown(value: Any) -> str:
    """Return a value for a message: what ``repr`` gives, cut where it is long."""
    return _repr.repr(value)


def cut(error: BaseException) -> str:
    """Return the kind of an error of another library and what it says, as one line that is not long."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else f"{text[:300]}..."


def explain(error: ValidationError, where: str) -> str:
    """Return the first fault that pydantic found, as one line that begins with ``where`` and the name of the field."""
    first = error.errors(include_url=False)[0]
    name = ".".join((where, *(shown(str(part)).strip("'\"") for part in first["loc"])))
    return f"{name}: {first['msg']}, got {shown(first['input'])}"


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it has a number that is not finite: {text[:40]}")
    return value


def _inner(node: Any) -> list[Any]:
    """Return the lists and mappings directly within one."""
    entries = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [entry for entry in entries if isinstance(entry, dict | list)]


def _too_deep(where: str) -> ValueError:
    return ValueError(f"{where}: wanted JSON of at most {MAX_NESTING} levels")


def _own_folder(directory: Path) -> tuple[Path, int | None]:
    """Return a new folder and the lock on it that tells others that its writer lives."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=".gohsp-", suffix=".tmp", dir=directory))
        if fcntl is None:
            return folder, None
        with suppress(FileNotFoundError):  # another writer may take it away before it is locked
            handle = os.open(folder, os.O_RDONLY)
            _acquire(handle)
            if folder.is_dir():
                return folder, handle
            _release(handle)


def _remove_if_left(folder: Path) -> None:
    if fcntl is None:
        return
    with suppress(OSError):  # its writer lives, somebody else removed it, or it belongs to another user
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            _release(handle)


def _acquire(handle: int) -> None:
    with suppress(OSError):  # some network disks have no locks
        fcntl.flock(handle, fcntl.LOCK_EX)


def _release(handle: int | None) -> None:
    if handle is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may hold the same handle
        os.close(handle)


def _flush(path: Path) -> None:
    if fcntl is None and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if fcntl else os.O_RDWR)  # Windows flushes only what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
