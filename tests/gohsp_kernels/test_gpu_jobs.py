# SPDX-License-Identifier: Apache-2.0
"""Processes of the GPU check that fault, hang, or are stopped: what is reported, and that the rest goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gohsp_kernels import _gpu_jobs
from gohsp_kernels._gpu_jobs import Deadline, Job, Report, run_jobs

ROOT = Path(__file__).parents[2]

# Three cases, of which the second does what the first argument says.
WORKER = """
import json, os, subprocess, sys, time
what, report, first = sys.argv[1], sys.argv[2], int(sys.argv[4])
def say(**row): print(json.dumps(row), flush=True)
with open(report + ".starts", "a") as f: f.write(f"{first}\\n")
if what == "start": sys.exit("no module named torch")
for i in range(first, 3):
    say(begins=f"case {i}", number=i)
    if i == 1 or what == "always":
        if what in ("fault", "always"): say(case=f"case {i}", ok=False, reason="an illegal memory access"); sys.exit(3)
        if what == "dies": print("no such\\nkernel", file=sys.stderr); os._exit(9)
        if what == "tool": print("========= Invalid read"); print("========= of size 2"); os._exit(86)
        if what == "hangs":
            child = subprocess.Popen(["sleep", "60"]); open(report + ".child", "w").write(str(child.pid)); child.wait()
        if what == "looks":
            while "case 0" not in open(report).read(): time.sleep(0.01)
    print("a library talks"), print("{it goes on"), print("3")
    say(case=f"case {i}", ok=True, error=1e-7)
"""


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "GPU", {"device": "GPU", "torch": "2.99"})


def job(report: Report, what: str) -> Job:
    command = [sys.executable, "-c", WORKER, what, f"{report.path}.jsonl"]
    return Job({"part": "explicit", "backend": what}, command)


def starts(report: Report) -> list[str]:
    return Path(f"{report.path}.jsonl.starts").read_text().split()


def outcomes(report: Report) -> list[tuple[Any, Any]]:
    return [(row["case"], row["ok"]) for row in report.rows]


def gone(pid: int) -> bool:
    """Whether a process has ended, within a moment."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def kept(report: Report) -> list[Any]:
    return [json.loads(line) for line in Path(f"{report.path}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("what", ["right", "looks"])
def test_rows_are_in_the_file_when_they_come(report: Report, what: str) -> None:
    run_jobs([job(report, what)], 1, Deadline(600), 1, report)
    assert outcomes(report) == [(f"case {i}", True) for i in range(3)] and starts(report) == ["0"]
    assert kept(report) == [{"about": report.about}, *report.rows]
    assert report.rows[0] == {"part": "explicit", "backend": what, "case": "case 0", "ok": True, "error": 1e-7}
    assert not report.wrong()


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("fault", "an illegal memory access"),
        ("dies", "exit code 9: kernel"),
        ("tool", "exit code 86: ========= Invalid read ========= of size 2"),
    ],
)
def test_a_process_that_faults_is_gone_on_after(report: Report, what: str, reason: str) -> None:
    run_jobs([job(report, what)], 1, Deadline(600), 1, report)
    assert outcomes(report) == [("case 0", True), ("case 1", False), ("case 2", True)]
    assert report.rows[1]["reason"] == reason and starts(report) == ["0", "2"]
    assert report.wrong()


def child_of(report: Report) -> Path:
    """Holds the number of what a worker that hangs has started."""
    return Path(f"{report.path}.jsonl.child")


def hangs(report: Report) -> bool:
    child = child_of(report)
    return child.exists() and bool(child.read_text())


def test_one_that_hangs_is_ended_with_all_that_it_started(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that hurries until it is told."""
    more = [0.0]

    def monotonic() -> float:
        more[0] += 100 * (hangs(report) and all(row["case"] != "case 1" for row in report.rows))
        return time.monotonic() + more[0]

    monkeypatch.setattr(_gpu_jobs, "time", SimpleNamespace(monotonic=monotonic))
    run_jobs([job(report, "hangs")], 1, Deadline(1e6), 1, report)
    assert outcomes(report) == [("case 0", True), ("case 1", False), ("case 2", True)]
    assert report.rows[1]["reason"].startswith("not finished after ")
    assert gone(int(child_of(report).read_text()))


def test_lack_of_time_is_no_fault_and_is_told(report: Report) -> None:
    class UntilItHangs(Deadline):
        looks = 0

        def left(self, share: float = 1.0) -> float:
            self.looks += hangs(report)  # the name of the case is on its way at the first
            return -1.0 if self.looks > 5 else super().left(share)

    run_jobs([job(report, "hangs"), job(report, "right")], 1, UntilItHangs(1e6), 0.5, report)
    assert outcomes(report) == [("case 0", True), ("case 1", None), ("from number 0 on", None)]
    assert report.rows[1]["reason"].startswith("stopped for lack of time after ")
    assert report.rows[2]["reason"] == "no time was left for it" and report.rows[2]["backend"] == "right"
    assert gone(int(child_of(report).read_text())) and not report.wrong()


def test_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(_gpu_jobs, "time", SimpleNamespace(monotonic=lambda: now[0]))
    deadline = Deadline(50)
    now[0] += 10
    assert (deadline.left(), deadline.left(0.5), deadline.left(0.1)) == (40, 15, -5)
    deadline.stop()
    assert deadline.left() == 0


def test_what_always_faults_is_left(report: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_jobs, "RESTARTS", 2)
    run_jobs([job(report, "always")], 1, Deadline(600), 1, report)
    assert outcomes(report) == [("case 0", False), ("case 1", False), ("from number 2 on", None)]
    assert report.rows[-1]["reason"] == "left out after 2 faults"


def test_one_that_does_not_start_is_wrong_once(report: Report) -> None:
    run_jobs([job(report, "start")], 1, Deadline(600), 1, report)
    assert outcomes(report) == [("before the first case", False)] and starts(report) == ["0"]
    assert report.rows[0]["reason"] == "exit code 1: no module named torch"


def test_so_many_at_a_time(report: Report) -> None:
    """The first waits for the row of the second, which a process after it would never give."""
    waits = (
        "import json, sys, time\n"
        "print(json.dumps({'begins': 'waits', 'number': 0}), flush=True)\n"
        "while 'case 2' not in open(sys.argv[1]).read(): time.sleep(0.01)\n"
        "print(json.dumps({'case': 'waits', 'ok': True}), flush=True)\n"
    )
    first = Job({"part": "explicit"}, [sys.executable, "-c", waits, f"{report.path}.jsonl"])
    run_jobs([first, job(report, "right")], 2, Deadline(600), 1, report)
    assert [row["ok"] for row in report.rows] == [True] * 4 and report.rows[-1]["case"] == "waits"


def test_a_backend_that_cannot_run_is_told_once(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        report.add({"part": "smoke", "backend": "cuda", "ok": None, "reason": "needs a driver for CUDA 13.0"})
    report.add({"part": "smoke", "backend": "cuda", "case": "linear", "ok": None, "reason": "not here"})
    assert capsys.readouterr().out == "left out: cuda needs a driver for CUDA 13.0\n"


def test_the_report_for_people(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    for row in (
        {"ok": True, "error": 1e-7},
        {"ok": False, "reason": "it was 3\n| and 4"},
        {"ok": None, "reason": "why"},
    ):
        report.add({"part": "explicit", **row})
    report.add({"part": "speed", "ok": None, "us": 3.25})
    report.finish_part("explicit", 12.3)
    assert capsys.readouterr().out.splitlines()[-1] == "explicit: FAILED (1 right, 1 wrong, 1 not judged), 12 s"
    text = Path(f"{report.path}.md").read_text()
    assert text.startswith("# GPU\n\ntorch 2.99\n")
    assert "| speed | nothing judged (0 right, 0 wrong, 1 not judged) |" in text
    rows = text[text.index("## explicit") : text.index("## speed")].splitlines()
    assert rows[4:5] == ["| False | it was 3 / and 4 |  |"]  # first, and on one line


# The check itself, with parts of the worker above.
PARENT = """
import sys
from pathlib import Path
from gohsp_kernels import gpu_check
from gohsp_kernels._gpu_jobs import Job
def jobs(name, part, scope):
    yield Job({"part": name}, [sys.executable, "-c", sys.argv[2], name, sys.argv[1] + "/GPU.jsonl"])
gpu_check.jobs = jobs
part = gpu_check.PARTS["explicit"]
parts = {"right": part, "hangs": part}
scope = gpu_check.Scope(gpu_check.torch.device("cpu"))
sys.exit(gpu_check.check("GPU", Path(sys.argv[1]), scope, parts, 100, 1))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_a_stopped_run_leaves_is_a_report(tmp_path: Path, how: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path), WORKER], cwd=ROOT)
    child = tmp_path / "GPU.jsonl.child"
    while not child.exists() or not child.read_text():
        assert parent.poll() is None
        time.sleep(0.05)
    parent.send_signal(how)
    code = parent.wait(30)
    rows = [json.loads(line) for line in (tmp_path / "GPU.jsonl").read_text().splitlines()]
    assert [row["ok"] for row in rows[1:5]] == [True] * 4
    text = (tmp_path / "GPU.md").read_text()
    assert "| right | right (3 right, 0 wrong, 0 not judged) |" in text
    if how == signal.SIGTERM:
        assert code == 0 and gone(int(child.read_text()))
        assert rows[5]["reason"].startswith("stopped for lack of time") and "## hangs" in text
    else:
        os.kill(int(child.read_text()), signal.SIGKILL)
