# SPDX-License-Identifier: Apache-2.0
"""The races without a GPU: they say so; and with pretended clocks the rows, errors and turns are as described."""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu import race


def test_without_a_gpu_nothing_is_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert race.main(["models"]) == race.main(["kernels"]) == 0
    assert capsys.readouterr().out == 2 * "no GPU here: nothing was measured\n"


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_race", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("bench.gpu_race", run_name="__main__")
    assert ended.value.code == 0
    assert "usage: python -m bench.gpu_race" in capsys.readouterr().out


def test_figures_are_of_one_call() -> None:
    assert race.figures([float(i) for i in range(10, 30)], calls=5) == {"us": 3.9, "low": 2.0, "p90": 5.6}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The CPU as the GPU, nobody's clock, and who was called in which round."""
    called: list[str] = []

    def captured(run: Callable[[], Tensor], calls: int = 1) -> tuple[Callable[[], object], Tensor]:
        return run, run()

    def take_turns(runs: Mapping[str, Callable[[], object]], rounds: int, calls: int = 5) -> dict[str, list[float]]:
        called.extend(runs)
        for run in runs.values():
            run()
        return {name: [float(i + 1)] * rounds for i, name in enumerate(runs)}

    monkeypatch.setattr(race, "DEVICE", "cpu")
    monkeypatch.setattr(race, "captured", captured)
    monkeypatch.setattr(race, "race", take_turns)
    monkeypatch.setattr(race, "wake", lambda device: None)
    monkeypatch.setattr(race.gohsp, "GraphedModel", lambda model: model)
    monkeypatch.setattr(race.gk, "can_run", lambda name, *_: False)
    return called


def options(**given: Any) -> argparse.Namespace:
    common = {"model": "vit_tiny_patch16_224", "preset": "ragged", "dtype": "float32", "compile": False, "rounds": 3}
    return argparse.Namespace(**{**common, "batches": [2], **given})


def test_models_are_judged_against_float64(pretended: list[str]) -> None:
    rows = list(race.models(options()))
    assert [row["contender"] for row in rows] == pretended == ["sliced, SDPA", "dense, SDPA", "gohsp GraphedModel"]
    assert all(row["error"] < 1e-5 and row["batch"] == 2 for row in rows)
    assert [row["us"] for row in rows] == [1.0, 2.0, 3.0]


def test_kernels_are_those_of_the_check(pretended: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def speed(scope: Any, batches: list[int]) -> list[Any]:
        return [(f"{scope.precision} on {scope.device}", lambda n=n: [{"ok": None, "us": n}]) for n in batches]

    monkeypatch.setattr(race.gpu_check, "speed", speed)
    rows = list(race.kernels(options(batches=[1, 8])))
    assert rows == [{"what": "float32 on cpu", "us": 1}, {"what": "float32 on cpu", "us": 8}]
