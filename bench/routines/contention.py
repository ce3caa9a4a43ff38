# SPDX-License-Identifier: Apache-2.0
"""What becomes of each contender's time when another process keeps one core busy."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from bench.harness import cases, contenders, results
from bench.harness.cases import Case
from bench.harness.compare import Place, ReadyContender, agreeing, check, milliseconds, numbers_table, row
from bench.harness.environment import Settings
from bench.harness.timing import time_in_turns
from gohsp.timing import Timing

_SPIN = "import os, sys; os.sched_setaffinity(0, {int(sys.argv[1])}); print('busy', flush=True)\nwhile True: pass"


@contextmanager
def busy_core() -> Iterator[int]:
    """Keep one of this process's cores busy with another process, for the ``with`` block; gives the core's number.

    Raises:
        RuntimeError: The system cannot pin a process to a core.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise RuntimeError("contention: this system cannot pin a process to a core")
    core = max(os.sched_getaffinity(0))
    command = [sys.executable, "-c", _SPIN, str(core)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield core
        finally:
            process.kill()


def run(todo: Sequence[Case], batches: Sequence[int], names: Sequence[str], settings: Settings) -> list[str]:
    """Time contenders on a quiet machine, then beside a process that spins on one core.

    Returns:
        Names of the contenders that were refused for a wrong result.
    """
    refused: list[str] = []
    for case in todo:
        work = cases.load(case)
        for batch in batches:
            with contenders.ready(names, work, work.images(batch), settings) as ready:
                errors = check(ready)
                allowed = agreeing(ready, errors)
                refused += [contender.name for contender in ready if contender not in allowed]
                place = Place("contention", case.label, "model", batch, work.count.tokens)
                _compare(place, allowed, settings)
    return refused


def _compare(place: Place, ready: Sequence[ReadyContender], settings: Settings) -> None:
    functions = {contender.name: contender.run for contender in ready}
    heading = f"{place.case}, batch {place.batch}"
    quiet = time_in_turns(functions, settings.rounds, settings.console, f"{heading}: quiet")
    with busy_core() as core:
        busy = time_in_turns(functions, settings.rounds, settings.console, f"{heading}: core {core} busy")
    title = f"{heading}\nanother process spinning on core {core}"
    table = numbers_table(title, "contender", ("quiet ms", "busy ms", "p20", "p80", "growth"))
    rows = []
    for contender in ready:
        before, after = quiet[contender.name], busy[contender.name]
        growth = growths(before, after)
        own = {"version": contender.version, "dtype": contender.dtype}
        rows.append(row(place, contender.name, "quiet", milliseconds(before), "ms", settings, **own))
        rows.append(row(place, contender.name, "busy", milliseconds(after), "ms", settings, **own))
        rows.append(row(place, contender.name, "growth", growth, "x", settings, **own))
        times = (f"{1e3 * seconds:.4g}" for seconds in (before.median, after.median, after.p20, after.p80))
        table.add_row(contender.name, *times, f"{after.median / before.median:.2f}")
    results.append(settings.out, rows)
    settings.console.print(table)


def growths(quiet: Timing, busy: Timing) -> list[float]:
    """Each busy span over the median of the quiet ones: their median is the growth of the median."""
    return [seconds / quiet.median for seconds in busy.seconds]
