# SPDX-License-Identifier: Apache-2.0
"""A core that another process keeps busy, and what is made of the times."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.routines import contention
from gohsp.timing import Timing


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started during the test."""
    processes: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return processes


def test_a_core_is_busy_inside_the_block_and_free_after(started: list[subprocess.Popen[bytes]]) -> None:
    with contention.busy_core() as core:
        (process,) = started
        assert _state(process.pid) == "R"  # it runs, or waits for nothing but a core
        assert _allowed_cores(process.pid) == str(core)
    assert process.returncode is not None


def test_a_core_is_free_after_an_error_too(started: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(KeyError), contention.busy_core():
        raise KeyError("x")
    assert started[0].returncode is not None


def test_systems_that_cannot_pin_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    with pytest.raises(RuntimeError, match="cannot pin"), contention.busy_core():
        pass


def test_growth_is_of_the_median() -> None:
    quiet, busy = Timing((2.0, 1.0, 4.0)), Timing((3.0, 8.0, 5.0))
    assert contention.growths(quiet, busy) == [1.5, 4.0, 2.5]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _allowed_cores(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("Cpus_allowed_list"))
