# SPDX-License-Identifier: Apache-2.0
"""The GPU check without a GPU: it says so; its parts run in emulation and in the interpreter, and find
what is wrong."""

from __future__ import annotations

import json
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gohsp_kernels import _schemas, gpu_check, tune
from gohsp_kernels._gpu_jobs import SPOILED
from gohsp_kernels.gpu_check import PARTS, Part, Row, Scope
from gohsp_kernels.registry import BACKENDS
from gohsp_kernels.testing import Maker
from tests.gohsp_kernels.graph_stand_in import StandIn, stand_in

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def scope(backend: str = "triton", precision: str = "float32", cases: int = 2) -> Scope:
    return Scope(CPU, backend, precision, cases, 24)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    return stand_in(monkeypatch)


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``--device cpu`` has it; the backend of others comes back."""
    pytest.importorskip("gohsp_kernels._checks_cuda", reason="the checks module is not built")
    monkeypatch.setitem(BACKENDS, "cuda", BACKENDS["cuda"])
    gpu_check.rehearse()


def rows_of(name: str, scope: Scope, part_of: tuple[int, int] = (0, 1), first: int = 0) -> list[Row]:
    """What a process of a part says, but for the names of what begins."""
    said: list[Row] = []
    code = gpu_check.work(PARTS[name], scope, part_of, first, said.append)
    assert code == 0
    return [row for row in said if "begins" not in row]


def test_without_a_gpu_nothing_is_claimed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "names_of_gpus", lambda: [])
    assert gpu_check.main(["--folder", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "no GPU here: nothing was checked, and nothing is claimed\n"
    assert not (tmp_path / "out").exists()


def test_each_case_is_named_before_it_runs_and_slices_are_all_of_them() -> None:
    said: list[Any] = []

    def cases(scope: Scope) -> Iterator[gpu_check.Case]:
        for i in range(7):
            yield f"case {i}", lambda i=i: said.append(i) or {"ok": True}

    assert gpu_check.work(Part(cases, 1), Scope(CPU), (1, 3), 2, said.append) == 0
    assert [entry if isinstance(entry, int) else (entry.get("begins"), entry.get("case")) for entry in said] == [
        ("case 4", None), 4, (None, "case 4")
    ]  # fmt: skip
    every = [row["case"] for i in range(3) for row in _said(Part(cases, 1), (i, 3))]
    assert sorted(every) == [f"case {i}" for i in range(7)]


def _said(part: Part, part_of: tuple[int, int]) -> list[Row]:
    said: list[Row] = []
    gpu_check.work(part, Scope(CPU), part_of, 0, said.append)
    return [row for row in said if "case" in row]


@pytest.mark.parametrize(("lost", "code", "count"), [(False, 0, 2), (True, SPOILED, 1)])
def test_a_process_ends_after_a_fault_that_spoils_it(
    lost: bool, code: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> Row:
        raise RuntimeError("CUDA error: an illegal memory access\nand more")

    def cases(scope: Scope) -> Iterator[gpu_check.Case]:
        yield "first", fails
        yield "second", lambda: [{"ok": False, "error": float("inf")}, {"ok": None}]

    monkeypatch.setattr(gpu_check, "spoiled", lambda device: lost)
    said: list[Row] = []
    assert gpu_check.work(Part(cases, 1), Scope(CPU), (0, 1), 0, said.append) == code
    assert said[1]["ok"] is False and said[1]["reason"] == "RuntimeError: CUDA error: an illegal memory access"
    assert sum("begins" in row for row in said) == count and len(said) == (2 if lost else 5)
    assert lost or said[3]["error"] == "inf"
    assert json.dumps(said, allow_nan=False)


def test_a_gpu_that_gives_nothing_more_is_told_from_a_call_that_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access")

    assert not gpu_check.spoiled(CPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not gpu_check.spoiled(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    assert gpu_check.spoiled(torch.device("cuda", 0))


def test_the_processes_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    gpu_check._sanitizing.cache_clear()
    gpu = Scope(torch.device("cuda"))
    for name, part in PARTS.items():
        found = list(gpu_check.jobs(name, part, gpu))
        slices = sum(part.slices[0 if backend == "cuda" else 1] for backend in part.backends)
        assert len(found) == len(part.precisions) * slices * max(1, len(part.tools))
        assert all(job.about["part"] == name and f"--part {name} " in " ".join(job.command) for job in found)
        assert all(job.environment.get("TRITON_INTERPRET") is None for job in found)
    first = next(gpu_check.jobs("explicit", PARTS["explicit"], gpu))
    assert (
        first.about == {"part": "explicit", "backend": "cuda", "precision": "float32"}
        or first.about["backend"] == "cuda"
    )
    assert all(job.environment["TRITON_INTERPRET"] == "1" for job in gpu_check.jobs("smoke", PARTS["smoke"], scope()))


@pytest.mark.usefixtures("rehearsed")
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32", "float32 as tf32"])
def test_a_slice_of_the_explicit_cases_in_emulation(precision: str) -> None:
    rows = rows_of("explicit", scope("cuda", precision), (3, 20))
    assert len(rows) >= 3 and all(row["ok"] and row["same"] for row in rows)


@pytest.mark.slow
def test_a_rehearsal_from_the_command_line(tmp_path: Path) -> None:
    """Its first part, through processes of its own."""
    command = [sys.executable, "-m", "gohsp_kernels.gpu_check", "--device", "cpu", "--seconds", "900", "--at-once", "2"]
    run = subprocess.run(
        [*command, "--folder", str(tmp_path), "--only", "smoke"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    first, *rows = (json.loads(line) for line in (tmp_path / "CPU.jsonl").read_text().splitlines())
    assert first["about"]["torch"] == torch.__version__ and first["about"]["device"] == "CPU"
    kinds = {"mlp", "attention", "chain", "linear", "heads to 64"}
    for backend in ("triton", "cuda"):
        found = [row for row in rows if row["backend"] == backend]
        if backend == "triton" or "case" in found[0]:  # the build may lack the emulation
            assert {row["case"].split(",")[0] for row in found} == kinds and all(row["ok"] for row in found)
    assert "## smoke" in (tmp_path / "CPU.md").read_text()


@pytest.mark.interpreter
def test_without_a_gpu_there_are_no_graphs() -> None:
    rows = rows_of("graphs", scope())
    assert len(rows) == 2 and all(row["ok"] is None and "graphs" in row["reason"] for row in rows)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["numerics", "gradients", "opcheck"])
def test_parts_run_in_the_interpreter(name: str) -> None:
    for precision in ("float32", "float16"):
        rows = rows_of(name, scope("triton", precision))
        assert {row["case"].split(",")[0] for row in rows} == set(gpu_check.OPERATORS) == set(_schemas.PUBLIC)
        assert all(row["ok"] for row in rows)
    assert "interpreter" in rows_of(name, scope("triton", "bfloat16"))[0]["reason"]


@pytest.mark.usefixtures("rehearsed")
def test_gradients_of_a_backend_without_them_give_the_reason() -> None:
    assert {row["reason"] for row in rows_of("gradients", scope("cuda"))} == {"has no backward"}


@pytest.mark.parametrize("name", ["numerics", "graphs", "opcheck", "explicit"])
def test_what_cannot_run_gives_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    (row,) = rows_of(name, scope())
    assert row["ok"] is None and "TRITON_INTERPRET=1" in row["reason"]


def replace(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    right = BACKENDS["triton"].run

    def run(operator: Any, *arguments: Any) -> Tensor:
        return (function if operator.name == "mlp_sublayer" else right)(operator, *arguments)

    monkeypatch.setattr(BACKENDS["triton"], "run", run)


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = BACKENDS["triton"].run
    calls: list[int] = []

    def unsteady(*arguments: Any) -> Tensor:
        calls.append(1)
        return right(*arguments) * (1 + 1e-7 * (len(calls) % 2))

    def faulty(*arguments: Any) -> Tensor:
        raise RuntimeError("out of shared memory\nand more")

    monkeypatch.setattr(gpu_check, "OPERATORS", ("packed_linear", "mlp_sublayer"))
    for function in (lambda *a: right(*a) + 0.1, unsteady, lambda *a: right(*a) / 0, faulty):
        with monkeypatch.context() as patch:
            replace(patch, function)
            rows = rows_of("numerics", scope(cases=1))
        assert [row["ok"] for row in rows] == [True, False]
    assert rows[-1]["reason"] == "RuntimeError: out of shared memory"


@pytest.mark.slow
@pytest.mark.interpreter
def test_graphs(captures: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["ok"] for row in rows_of("graphs", scope())] == [True, True]
    assert len(captures) == 4  # another one where weights have changed
    monkeypatch.setattr(StandIn, "replay", lambda self: None)
    assert [row["ok"] for row in rows_of("graphs", scope())] == [False, False]


@pytest.mark.slow
@pytest.mark.interpreter
def test_speed_compares_what_it_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "BATCHES", (1,))
    monkeypatch.setattr(gpu_check, "_able", lambda scope: ["triton"])
    rows = [row for _, run in gpu_check.speed(scope("", "float32"), (1,)) for row in run()]
    assert rows[0] == {"ok": None, "reason": "a GPU has them"}
    rivals = [["PyTorch"]] * 2 + [["cuBLAS, no activation"]] * 4 + [["SDPA"]]
    assert [row["contender"] for row in rows[1:]] == [name for rival in rivals for name in ("triton", *rival)]
    assert all(row["error"] is None or row["error"] < 1e-5 for row in rows[1:])
    assert sum(row["error"] is None for row in rows[1:]) == 4


def test_times_are_taken_in_turn_and_a_contender_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(run: Callable[[], Tensor], calls: int) -> tuple[Callable[[], object], Tensor]:
        return run, run()

    def take_turns(runs: Any, rounds: int, calls: int) -> dict[str, list[float]]:
        return {name: [float(i + 1)] * rounds for i, name in enumerate(runs)}

    def fails() -> Tensor:
        raise RuntimeError("no compiler\nfound")

    monkeypatch.setattr(gpu_check, "captured", captured)
    monkeypatch.setattr(gpu_check, "race", take_turns)
    truth = torch.ones(4, dtype=torch.float64)
    runs = {"cuda": lambda: torch.ones(4), "torch.compile": fails, "PyTorch": lambda: torch.full((4,), 1.5)}
    rows = gpu_check.raced(runs, truth, torch.device("cuda"), 2)
    assert rows[0] == {"contender": "cuda", "ok": None, "error": 0.0, "us": 0.5, "low": 0.5, "p90": 0.5}
    assert rows[1] == {"contender": "torch.compile", "ok": None, "reason": "RuntimeError: no compiler"}
    assert rows[2]["error"] == 0.5 and rows[2]["us"] == 1.0


def test_milliseconds() -> None:
    calls: list[int] = []
    assert 0 <= gpu_check.milliseconds(lambda: calls.append(1), CPU, rounds=9) < 10
    assert len(calls) == 14


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gpu_check._sanitizing.cache_clear()
    return tmp_path


def sanitize(folder: Path, last_line: str, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Rows of a compute-sanitizer that notes how it is called, and then does what ``last_line`` says."""
    script = folder / "compute-sanitizer"
    help_ = '[ "$1" = --help ] && { echo "  --kernel-regex arg"; exit 0; }'
    log = f'echo "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {folder}/log'
    script.write_text(f"#!/bin/sh\n{help_}\n{log}\n{last_line}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    part = Part(gpu_check.smoke, 1, ("triton",), ("float32",), tools=("memcheck",))
    gpu_check.check("GPU", folder / "out", scope(), {"sanitizer": part}, 100, 1)
    return [json.loads(line) for line in (folder / "out" / "GPU.jsonl").read_text().splitlines()[1:]]


def test_sanitizers_run_our_kernels_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"case": "linear", "ok": True})
    (row,) = sanitize(path, f"echo '{said}'", monkeypatch)
    assert row == {"part": "sanitizer", "backend": "triton", "precision": "float32", "tool": "memcheck", "case": "linear", "ok": True}  # fmt: skip  # noqa: E501
    called = (path / "log").read_text().splitlines()[0]
    assert called.startswith("1 --tool memcheck --error-exitcode 86 --kernel-regex kns=gohsp ")
    assert "--part sanitizer" in called and "--first 0" in called


def test_what_the_sanitizer_finds_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = sanitize(path, "echo '========= Invalid __global__ read of size 2'; exit 86", monkeypatch)
    assert [row["ok"] for row in rows] == [False]
    assert rows[0]["reason"] == "exit code 86: ========= Invalid __global__ read of size 2"


@pytest.mark.usefixtures("path")
def test_without_a_sanitizer_it_says_so(tmp_path: Path) -> None:
    assert gpu_check.check("GPU", tmp_path / "out", scope(), {"sanitizer": PARTS["sanitizer"]}, 9, 1) == 0
    row = json.loads((tmp_path / "out" / "GPU.jsonl").read_text().splitlines()[-1])
    assert row == {"part": "sanitizer", "ok": None, "reason": "there is no compute-sanitizer on the PATH"}


@pytest.mark.interpreter
def test_tuning_takes_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    def tuner(todo: list[tune.Shape], device: torch.device, dtypes: Any, write: Any) -> None:
        write(f"{len(todo)} shape on {device}")

    monkeypatch.setattr(tune, "tune", tuner)
    gpu = Scope(torch.device("cuda"), "triton")
    rows = [run() for _, run in gpu_check.tuning(gpu)]
    assert 12 <= len(rows) <= 15 and all(row == {"ok": None, "result": "1 shape on cuda"} for row in rows)
    names = [name for name, _ in gpu_check.tuning(gpu)]
    assert "linear float16 256 768x384" in names and re.match(r"attention float16 256 of 256, 64", names[4])


def test_shares_of_the_time_and_parts_that_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, float]] = []

    def run_jobs(jobs: Any, at_once: int, deadline: Any, share: float, report: Any) -> None:
        seen.append((jobs[0].about["part"], at_once, round(share, 3)))

    monkeypatch.setattr(gpu_check, "run_jobs", run_jobs)
    monkeypatch.setattr(gpu_check, "names_of_gpus", lambda: ["Some GPU/80", "another"])
    arguments = ["--folder", str(tmp_path), "--only", "speed", "smoke", "graphs", "--at-once", "7"]
    assert gpu_check.main(arguments) == 0
    assert seen == [("smoke", 7, 0.375), ("speed", 1, 0.875), ("graphs", 7, 1.0)]  # in the order of worth
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Some-GPU-80.jsonl", "Some-GPU-80.md"]
    before = (tmp_path / "Some-GPU-80.jsonl").read_text()
    assert gpu_check.main(arguments) == 0  # leaves what the first has found
    assert (tmp_path / "Some-GPU-80.jsonl").read_text() == before and (tmp_path / "Some-GPU-80-2.jsonl").exists()


def test_drawn_calls_differ_and_can_be_drawn_again() -> None:
    """Ragged heads, heads without channels, all columns and some, norms and none: each comes up in some dozen draws."""
    calls = [Maker(seed, 64).ragged("attention_sublayer") for seed in range(24)]
    again = zip(calls[3].flat(), Maker(3, 64).ragged("attention_sublayer").flat(), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in again)
    for name in ("in_cols", "out_cols", "q_norm_weight", "layer_scale"):
        assert {getattr(call.operator, name) is None for call in calls} == {True, False}
    widths = [width for call in calls for width in (*call.operator.qk_widths, *call.operator.v_widths)]
    assert 0 in widths and any(width % 8 for width in widths) and len(set(widths)) > 20
