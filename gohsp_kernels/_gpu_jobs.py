# SPDX-License-Identifier: Apache-2.0
"""Processes of a check, many at a time, within a time; and the report, to which each of their rows is added at once.

A process prints one JSON object a line: ``{"begins": NAME, "number": N}`` before a case, then its rows. So what hangs
or faults has a name, and is gone on after in a new process: a GPU gives nothing more to a process in which a kernel
faulted.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

SPOILED = 3
"""Exit code of a process that ended itself after a fault whose row it has given."""

RESTARTS = 5
"""How often a process is started again after a case that ended it: what faults more often than that faults always."""

POLL = 0.2  # seconds between looks at the clock


@dataclass(frozen=True)
class Job:
    """Some cases for a process of their own.

    Attributes:
        about: what all of its rows say, the part first.
        command: what is run, but for the number of the first case.
        environment: variables beside those that there are.
        seconds: after so many a case counts as hanging.
    """

    about: Mapping[str, str]
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 90


class Deadline:
    """A time, which :meth:`stop` brings forward to now."""

    def __init__(self, seconds: float) -> None:
        self._begin, self._seconds = time.monotonic(), seconds
        self._stopped = threading.Event()

    def left(self, share: float = 1.0) -> float:
        """Seconds until so large a part of the time is over."""
        return 0.0 if self._stopped.is_set() else self._begin + share * self._seconds - time.monotonic()

    def stop(self) -> None:
        self._stopped.set()


class Report:
    """Rows in ``PATH.jsonl``, each written when it comes, so that what a killed run leaves can be read; then in
    ``PATH.md``, for people."""

    def __init__(self, path: Path, about: Row) -> None:
        self.path, self.about, self.rows = path, about, list[Row]()
        self._told: set[object] = set()
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{path}.jsonl").write_text(json.dumps({"about": about}) + "\n")

    def add(self, row: Row) -> None:
        """Keep a row, and say so where it is wrong. Of any thread."""
        with self._lock:
            self.rows.append(row)
            with Path(f"{self.path}.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            if row.get("ok") is False:
                print("FAILED", json.dumps(row)[:500], flush=True)
            elif "case" not in row and row.get("reason") not in self._told:  # of a whole process
                self._told.add(row.get("reason"))
                print("left out:", row.get("backend") or row["part"], row.get("reason"), flush=True)

    def finish_part(self, name: str, seconds: float) -> None:
        """Print a part's verdict, and write the report for people."""
        with self._lock:
            print(f"{name}: {_summary(self._of(name))}, {seconds:.0f} s", flush=True)
            text = self.markdown()
        part = Path(f"{self.path}.md.part")
        part.write_text(text)
        part.replace(f"{self.path}.md")

    def _of(self, name: str) -> list[Row]:
        return [row for row in self.rows if row["part"] == name]

    def markdown(self) -> str:
        """The report for people: a table of the parts, then the rows of each, wrong ones first."""
        parts = list(dict.fromkeys(row["part"] for row in self.rows))
        about = ", ".join(f"{key} {value}" for key, value in self.about.items() if key != "device" and value)
        text = f"# {self.about['device']}\n\n{about}\n\n"
        text += table([{"part": name, "verdict": _summary(self._of(name))} for name in parts]) + "\n"
        for name in parts:
            rows = sorted(self._of(name), key=lambda row: row.get("ok") is not False)
            text += f"\n## {name}\n\n" + table([{k: v for k, v in row.items() if k != "part"} for row in rows]) + "\n"
        return text

    def wrong(self) -> bool:
        """Whether a row is."""
        return any(row.get("ok") is False for row in self.rows)


def _summary(rows: Sequence[Row]) -> str:
    """How many rows are right, wrong and neither; what was judged decides."""
    right, wrong = (sum(row.get("ok") is ok for row in rows) for ok in (True, False))
    verdict = "FAILED" if wrong else "right" if right else "nothing judged"
    return f"{verdict} ({right} right, {wrong} wrong, {len(rows) - right - wrong} not judged)"


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "/").replace("\n", " ")


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, a column for each key that one of them has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([_cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run_jobs(jobs: Sequence[Job], at_once: int, deadline: Deadline, share: float, report: Report) -> None:
    """Run jobs, so many at a time, until all are done or so large a part of the time is over."""
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        for done in [pool.submit(_run, job, deadline, share, report) for job in jobs]:
            done.result()


def _run(job: Job, deadline: Deadline, share: float, report: Report) -> None:
    first = 0
    for _ in range(RESTARTS):
        if deadline.left(share) <= 0:
            report.add(
                {**job.about, "ok": None, "case": f"from number {first} on", "reason": "no time was left for it"}
            )
            return
        ended = _run_from(job, first, deadline, share, report)
        if ended is None:
            return
        first = ended + 1
    report.add(
        {**job.about, "ok": None, "case": f"from number {first} on", "reason": f"left out after {RESTARTS} faults"}
    )


def _run_from(job: Job, first: int, deadline: Deadline, share: float, report: Report) -> int | None:
    """Run a job's cases from one on; the number of the one that ended the process, or None where none is left."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            [*job.command, "--first", str(first)],
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,  # a tool that runs it is stopped with what it runs
            env={**os.environ, **job.environment},
        )
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process.stdout, lines), daemon=True)
        reader.start()
        noise: list[str] = []
        case, number, began = "before the first case", first - 1, time.monotonic()
        patience = 0.0
        try:
            while True:
                try:
                    line = lines.get(timeout=POLL)
                except queue.Empty:
                    taken = time.monotonic() - began
                    if deadline.left(share) > 0 and taken < job.seconds:
                        continue
                    hangs = taken >= job.seconds
                    reason = (
                        f"not finished after {taken:.0f} s"
                        if hangs
                        else f"stopped for lack of time after {taken:.0f} s"
                    )
                    report.add({**job.about, "case": case, "ok": False if hangs else None, "reason": reason})
                    return number if hangs else None
                if line is None:
                    patience = 10.0
                    break
                row = _parsed(line)
                if row is None:
                    noise.append(line)
                elif "begins" in row:
                    case, number, began = row["begins"], row["number"], time.monotonic()
                else:
                    report.add({**job.about, **row})
        finally:
            _end(process, patience)
        if process.returncode == SPOILED:
            return number
        if process.returncode == 0:
            return None
        said.seek(0)
        report.add({**job.about, "case": case, "ok": False, "reason": _reason(process.returncode, [*noise, *said])})
        return number if number >= first else None  # where not even a case was begun none will be


def _read(source: Any, lines: queue.Queue[str | None]) -> None:
    for line in source:
        lines.put(line)
    lines.put(None)


def _parsed(line: str) -> Row | None:
    """The row in a line; None for what a library has to say."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _end(process: subprocess.Popen[str], patience: float) -> None:
    """Wait so long for a process to end by itself, then end it and what it started."""
    try:
        process.wait(timeout=patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(code: int, lines: Sequence[str]) -> str:
    """Exit code and what was said: the marks of compute-sanitizer, or the last line."""
    marks = [line.strip() for line in lines if line.startswith("=========")]
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f"exit code {code}: {' '.join(marks[:6]) or last}"[:600]


def worker(module: str, *options: str) -> list[str]:
    """The command of a process that runs cases of a module."""
    return [sys.executable, "-m", module, *options]
