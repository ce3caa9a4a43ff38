# SPDX-License-Identifier: Apache-2.0
"""Limits, rates and stages: what they are made of, and that they add up."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gohsp_kernels as gk
from bench.harness import results
from bench.harness.cases import Workload
from bench.harness.environment import Settings
from bench.routines import roofline, sublayers
from gohsp.timing import Timing

from ..conftest import printed


@pytest.mark.parametrize("kind", ["ragged_work", "uniform_work"])
def test_flops_are_those_that_torch_counts(kind: str, request: pytest.FixtureRequest) -> None:
    work = request.getfixturevalue(kind)
    x = sublayers.tokens(work, 3)
    parts = {name: roofline._part(work, name, x, "reference") for name in (*sublayers.PARTS, "encoder")}
    # Torch's counter knows nothing of its fused attention on the CPU.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        work.sliced.blocks(x)
    assert parts["encoder"].flops == counter.get_total_flops()
    assert parts["encoder"].flops == parts["attention"].flops + parts["mlp"].flops
    assert parts["mlp"].attention_flops == 0 < parts["attention"].attention_flops


def test_bytes_are_weights_input_and_output(uniform_work: Workload) -> None:
    x = sublayers.tokens(uniform_work, 3)
    part = roofline._part(uniform_work, "mlp", x, "reference")
    weights = 2 * (2 * 192 + 192 * 300 + 300 + 300 * 192 + 192)  # of two blocks: norm, fc1, fc2
    assert part.bytes == 4 * (weights + 2 * 2 * x.numel())


@pytest.mark.parametrize(("copy", "limit"), [(1e9, 20e9), (100e9, 150e9)])
def test_the_limit_is_the_lesser_of_products_and_bytes(copy: float, limit: float) -> None:
    part = roofline.Part("mlp", lambda: torch.empty(0), linear_flops=15e9, attention_flops=5e9, bytes=1e9)
    assert roofline.Rates(np.array([150e9]), np.array([copy])).limit(part).tolist() == [limit]


ON_ONE_THREAD = {
    "qkv": 4.0,
    "qkv, gather": 4.5,
    "heads": 3.0,
    "proj": 2.0,
    "proj, scatter": 2.25,
    "fc1": 5.0,
    "fc1, gather": 5.125,
    "fc1, activation": 6.0,
    "fc2": 5.0,
    "fc2, scatter": 5.5,
    roofline._alone("attention"): 10.0,
    roofline._alone("mlp"): 12.0,
    roofline._alone("encoder"): 21.0,
}
"""Milliseconds of a made-up machine."""


@pytest.mark.parametrize(
    ("name", "gather", "scatter", "activation"),
    [("attention", 0.5, 0.25, None), ("mlp", 0.125, 0.5, 1.0), ("encoder", 0.625, 0.75, 1.0)],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_stages_are_differences_on_one_thread_and_add_up(
    name: str, gather: float, scatter: float, activation: float | None, threads: int
) -> None:
    whole = {"attention": 7.0, "mlp": 8.0, "encoder": 12.0}
    timings = {key: Timing((ms / 1e3,)) for key, ms in {**ON_ONE_THREAD, **whole}.items()}
    part = roofline.Part(name, lambda: torch.empty(0), linear_flops=1e8, attention_flops=1e7, bytes=1e6)
    stages = roofline._where_time_goes(part, timings, roofline.Rates(np.array([1e11]), np.array([1e10])), threads)
    assert sum(stages.values()) == pytest.approx(whole[name])
    assert stages["products at the GEMM rate"] == pytest.approx(1.0)
    assert stages["waiting of threads"] == pytest.approx(whole[name] - ON_ONE_THREAD[roofline._alone(name)] / threads)
    assert stages["gather"] == pytest.approx(gather / threads)
    assert stages["scatter"] == pytest.approx(scatter / threads)
    assert stages.get("activation") == (None if activation is None else pytest.approx(activation / threads))
    if name != "mlp":
        assert stages["heads: QK and PV at the GEMM rate"] == pytest.approx(0.1)
        assert stages["heads: softmax and the rest"] == pytest.approx(3.0 / threads - 0.1)


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(roofline, "GEMM_SIZE", 64)
    monkeypatch.setattr(roofline, "COPY_FLOATS", 1 << 12)
    yield


def test_roofline_stores_what_it_prints(ragged_work: Workload, settings: Settings, small_machine: None) -> None:
    # Of an odd number of rounds one is the median of both the times and the rates, so the two agree whatever the times.
    odd = dataclasses.replace(settings, rounds=3)
    assert roofline.run([ragged_work.case], [2], odd, backend="reference") == []
    rows = {(row.part, row.metric): row for row in results.read(settings.out)}
    encoder, machine = rows["encoder", "rate"], rows["machine", "gemm rate"]
    assert rows["encoder", "flops"].value == pytest.approx(2 * 2 * sum(b.macs for b in ragged_work.count.blocks) / 1e9)
    assert encoder.value == pytest.approx(
        rows["encoder", "flops"].value / rows["encoder", "time"].value * 1e3, rel=1e-3
    )
    assert machine.unit == encoder.unit == "GFLOP/s"
    assert any(metric.startswith("stage: ") for _, metric in rows)
    assert "FLOP/B" in printed(settings) and "where the time goes" in printed(settings)


def test_roofline_times_nothing_that_is_wrong(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sublayers, "fused", lambda block, part: lambda x: x * 2)
    assert roofline.run([ragged_work.case], [1], settings, backend="reference") == ["attention", "mlp"]
    assert not settings.out.exists()


def test_roofline_of_a_backend_that_cannot_run_gives_the_reason(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gk, "can_run", lambda backend: gk.Support(False, "was not built"))
    with pytest.raises(RuntimeError, match="roofline: backend 'cpu': was not built"):
        roofline.run([ragged_work.case], [1], settings)


def test_one_thread_is_for_the_call_only() -> None:
    seen: list[int] = []
    torch.set_num_threads(2)
    roofline._on_one_thread(lambda: seen.append(torch.get_num_threads()), 2)()
    assert (seen, torch.get_num_threads()) == ([1], 2)
