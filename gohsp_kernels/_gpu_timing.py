# SPDX-License-Identifier: Apache-2.0
"""Times on a GPU: work captured in CUDA graphs and replayed from them, everybody in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]


def captured(run: Callable[[], Tensor], calls: int = 1) -> tuple[Run, Tensor]:
    """A replay of ``calls`` calls, and the memory of the last result. It keeps alive what ``run`` holds."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(calls):
            result = run()

    def replay(_held: object = run) -> None:
        graph.replay()

    return replay, result


def wake(device: torch.device, seconds: float = 0.3) -> None:
    """Keep the GPU busy until its clocks are up."""
    square = torch.randn(4096, 4096, device=device, dtype=torch.float16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            square @ square
        torch.cuda.synchronize()


def race(runs: Mapping[str, Run], rounds: int, calls: int = 5) -> dict[str, list[float]]:
    """Microseconds a call of each, ``calls`` calls at a time, in ascending order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            run()
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / calls * 1e3)
    return {name: sorted(found) for name, found in times.items()}


def figures(times: Sequence[float], calls: int = 1) -> dict[str, Any]:
    """Median, fastest and 90th percentile of a call, where each entry is of ``calls`` calls."""
    values = (statistics.median(times), times[0], times[len(times) * 9 // 10])
    return dict(zip(("us", "low", "p90"), (round(value / calls, 2) for value in values), strict=True))
