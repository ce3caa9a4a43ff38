# SPDX-License-Identifier: Apache-2.0
"""The GPU check without a GPU: it says so; with a pretended one the report tells what went wrong, and parts run."""

from __future__ import annotations

import itertools
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gohsp_kernels import _schemas, cuda, gpu_check, tune
from gohsp_kernels.descriptors import Linear
from gohsp_kernels.gpu_check import PARTS, Part, Scope
from gohsp_kernels.registry import BACKENDS
from gohsp_kernels.testing import Call, Maker
from tests.gohsp_kernels.graph_stand_in import StandIn, stand_in

SMALL = Scope(torch.device("cpu"), cases=2, largest=24)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    return stand_in(monkeypatch)


def test_without_a_gpu_nothing_is_claimed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check, "names_of_gpus", lambda: [])
    assert gpu_check.main(["--folder", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "no GPU here: nothing was checked, and nothing is claimed\n"
    assert not (tmp_path / "out").exists()


RIGHT = {"rows": [{"ok": True, "error": 1e-7}, {"ok": None, "reason": "a | b"}], "error": "", "seconds": 1.0}
WRONG = {"rows": [{"ok": True}, {"ok": False, "reason": "it was 3"}], "error": "", "seconds": 1.0}
FAULT = {"rows": [{"ok": True}], "error": "Traceback\nexit code -11", "seconds": 1.0}
NONE = {"rows": [{"ok": None, "reason": "not here"}], "error": "", "seconds": 0.0}


@pytest.mark.parametrize(
    ("bad", "result", "ok", "code"),
    [
        ("numerics", RIGHT, True, 0),
        ("gradients", WRONG, False, 1),
        ("speed", WRONG, False, 1),
        ("graphs", FAULT, False, 1),
        ("tuning", FAULT, True, 0),
        ("sanitizer", NONE, None, 0),
    ],
)
def test_report_of_a_pretended_gpu(tmp_path: Path, bad: str, result: gpu_check.Row, ok: bool | None, code: int) -> None:
    ran: list[str] = []

    def run(part: Part, name: str, scope: Scope) -> gpu_check.Row:
        assert part is PARTS[name]
        ran.append(name)
        return result if name == bad else RIGHT

    assert gpu_check.check(["Some GPU/80", "another"], tmp_path, SMALL, PARTS, run) == code
    assert ran == list(PARTS)  # the others go on
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Some-GPU-80.json", "Some-GPU-80.md"]
    report = json.loads((tmp_path / "Some-GPU-80.json").read_text())
    assert report["device"] == "Some GPU/80" and report["torch"] == torch.__version__
    assert report["parts"][bad] == {"ok": ok, **result}
    assert all(report["parts"][name]["ok"] is True for name in PARTS if name != bad)
    text = (tmp_path / "Some-GPU-80.md").read_text()
    assert text.startswith("# Some GPU/80\n") and all(f"\n## {name}\n" in text for name in PARTS)
    assert ("FAILED" in text) == (ok is False) and ("nothing judged" in text) == (ok is None)
    assert result["error"] in text and all(row.get("reason", "").replace("|", "/") in text for row in result["rows"])


def test_a_report_is_there_before_the_last_part(tmp_path: Path) -> None:
    def run(part: Part, name: str, scope: Scope) -> gpu_check.Row:
        if name == "opcheck":
            assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["explicit", "numerics"]
            raise KeyboardInterrupt
        return RIGHT

    with pytest.raises(KeyboardInterrupt):
        gpu_check.check(["gpu"], tmp_path, SMALL, PARTS, run)


@pytest.mark.slow
@pytest.mark.interpreter
def test_a_part_runs_in_a_process_of_its_own() -> None:
    result = gpu_check.run_part(PARTS["numerics"], "numerics", Scope(torch.device("cpu"), 1, 16))
    assert result["error"] == "" and len(result["rows"]) == 16
    assert gpu_check.verdict(PARTS["numerics"], result) is True


def test_a_fault_keeps_the_rows_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_part.py").write_text(
        "import os, sys\n"
        "with open(sys.argv[sys.argv.index('--out') + 1], 'w') as out: out.write('{\"ok\": true}\\n')\n"
        "print('an illegal memory access', file=sys.stderr, flush=True)\n"
        "os._exit(9)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = gpu_check.run_part(Part(gpu_check.numerics, module="faulty_part"), "numerics", SMALL)
    assert result["rows"] == [{"ok": True}]
    assert result["error"] == "exit code 9: an illegal memory access"


def test_a_part_that_hangs_is_stopped() -> None:
    result = gpu_check.run_part(Part(gpu_check.numerics, minutes=0), "numerics", SMALL)
    assert result["error"] == "not finished after 0 minutes" and result["rows"] == []


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["numerics", "gradients", "opcheck"])
def test_parts_run_in_the_interpreter(name: str) -> None:
    rows = list(PARTS[name].rows(SMALL))
    assert {row["operator"] for row in rows} == set(gpu_check.OPERATORS) == set(_schemas.PUBLIC)
    judged = [row for row in rows if row["ok"] is not None]
    assert judged and all(row["ok"] for row in judged)
    assert {row["backend"] for row in judged} == {"triton"}
    skipped = [row for row in rows if row["ok"] is None]
    assert all(row["precision"] == "bfloat16" and "interpreter" in row["reason"] for row in skipped)


@pytest.mark.parametrize("name", ["numerics", "graphs", "opcheck"])
def test_what_cannot_run_gives_its_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    rows = list(PARTS[name].rows(SMALL))
    assert rows and all(row["ok"] is None and "TRITON_INTERPRET=1" in row["reason"] for row in rows)


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
    monkeypatch.setattr(gpu_check, "PRECISIONS", {"float32": (torch.float32, 1e-5)})
    for function in (lambda *a: right(*a) + 0.1, unsteady, lambda *a: right(*a) / 0, faulty):
        with monkeypatch.context() as patch:
            replace(patch, function)
            rows = list(gpu_check.numerics(SMALL))
        assert [row["ok"] for row in rows] == [True, False]
    assert rows[-1]["reason"] == "RuntimeError: out of shared memory"


@pytest.mark.slow
@pytest.mark.interpreter
def test_graphs(captures: list[StandIn], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(gpu_check.graphs(SMALL))
    assert [row["ok"] for row in rows if row["precision"] != "bfloat16"] == [True] * 6
    assert len(captures) == 6
    monkeypatch.setattr(StandIn, "replay", lambda self: None)
    assert [row["ok"] for row in gpu_check.graphs(SMALL) if row["precision"] == "float16"] == [False, False]


@pytest.mark.slow
@pytest.mark.usefixtures("captures")
@pytest.mark.interpreter
def test_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(run: Any, device: torch.device) -> float:
        assert torch.isfinite(run()).all()
        return 0.5

    monkeypatch.setattr(gpu_check, "milliseconds", once)
    monkeypatch.setattr(gpu_check, "BATCHES", (1,))
    half, bfloat = ([row for row in gpu_check.speed(SMALL) if row["precision"] == p] for p in ("float16", "bfloat16"))
    assert len(half) == len(bfloat) == 2
    assert all(row["triton_ms"] == row["reference_ms"] == 0.5 and row["ok"] is None for row in half)
    assert all("triton_ms" not in row for row in bfloat)


def test_milliseconds() -> None:
    calls: list[int] = []
    assert 0 <= gpu_check.milliseconds(lambda: calls.append(1), torch.device("cpu"), rounds=9) < 10
    assert len(calls) == 14


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def stand_in_tool(folder: Path, last_line: str) -> None:
    """A compute-sanitizer that notes how it is called, and then does what ``last_line`` says."""
    script = folder / "compute-sanitizer"
    script.write_text(f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" >> {folder}/log\n{last_line}\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


@pytest.mark.slow
@pytest.mark.interpreter
def test_sanitizer_runs_the_numerics(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SANITIZERS", ("memcheck",))
    stand_in_tool(path, 'shift 4; "$@"')
    assert list(gpu_check.sanitizer(Scope(torch.device("cpu"), 5, 16))) == [
        {"tool": "memcheck", "ok": True, "reason": ""}
    ]
    called = (path / "log").read_text().splitlines()[0]
    assert called.startswith("1 --tool memcheck --error-exitcode 86 ") and "--part numerics" in called
    assert called.endswith("--device cpu --cases 1 --largest 16")


def test_what_the_sanitizer_finds_is_told(path: Path) -> None:
    stand_in_tool(path, "echo '========= Invalid __global__ read of size 2'; exit 86")
    for row, tool in zip(gpu_check.sanitizer(SMALL), gpu_check.SANITIZERS, strict=True):
        assert row == {"tool": tool, "ok": False, "reason": "========= Invalid __global__ read of size 2"}


@pytest.mark.usefixtures("path")
def test_without_a_sanitizer_it_says_so() -> None:
    assert list(gpu_check.sanitizer(SMALL)) == [{"ok": None, "reason": "there is no compute-sanitizer on the PATH"}]


@pytest.mark.interpreter
def test_tuning_takes_the_shapes_of_deit(monkeypatch: pytest.MonkeyPatch) -> None:
    def tuner(todo: list[tune.Shape], device: torch.device, write: Any) -> None:
        write(f"{len(todo)} shapes on {device}")

    monkeypatch.setattr(tune, "tune", tuner)
    (row,) = gpu_check.tuning(SMALL)
    assert re.fullmatch(r"\d\d shapes on cpu", row["result"]) and row["ok"] is None


def test_drawn_calls_differ_and_can_be_drawn_again() -> None:
    """Ragged heads, heads without channels, all columns and some, norms and none: each comes up in some dozen draws."""
    calls = [Maker(seed, 64).ragged("attention_sublayer") for seed in range(24)]
    again = zip(calls[3].flat(), Maker(3, 64).ragged("attention_sublayer").flat(), strict=True)
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in again)
    for name in ("in_cols", "out_cols", "q_norm_weight", "layer_scale"):
        assert {getattr(call.operator, name) is None for call in calls} == {True, False}
    widths = [width for call in calls for width in (*call.operator.qk_widths, *call.operator.v_widths)]
    assert 0 in widths and any(width % 8 for width in widths) and len(set(widths)) > 20


@pytest.mark.slow
def test_explicit_cases_reach_every_form_and_both_ways_out() -> None:
    """At full size, where nothing is computed: what packing makes of them, and how many rows they have."""
    forms, outputs, rows = set(), set(), set()
    for _, call in gpu_check.explicit_cases(Scope(torch.device("cpu"))):
        if isinstance(call.operator, Linear):
            linear, x, _ = call.to(torch.float16).described()
            layout = cuda._pack_linear(linear, x).layout.tolist()
            forms.add(layout[6])
            outputs.add(layout[-1])
        rows.add(call.x.numel() // call.x.shape[-1])
    assert forms == {0, 1, 2} and outputs == {0, 1}
    assert min(rows) == 1 and {197, 1576, 12608} <= rows


def test_a_wrong_element_an_unwritten_one_and_a_second_result_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    _, call = next(gpu_check.explicit_cases(SMALL))
    run, calls = Call.run, itertools.count()

    def judged(fault: Callable[[torch.Tensor, int], None]) -> gpu_check.Row:
        def faulty(call: Call, backend: str) -> torch.Tensor:
            result = run(call, "reference").clone()
            if backend != "reference":
                fault(result, next(calls))
            return result

        monkeypatch.setattr(Call, "run", faulty)
        return gpu_check.judge_case(call, "triton", 1e-5)

    assert judged(lambda result, call: None)["ok"]
    assert not judged(lambda result, call: result[0, 0, :1].add_(1e-3))["ok"]
    assert not judged(lambda result, call: result[0, 0, :1].fill_(float("nan")))["ok"]
    assert not judged(lambda result, call: result[0, 0, :1].add_(1e-6 * call))["same"]
