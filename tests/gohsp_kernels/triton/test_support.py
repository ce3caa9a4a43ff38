# SPDX-License-Identifier: Apache-2.0
"""What the backend says it can run, where it is chosen, and that asking costs no import of Triton."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gohsp_kernels as gk
from gohsp_kernels import _native, dispatch
from gohsp_kernels.testing import Maker, samples

FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("device", "dtype", "capability", "widest", "reason"),
    [
        ("cuda", FP16, (8, 0), 64, ""),
        ("cuda", BF16, (9, 0), 128, ""),
        ("cuda", FP32, (10, 0), 0, ""),
        ("cuda", FP16, (7, 5), 64, "needs compute capability 8.0 or newer; the GPU has 7.5"),
        ("cuda", torch.float64, (9, 0), 64, "runs in float32, float16 and bfloat16; got torch.float64"),
        ("cuda", FP16, (9, 0), 129, "takes heads of at most 128 channels; got 129"),
        ("cpu", FP16, None, 64, "only with TRITON_INTERPRET=1; got a tensor on cpu"),
        ("mps", FP16, None, 64, "got a tensor on mps"),
    ],
)
def test_reasons(device: str, dtype: torch.dtype, capability: tuple[int, int] | None, widest: int, reason: str) -> None:
    support = gk.can_run("triton", device, dtype, compute_capability=capability, widest_head=widest)
    assert bool(support) == (reason == "")
    assert support.reason.endswith(reason)


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert gk.backends("cuda")["triton"].reason == "needs a GPU, and PyTorch finds none"
    with pytest.raises(RuntimeError, match="backend 'triton': runs on NVIDIA and AMD GPUs"):
        samples()["mlp_sublayer"].run("triton")


@pytest.mark.usefixtures("no_interpreter")
def test_gradients_need_no_other_backend() -> None:
    assert gk.can_run("triton", "cuda", FP16, needs_grad=True, compute_capability=(8, 0))


def test_interpreter_takes_cpu_tensors_except_bfloat16() -> None:
    assert gk.can_run("triton", "cpu", FP32) and gk.can_run("triton", "cpu", FP16)
    assert "bfloat16" in gk.can_run("triton", "cpu", BF16).reason
    assert "takes CPU tensors" in gk.can_run("triton", "cuda", FP16, compute_capability=(9, 0)).reason


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert (
        gk.can_run("triton", "cuda", FP16, compute_capability=(9, 0)).reason == "needs Triton, which is not installed"
    )


def test_auto_never_takes_the_interpreter() -> None:
    for dtype in (FP32, FP16):
        for needs_grad in (False, True):
            assert dispatch.choose("auto", torch.device("cpu"), dtype, needs_grad) != "triton"


def test_auto_takes_it_on_a_gpu(monkeypatch: pytest.MonkeyPatch, no_interpreter: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_native, "load_cuda", lambda: _native.Library(None, "was not built"))
    assert dispatch.choose("auto", torch.device("cuda", 0), BF16, False) == "triton"
    assert dispatch.choose("auto", torch.device("cuda", 0), BF16, True) == "reference"  # until a GPU has judged it
    assert dispatch.choose("auto", torch.device("cuda", 0), BF16, False, widest_head=256) == "reference"


def test_wide_heads_are_passed_on_to_the_choice() -> None:
    call = Maker(0).attention(1, 3, [129], [4])
    with pytest.raises(RuntimeError, match="backend 'triton': takes heads of at most 128 channels; got 129"):
        call.run("triton")
    assert torch.equal(call.run(), call.run("cpu") if gk.can_run("cpu") else call.run("reference"))


@pytest.mark.slow
def test_importing_and_asking_does_not_import_the_kernels() -> None:
    code = "import sys, gohsp_kernels as gk; gk.backends('cuda'); print('gohsp_kernels.triton.linear' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert run.stdout == "False\n", run.stderr
