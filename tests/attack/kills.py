# SPDX-License-Identifier: Apache-2.0
"""Work in forked processes, which may be killed, and what is in a folder afterwards."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

POINTS = ("replace", "fsync", "open", "unlink", "rmdir", "chmod", "mkdir")
"""Functions of os at whose calls a process is killed, or which fail."""

LIMIT = 300
"""Seconds after which a forked process is taken for one that hangs."""

TIMES_OF = {"seconds", "prune_seconds", "epoch_seconds", "ms", "times_gohsp", "value", "p20", "p80", "run", "machine"}
"""Names, in JSON and CSV files, of what is a time or hangs on it."""

OF_THE_BYTES = {"sha256", "tensors_sha256", "saved_bytes"}
"""Digests and sizes of what has times in it."""


def fork(work: Callable[[], Any]) -> int:
    """Do some work in a fork, quietly, with one thread, and return its number; it ends with 0, or as sys.exit says."""
    child = os.fork()
    if child:
        return child
    try:
        signal.alarm(LIMIT)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        torch.set_num_threads(1)  # threads of the parent are not there
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def status_of(child: int) -> int:
    """Wait for a fork; return its exit status, or the signal that ended it with a minus."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != -signal.SIGALRM, f"it did not end within {LIMIT} s"
    return status


def in_child(work: Callable[[], Any], kill_after: float | None = None) -> bool:
    """Do some work in a fork, perhaps killed from outside after some seconds; return whether it was killed."""
    child = fork(work)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = status_of(child)
    assert status in (0, -signal.SIGKILL), f"the work failed with {status}"
    return status != 0


def killed_at(point: str, number: int, work: Callable[[], Any], sent: int = signal.SIGKILL) -> None:
    """Do some work, but get a signal at a call of a function of os, before or after it in turn."""
    calls, real = 0, getattr(os, point)

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number // 2 and number % 2 == 0:
            os.kill(os.getpid(), sent)
        try:
            return real(*args, **kwargs)
        finally:
            if calls == number // 2 and number % 2 == 1:
                os.kill(os.getpid(), sent)

    setattr(os, point, dying)
    work()


def calls_in(work: Callable[[], Any]) -> dict[str, int]:
    """Do some work in a fork; return how often it called each of :data:`POINTS`."""
    reading, writing = os.pipe()
    calls = dict.fromkeys(POINTS, 0)

    def counting(point: str) -> Callable[..., Any]:
        real = getattr(os, point)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[point] += 1
            return real(*args, **kwargs)

        return call

    def count() -> None:
        for point in POINTS:
            setattr(os, point, counting(point))
        try:
            work()
        finally:
            os.write(writing, json.dumps(calls).encode())

    assert status_of(fork(count)) == 0, "the work failed"
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        return dict(json.loads(told.read()))


def contents(folder: Path, litter: bool = True) -> dict[str, Any]:
    """Return what is in a folder, hidden files and empty folders too, without times and digests of files' bytes.

    Args:
        folder: Where to look, and in the folders in it.
        litter: Whether what writers left that did not come to their end is taken for a part of it.
    """
    paths = [path for path in sorted(folder.rglob("*")) if litter or not is_litter(path)]
    return {str(path.relative_to(folder)): "folder" if path.is_dir() else _content(path) for path in paths}


def is_litter(path: Path) -> bool:
    return any(part.startswith(".gohsp-") for part in path.parts)


def _content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _tensors(path)
    if path.suffix == ".json":
        return lasting(json.loads(path.read_text()))
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return [lasting(row) for row in csv.DictReader(file)]
    return "not compared" if path.suffix == ".html" else path.read_bytes()  # a page shows times


def _tensors(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        told = {key: _parsed(text) for key, text in (file.metadata() or {}).items()}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    found = {
        name: (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest())
        for name, tensor in tensors.items()
    }
    return told, found


def _parsed(text: str) -> Any:
    return lasting(json.loads(text)) if text.startswith("{") else text


def lasting(value: Any) -> Any:
    """Return what of a value of JSON is the same each time."""
    if isinstance(value, dict):
        return {key: lasting(entry) for key, entry in value.items() if key not in TIMES_OF | OF_THE_BYTES}
    return [lasting(entry) for entry in value] if isinstance(value, list) else value
