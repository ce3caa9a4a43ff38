# SPDX-License-Identifier: Apache-2.0
"""Disks that are full, may not be written to, or fail: one line names the file, and nothing is half written."""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import gohsp

from .kills import POINTS, contents, fork, in_child, is_litter, status_of
from .scale import TIMES
from .work import PIECES, Stage

pytestmark = pytest.mark.slow

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO)
TRIES = max(1, TIMES // 4)  # of each piece of work
QUICK = ("prune over another", "report", "mask and latency")

Spoil = Callable[[Callable[[], object]], object]


def told(into: Path, work: Callable[[], object]) -> None:
    """Do some work; what goes wrong is told in a file, by the command line or, of the library, in the same form."""
    with into.open("w") as file, redirect_stderr(file):
        try:
            work()
        except OSError as error:
            assert error.filename is not None
            print(f"library: {error.filename}: {error.strerror}", file=file)
            sys.exit(1)


def failing(point: str, first: int, last: int, number: int, work: Callable[[], object]) -> None:
    """Do some work while some calls of a function of os fail, of those within this folder."""
    calls, real, here = 0, getattr(os, point), os.getcwd()

    def call(target: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        is_open = isinstance(target, int)
        inside = (os.readlink(f"/proc/self/fd/{target}") if is_open else os.path.abspath(target)).startswith(here)
        calls += inside
        if inside and first <= calls <= last:
            raise OSError(number, os.strerror(number), *([] if is_open else [str(target)]))
        return real(target, *args, **kwargs)

    setattr(os, point, call)
    work()


def with_files_of_at_most(size: int, work: Callable[[], object]) -> None:
    """Do some work while every file that grows beyond a size fails to, whoever writes it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    work()


class Trial:
    """A piece of work that is tried on a bad disk."""

    def __init__(self, folder: Path, name: str, said: Path) -> None:
        self.stage, self.name, self.said = Stage(folder, PIECES[name]), name, said
        self.tried = self.refused = 0

    def fail(self, number: int, what: str, spoil: Spoil) -> None:
        """Do the work on the bad disk, and check what it says and what is there then."""
        status = status_of(fork(partial(told, self.said, partial(spoil, self.stage.piece.work))))
        said = self.said.read_text()
        if status == 0:  # what failed was to remove something that is not needed
            assert said == "", f"{what}: {said}"
        else:
            assert status == 1, f"{what}: {status}: {said}"
            assert re.fullmatch(rf"(gohsp [^\n]*|library): [^\n:]+: {os.strerror(number)}\n", said), f"{what}: {said}"
            assert ".gohsp-" not in said and ".model." not in said, f"{what}: no name that a user knows: {said}"
        contents(self.stage.here, litter=False)  # reads every file
        for plan in self.stage.here.rglob("plan.json"):
            assert is_litter(plan) or not in_child(partial(gohsp.load, plan.parent)), what
        self.tried, self.refused = self.tried + 1, self.refused + (status != 0)

    def go_on(self, what: str) -> None:
        """Do the work again, on the disk that is as it should be."""
        assert not in_child(self.stage.piece.work), what
        assert contents(self.stage.here) == self.stage.wanted, what

    def report(self, seed: int) -> None:
        print(f"{self.name}: tried {self.tried}, refused {self.refused}, held {self.tried}, failed 0, seed {seed}")


def a_call_that_fails(stage: Stage, draws: random.Random) -> tuple[int, str, Spoil]:
    point, error = draws.choice([point for point in POINTS if stage.calls[point]]), draws.choice(ERRORS)
    first = draws.randrange(stage.calls[point]) + 1
    last = draws.choice((first, 10**9))
    what = f"{errno.errorcode[error]} at {point} {first} to {last}"
    return error, what, partial(failing, point, first, last, error)


def a_write_that_fails(stage: Stage, draws: random.Random) -> tuple[int, str, Spoil]:
    size = draws.randrange(256, max(257, draws.choice(stage.sizes)))  # what is said has room
    return errno.EFBIG, f"files of at most {size} bytes", partial(with_files_of_at_most, size)


@pytest.mark.parametrize("name", QUICK if TIMES == 1 else PIECES)
def test_what_fails_is_one_line_and_leaves_nothing_half_done(tmp_path: Path, name: str, seed: int) -> None:
    draws, trial = random.Random(seed), Trial(tmp_path, name, tmp_path / "said")
    for number in range(TRIES):
        for kind in (a_call_that_fails, a_call_that_fails, a_write_that_fails):
            trial.stage.set()
            error, what, spoil = kind(trial.stage, draws)
            what = f"seed {seed}, number {number}: {what}"
            trial.fail(error, what, spoil)
            trial.go_on(what)
    trial.report(seed)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)):
        pytest.skip("nothing may be mounted here")
    yield place
    os.chdir(tmp_path)
    subprocess.run(["umount", str(place)], check=True)


def mount(*arguments: str) -> bool:
    if shutil.which("mount") is None:
        return False
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def test_a_small_disk(tmp_path: Path, disk: Path, seed: int) -> None:
    """Filled to its last pages, or read-only; then it works again."""
    draws, trial = random.Random(seed), Trial(disk, "prune over another", tmp_path / "said")
    for number in range(2 * TRIES):
        trial.stage.set()
        room = draws.randrange(16) * 4096
        what = f"seed {seed}, number {number}: {room} bytes are free"
        found = os.statvfs(disk)
        (disk / "filler").write_bytes(bytes(max(0, found.f_bavail * found.f_frsize - room)))
        trial.fail(errno.ENOSPC, what, lambda work: work())
        (disk / "filler").unlink()
        trial.go_on(what)
    trial.stage.set()
    assert mount("-o", "remount,ro", str(disk))
    trial.fail(errno.EROFS, "read-only", lambda work: work())
    assert mount("-o", "remount,rw", str(disk))
    trial.go_on("read-only")
    assert trial.refused
    trial.report(seed)
