# SPDX-License-Identifier: Apache-2.0
"""Where and with what a number was measured."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console

import gohsp_kernels as gk
from bench.harness.results import DEFAULT_PATH
from gohsp_kernels import cpu

ROOT = Path(__file__).resolve().parents[2]


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True)
class Settings:
    """What all routines need: how often, on how many threads, where to.

    Attributes:
        threads: Number of threads of every contender.
        rounds: Timed spans of each contender.
        out: The CSV file.
        console: Where tables go.
        run: UTC time at which the command started.
    """

    threads: int
    rounds: int
    out: Path = DEFAULT_PATH
    console: Console = field(default_factory=Console)
    run: str = field(default_factory=_now)

    def report_left_out(self, name: str, reason: str) -> None:
        """Print that a contender does not take part, and why."""
        self.console.print(f"left out: {name}: {reason}", style="yellow", markup=False, highlight=False)


def available_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def version_of(distribution: str) -> str:
    """Installed version of a distribution; "source" where it runs from a checkout."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "source"


@functools.cache
def cpu_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_set() -> str:
    """Instruction set of gohsp's and of torch's kernels; one name where it is the same.

    Environment variables may hold either back (GOHSP_CPU_CAPABILITY, ATEN_CPU_CAPABILITY), so a number that was
    measured with only one of them held back has to show.
    """
    theirs = torch.backends.cpu.get_cpu_capability().lower()
    ours = cpu.capability() if gk.can_run("cpu") else theirs
    return ours if ours == theirs else f"gohsp {ours}, torch {theirs}"


@functools.cache
def commit() -> str:
    """Commit of this checkout, with "-dirty" where tracked files other than results have changed; or "unknown"."""
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return revision + ("-dirty" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
