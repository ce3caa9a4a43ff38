# SPDX-License-Identifier: Apache-2.0
"""Faults that are planted one at a time, to see that a test finds each: what all lists of them share.

The lists are the ``mutations.py`` beside the tests that find them. They work on a copy of the tree, never on the tree.
"""

from __future__ import annotations

import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).parents[1]
PATIENCE = 600  # seconds after which a mutant that may hang does: what finds one takes a tenth of it at most


class Change(Protocol):
    """What a fault changes: ``old``, which stands once in a file, becomes ``new``."""

    @property
    def old(self) -> str: ...
    @property
    def new(self) -> str: ...


@dataclass(frozen=True)
class Mutation:
    """A change of ``file`` that ``test`` must find."""

    file: str
    old: str
    new: str
    test: str


def plant(path: Path, mutation: Change) -> str:
    """Put a fault into a file and return the text that stood there before."""
    text = path.read_text()
    assert text.count(mutation.old) == 1, f"{path.name}: {text.count(mutation.old)} times {mutation.old!r}"
    path.write_text(text.replace(mutation.old, mutation.new))
    return text


@contextmanager
def planted(path: Path, mutation: Change) -> Iterator[None]:
    """Put a fault into a file for a while."""
    text = plant(path, mutation)
    try:
        yield
    finally:
        path.write_text(text)


def copy_tree(folder: Path, *parts: str, leave: Sequence[str] = ()) -> None:
    """Copy files and folders of the tree. Not as links, through which pytest would find what has no fault."""
    for part in parts:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__", *leave))
        else:
            shutil.copy(source, folder / part)


@dataclass(frozen=True)
class Run:
    """A run of pytest: its exit status, or the negative number of the signal that it died of, and what it said."""

    status: int
    text: str


def run_pytest(
    folder: Path,
    arguments: Sequence[str],
    environment: Mapping[str, str] | None = None,
    patience: float = float("inf"),
) -> Run:
    """Run tests of a copy of the tree up to the first that fails, on its own packages.

    In a fork of this process, which has imported what takes longest, and must therefore not have imported what is
    mutated.

    Raises:
        TimeoutError: It took longer than ``patience``, in seconds.
    """
    _import_the_slow()
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _run_in_child(folder, arguments, environment or {}, output.fileno())
        status = _wait(child, patience)
        output.seek(0)
        return Run(os.waitstatus_to_exitcode(status), output.read())


def _import_the_slow() -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # as in tests/conftest.py: before Triton is imported, which timm does
    for module in ("torch", "torchvision", "timm", "pydantic", "rich.table", "hypothesis.strategies", "pytest"):
        importlib.import_module(module)
    hypothesis = importlib.import_module("hypothesis")
    phases = hypothesis.Phase.explicit, hypothesis.Phase.generate  # a failure is enough; the smallest is not looked for
    hypothesis.settings.register_profile("faults", phases=phases)
    hypothesis.settings.load_profile("faults")
    gc.freeze()  # the forks need not look through all that again
    assert "gohsp" not in sys.modules and "gohsp_kernels" not in sys.modules


def _run_in_child(folder: Path, arguments: Sequence[str], environment: Mapping[str, str], output: int) -> None:
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        own = {"PYTHONPATH": f"{folder}:{folder / 'python'}", "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ.update({**own, **environment})
        sys.dont_write_bytecode = True
        sys.path[:0] = [str(folder), str(folder / "python")]
        importlib.invalidate_caches()
        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:anyio"]
        status = int(importlib.import_module("pytest").main([*options, *arguments]))
        sys.stdout.flush()
    finally:
        os._exit(status)


def _wait(child: int, patience: float) -> int:
    """Return the status of a child that has ended; end it where it does not in time."""
    end = time.monotonic() + patience
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError
        time.sleep(0.05)


def first_failure(
    folder: Path, arguments: Sequence[str], environment: Mapping[str, str] | None = None, dies: bool = False
) -> str:
    """Return the line of pytest about the first test that fails, or the empty string if all pass.

    Args:
        folder: A copy of the tree.
        arguments: Of pytest.
        environment: What is set beside the environment of this process.
        dies: Whether native code is at fault, which may end the process or never come back.
    """
    try:
        run = run_pytest(folder, arguments, environment, PATIENCE if dies else float("inf"))
    except TimeoutError:
        return "it hangs"
    if dies and run.status < 0:
        return f"the process dies of signal {-run.status}"
    failed = [line for line in run.text.splitlines() if line.startswith(("FAILED", "ERROR"))]
    assert run.status in (0, 1) and bool(failed) == bool(run.status), run.text
    return failed[0].split(" ", 1)[1] if failed else ""


def chosen(names: Sequence[str], mutations: Mapping[str, Mutation]) -> dict[str, Mutation]:
    """Return the faults of these names, or all; end the process where there is none of a name."""
    unknown = [name for name in names if name not in mutations]
    if unknown:
        sys.exit(f"unknown faults: {', '.join(unknown)}")
    return {name: mutations[name] for name in names or mutations}


def report(mutations: Mapping[str, Mutation], find: Callable[[Mutation], str]) -> int:
    """Try faults and return the exit status: 1 if one was not found."""
    missed = 0
    for name, mutation in mutations.items():
        failure = find(mutation)
        missed += not failure
        print(f"{'found' if failure else 'NOT FOUND':9}  {name:66}  {failure[:120]}".rstrip(), flush=True)
    return 1 if missed else 0


def check_fits(mutation: Mutation, sources: Path, tests: Path) -> None:
    """Assert that a fault still fits the source, and names a test that there is, as ``file.py::test`` in a folder."""
    assert (sources / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    file, _, test = mutation.test.rpartition("::")
    assert f"def {test}(" in (tests / file).read_text()


def check_note(note: str, mutations: Mapping[str, Mutation]) -> None:
    """Assert that a page of the documentation names all faults of a list, wherever its lines end."""
    words = " ".join((ROOT / "docs" / note).read_text().split())
    # Behind their kind, which a list of several has once.
    assert not [name for name in mutations if name.partition(": ")[2] not in words]
