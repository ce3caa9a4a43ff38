# SPDX-License-Identifier: Apache-2.0
"""What the routines compute, apart from how they are called."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import gohsp_kernels as gk
from bench import contention, kernels, proportion, roofline, store, sublayers
from bench.cases import Workload
from bench.compare import TOLERANCE, check
from bench.environment import Settings
from bench.kernels import Attention, Linear
from gohsp.timing import Timing

from .conftest import TINY, printed

NATIVE = bool(gk.can_run("cpu"))


@pytest.mark.parametrize("part", sublayers.PARTS)
@pytest.mark.parametrize("kind", ["ragged_work", "uniform_work"])
def test_sublayers_of_all_contenders_agree(
    part: str, kind: str, settings: Settings, request: pytest.FixtureRequest
) -> None:
    work = request.getfixturevalue(kind)
    entrants = sublayers.entrants(work, part, sublayers.tokens(work, 2), settings)
    assert [entrant.name for entrant in entrants] == ["sliced", "gohsp-reference"] + ["gohsp"] * NATIVE
    assert max(check(entrants).values()) < TOLERANCE


def test_sublayers_of_all_blocks_make_a_model(ragged_work: Workload) -> None:
    """The two kinds, block by block, are what the blocks of the masked dense model are."""
    double = ragged_work.masked_in_double()
    x = sublayers.tokens(ragged_work, 2).double()
    steps = [sublayers.plain(block, part) for block in double.blocks for part in sublayers.PARTS]
    assert torch.equal(sublayers.chain(steps, x)(), double.blocks(x))


def test_sublayers_without_the_library_go_on_without_gohsp(
    ragged_work: Workload, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gk, "can_run", lambda backend: gk.Support(False, "was not built"))
    entrants = sublayers.entrants(ragged_work, "mlp", sublayers.tokens(ragged_work, 1), settings)
    assert [entrant.name for entrant in entrants] == ["sliced", "gohsp-reference"]
    assert "left out: gohsp: was not built" in printed(settings)


@pytest.mark.parametrize("case", kernels.CASES, ids=lambda case: f"{case.part} {case.label} {case.batch}")
def test_kernels_agree_with_float64_on_every_shape(case: Linear | Attention) -> None:
    assert max(check(kernels.entrants(case, NATIVE)).values()) < TOLERANCE


def test_kernel_shapes_include_awkward_ones() -> None:
    linear = [case for case in kernels.CASES if isinstance(case, Linear)]
    attention = [case for case in kernels.CASES if isinstance(case, Attention)]
    assert any(case.inputs < case.features for case in linear) and any(case.outputs < case.results for case in linear)
    assert any(case.tokens == 1 for case in linear) and any(case.outputs % 16 for case in linear)
    assert any(0 in case.qk_widths for case in attention) and any(case.num_queries == 1 for case in attention)
    assert len({(case.part, case.label, case.batch, case.tokens) for case in kernels.CASES}) == len(kernels.CASES)


def test_plain_linear_leaves_unwritten_columns_zero() -> None:
    case = Linear(1, 2, 8, 5, 9, 4)
    call = case.call()
    result = case.plain(call)
    written = torch.zeros(9, dtype=torch.bool).index_fill(0, call.operator.out_cols, True)
    assert result.shape == (1, 2, 9)
    assert bool((result[..., ~written] == 0).all()) and bool((result[..., written] != 0).all())


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
    rows = {(row.part, row.metric): row for row in store.read(settings.out)}
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


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that are started during the test."""
    processes: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return processes


def test_a_core_is_busy_inside_the_block_and_free_after(started: list[subprocess.Popen[bytes]]) -> None:
    with contention.busy_core() as core:
        (process,) = started
        assert _state(process.pid) == "R"  # it runs, or waits for nothing but a core
        assert _allowed_cores(process.pid) == str(core)
    assert process.returncode is not None


def test_a_core_is_free_after_an_error_too(started: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(KeyError), contention.busy_core():
        raise KeyError("x")
    assert started[0].returncode is not None


def test_systems_that_cannot_pin_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sched_getaffinity")
    with pytest.raises(RuntimeError, match="cannot pin"), contention.busy_core():
        pass


def test_growth_is_of_the_median() -> None:
    quiet, busy = Timing((2.0, 1.0, 4.0)), Timing((3.0, 8.0, 5.0))
    assert contention.growths(quiet, busy) == [1.5, 4.0, 2.5]


@pytest.mark.skipif(not NATIVE, reason="the CPU backend is not built")
def test_proportion_times_every_cut_against_the_line(settings: Settings) -> None:
    assert proportion.run(TINY, ["2x300", "ragged:0.5"], [2], settings) == []
    rows = store.read(settings.out)
    assert [row.case for row in rows if row.metric == "off-line"] == [
        f"{TINY}/{p}" for p in ("dense", "2x300", "ragged:0.5")
    ]
    assert rows[1].value == 0.0  # the whole model is where the line starts
    assert "off by" in printed(settings)


def test_a_model_on_the_line_is_off_by_nothing() -> None:
    """A product of 2048 cubed in 2 s: half of its multiply-accumulates less are a second less."""
    timings = {"dense": Timing((5.0, 6.0)), "gemm": Timing((2.0, 4.0)), "cut": Timing((4.0, 6.0))}
    assert proportion.deviations(timings, "cut", 2048**3 / 2) == [0.0, 0.5]


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _allowed_cores(pid: int) -> str:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(line.split()[1] for line in status.splitlines() if line.startswith("Cpus_allowed_list"))
