# SPDX-License-Identifier: Apache-2.0
"""What the backend says it can run, on GPUs that need not be there, and when "auto" takes it."""

from __future__ import annotations

import functools
import logging
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import gohsp_kernels as gk
from gohsp_kernels import _native, _stamp, cuda, dispatch, info
from gohsp_kernels.testing import Maker, samples
from gohsp_kernels.triton import support

FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
GPU = torch.device("cuda", 0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the CUDA library had been built; it is not called here."""
    monkeypatch.setattr(_native, "load_cuda", lambda: _native.Library(Path("_C_cuda.so")))
    monkeypatch.setattr(_native, "cuda_missing", lambda device: "")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, library: None) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    ("device", "dtype", "options", "reason"),
    [
        ("cuda", FP16, {"compute_capability": (8, 0), "widest_head": 64}, ""),
        ("cuda", BF16, {"compute_capability": (9, 0), "widest_head": 128}, ""),
        ("cuda", FP32, {"compute_capability": (12, 0)}, ""),
        ("cuda", FP16, {"compute_capability": (7, 5)}, "needs compute capability 8.0 or newer; the GPU has 7.5"),
        ("cuda", torch.float64, {"compute_capability": (9, 0)}, "runs in float32, float16 and bfloat16"),
        ("cuda", FP16, {"compute_capability": (9, 0), "widest_head": 129}, "heads of at most 128 channels; got 129"),
        ("cuda", FP16, {"compute_capability": (9, 0), "needs_grad": True}, "has no backward"),
        ("cpu", FP16, {}, "runs on NVIDIA GPUs; got a tensor on cpu"),
    ],
)
def test_reasons(device: str, dtype: torch.dtype, options: dict[str, Any], reason: str) -> None:
    support = gk.can_run("cuda", device, dtype, **options)
    assert bool(support) == (reason == "")
    assert reason in support.reason


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "load_cuda", lambda: _native.Library(None, "was not built"))
    assert gk.can_run("cuda", "cuda", compute_capability=(9, 0)).reason == "was not built"
    with pytest.raises(RuntimeError, match="backend 'cuda': was not built"):
        samples()["mlp_sublayer"].run("cuda")
    assert "CUDA library      was not built" in info.report()


@pytest.mark.usefixtures("library")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert gk.backends("cuda")["cuda"].reason == "needs a GPU, and PyTorch finds none"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("device", [GPU, torch.device("cuda")])
def test_what_the_gpu_or_its_driver_does_not_take_is_a_reason(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An old driver, or a library that was compiled for other GPUs: Triton takes over, and a call never ends by it."""
    reasons = {0: "needs a driver for CUDA 13.0; this one is for 12.4", 1: ""}
    monkeypatch.setattr(_native, "cuda_missing", reasons.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(dispatch, "_already_logged", set())
    with caplog.at_level(logging.INFO, logger="gohsp_kernels"):
        for _ in range(2):
            assert dispatch.choose("auto", device, BF16, False, rows=197) == "triton"
    assert caplog.messages.count(f"backend 'cuda' passed over: {reasons[0]}") == 1
    with pytest.raises(RuntimeError, match=r"backend 'cuda': needs a driver for CUDA 13\.0"):
        dispatch.choose("cuda", device, BF16, False)
    assert gk.backends(device)["cuda"].reason == reasons[0]
    assert dispatch.choose("auto", torch.device("cuda", 1), BF16, False, rows=197) == "cuda"
    assert gk.can_run("cuda", device, compute_capability=(9, 0))  # of a GPU that is not there nothing is asked


@pytest.mark.usefixtures("hopper")
def test_weights_are_compared_without_a_library_that_the_gpu_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    there = torch.ones(3)
    monkeypatch.setattr(_stamp, "_from_gpu", lambda *_: "by the library")
    monkeypatch.setattr(_stamp, "_at_once", lambda *_: "by PyTorch")
    assert _stamp._reading(GPU, [there]) == "by the library"
    monkeypatch.setattr(_native, "cuda_missing", lambda device: "old" if device == 0 else "")
    assert _stamp._reading(GPU, [there]) == "by PyTorch"


def test_the_library_is_asked_once_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Functions:
        def __init__(self, path: str) -> None:
            self.gohsp_cuda_missing = lambda device: asked.append(device) or f"no code for {device}".encode()

    monkeypatch.setattr(_native, "load_cuda", lambda: _native.Library(Path("_C_cuda.so")))
    monkeypatch.setattr(_native.ctypes, "CDLL", Functions)
    ask = functools.cache(_native.cuda_missing.__wrapped__)
    assert [ask(device) for device in (0, 1, 0)] == ["no code for 0", "no code for 1", "no code for 0"]
    assert asked == [0, 1]
    monkeypatch.setattr(_native.ctypes, "CDLL", lambda path: object())
    assert _native.cuda_missing.__wrapped__(0) == "the native library _C_cuda.so is of another version; reinstall"


@pytest.mark.skipif(not _native.load_cuda(), reason=_native.load_cuda().reason)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_probe_without_a_driver() -> None:
    assert _native.cuda_missing(0) == "needs the driver of an NVIDIA GPU, and there is none"


def test_reasons_of_the_probe() -> None:
    checks = pytest.importorskip("gohsp_kernels._checks_cuda", reason="the checks module is not built")
    assert checks.reason_of(13000, 13000, None) == checks.reason_of(12080, 12090, None) == ""
    said = checks.reason_of(12040, 13000, "CUDA driver version is insufficient")
    wanted = "needs a driver for CUDA 13.0; this one is for 12.4: CUDA says: CUDA driver version is insufficient"
    assert said == wanted
    no_code = "has no code for this GPU: CUDA says: no kernel image is available"
    assert checks.reason_of(13010, 13000, "no kernel image is available") == no_code


@pytest.mark.usefixtures("library")
def test_amd_is_left_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert gk.can_run("cuda", "cuda").reason == "runs on NVIDIA GPUs; got a tensor on hip"


def test_never_chosen_for_tensors_on_the_cpu() -> None:
    for dtype in (FP32, FP16):
        assert dispatch.choose("auto", torch.device("cpu"), dtype, False) != "cuda"


@pytest.mark.usefixtures("hopper")
def test_auto_on_hopper() -> None:
    for rows in (197, cuda.MANY_ROWS + 1):
        assert dispatch.choose("auto", GPU, BF16, False, rows=rows) == "cuda"


@pytest.mark.usefixtures("blackwell")
def test_auto_on_later_gpus() -> None:
    assert dispatch.choose("auto", GPU, BF16, False, rows=197) == "cuda"
    assert dispatch.choose("auto", GPU, BF16, False, rows=cuda.MANY_ROWS + 1) == "triton"
    assert dispatch.choose("auto", GPU, BF16, False, widest_head=256) == "reference"
    assert dispatch.choose("cuda", GPU, BF16, False, rows=cuda.MANY_ROWS + 1) == "cuda"  # as named


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_auto_trains_on_the_reference_and_says_so_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_already_logged", set())
    with caplog.at_level(logging.INFO, logger="gohsp_kernels"):
        for rows in (197, cuda.MANY_ROWS + 1):
            assert dispatch.choose("auto", GPU, dtype, True, rows=rows) == "reference"
    assert caplog.messages.count(f"backend 'triton' passed over: {support.UNPROVEN_BACKWARD}") == 1
    assert dispatch.choose("triton", GPU, dtype, True, rows=197) == "triton"  # as named
    with gk.use_backend("triton"):
        assert dispatch.choose(None, GPU, dtype, True, rows=197) == "triton"


@pytest.mark.parametrize(
    ("capability", "rows", "first"),
    [((8, 0), 10**6, True), ((8, 9), 10**6, True), ((9, 0), 10**6, True), ((10, 0), 1, True), ((10, 0), 10**6, False)],
)
def test_the_rule(capability: tuple[int, int], rows: int, first: bool) -> None:
    assert cuda.goes_first(GPU, rows, capability) == first


def test_the_rows_of_a_call_reach_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    choose = dispatch.choose

    def note(*arguments: Any) -> str:
        seen.append(arguments[5])
        return choose(*arguments)

    monkeypatch.setattr(dispatch, "choose", note)
    Maker(0).mlp_sublayer((3, 5, 7), 16, 8).run("reference")
    samples()["attention_sublayer"].run("reference")
    assert seen == [105, 18]


@pytest.mark.skipif(not _native.load_cuda(), reason=_native.load_cuda().reason)
def test_the_library_loads_without_a_gpu_and_brings_its_own_runtime() -> None:
    path = _native.load_cuda().path
    assert path is not None
    text = subprocess.run(["readelf", "-d", path], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in text and "libtorch_cuda.so" in text
    names = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    assert "cudaLaunch" not in names  # torch may have loaded a runtime of another release under the same names
    dump = torch._C._dispatch_dump("gohsp_kernels::cuda_sublayers")
    assert "CUDA:" in dump


@pytest.mark.skipif(not _native.load_cuda(), reason=_native.load_cuda().reason)
def test_a_library_that_does_not_load_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C_cuda.so").write_text("not a library")
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "_native.py"))
    assert "_C_cuda.so does not load" in _native.load_cuda.__wrapped__().reason
