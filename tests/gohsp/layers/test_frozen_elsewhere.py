# SPDX-License-Identifier: Apache-2.0
"""A frozen model in another process: it runs there without more ado, or says that it was packed for other kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import gohsp
from gohsp_kernels import _native, cpu

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not _native.load(), reason=_native.load().reason)]

PICKLED = "m = torch.load(folder / 'model.pt', weights_only=False)"
EXPORTED = "m = torch.export.load(folder / 'model.pt2').module()"
CALL = """
import pathlib, sys, torch, {imports}
folder = pathlib.Path(sys.argv[1])
{load}
x, y = torch.load(folder / 'call.pt')
try:
    with torch.no_grad():
        print(float((m(x) - y).norm() / y.norm()) < 1e-5)
except RuntimeError as error:
    print(str(error).splitlines()[0])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    # Sizes that are multiples of every panel, whose panels therefore take the same room everywhere.
    dense = make_model(embed_dim=64, num_heads=2, num_classes=0).float()
    frozen = gohsp.freeze(gohsp.compress(dense, gohsp.ModelMask.full(dense)))
    x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save((x, frozen(x)), folder / "call.pt")
        torch.export.save(torch.export.export(frozen, (x,)), folder / "model.pt2")
    torch.save(frozen, folder / "model.pt")
    return folder


def call(folder: Path, load: str, imports: str, capability: str = "") -> str:
    environment = {**os.environ, "GOHSP_CPU_CAPABILITY": capability or os.environ.get("GOHSP_CPU_CAPABILITY", "")}
    command = [sys.executable, "-c", CALL.format(load=load, imports=imports), str(folder)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout.strip()


@pytest.mark.parametrize(("load", "imports"), [(PICKLED, "gohsp"), (EXPORTED, "gohsp_kernels")])
def test_it_runs_in_a_process_that_has_called_nothing_before(folder: Path, load: str, imports: str) -> None:
    assert call(folder, load, imports) == "True"


@pytest.mark.skipif(cpu.capability() == "scalar" if _native.load() else True, reason="needs two instruction sets")
@pytest.mark.parametrize(("load", "imports"), [(PICKLED, "gohsp"), (EXPORTED, "gohsp_kernels")])
def test_it_is_refused_where_weights_are_arranged_otherwise(folder: Path, load: str, imports: str) -> None:
    message = call(folder, load, imports, "scalar")
    assert "panels: wanted weights that were packed for scalar" in message
    assert f"got some that were packed for {cpu.capability()}. Save the compressed model instead" in message
