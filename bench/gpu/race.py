# SPDX-License-Identifier: Apache-2.0
"""Races on a GPU: ``python -m bench.gpu_race models`` and ``python -m bench.gpu_race kernels``.

Everybody's work is captured in a CUDA graph and replayed from it, in turn with the others, in rounds; a row has the
median of the rounds in microseconds, their fastest and the 90th percentile. Models are compared with the masked dense
model in float64 (the dense one with itself). Rows are printed as JSON, one a line, as they come.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from bench.gpu.models_check import with_attention
from bench.harness import cases
from gohsp_kernels import ops
from gohsp_kernels.gpu_check import OPERATORS, Sublayer, error_of, first_line
from gohsp_kernels.testing import Maker

Run = Callable[[], object]
Row = dict[str, Any]

DEVICE = "cuda"
COMPARED = 8  # images that go through the model in float64
PRODUCTS = ((384, 768, "identity"), (384, 960, "gelu"), (960, 384, "identity"), (256, 384, "identity"))
"""Inputs, outputs and activation of the linear layers of DeiT-Small cut to 4 heads and 960 neurons a block."""
TOKENS, FEATURES, HEADS, WIDTH = 197, 384, 4, 64


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


def figures(times: Sequence[float], calls: int = 1) -> Row:
    """Median, fastest and 90th percentile of a call, where each entry is of ``calls`` calls."""
    values = (statistics.median(times), times[0], times[len(times) * 9 // 10])
    return dict(zip(("us", "low", "p90"), (round(value / calls, 2) for value in values), strict=True))


def contenders(work: cases.Workload, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """Whose forward pass is captured: ours on each backend, the sliced and the dense model in PyTorch."""

    def on(backend: str) -> Callable[[Tensor], Tensor]:
        model = copy.deepcopy(work.compressed).to(device, dtype).eval()

        def forward(x: Tensor) -> Tensor:
            with gk.use_backend(backend):
                result: Tensor = model(x)
            return result

        return forward

    def plain(model: nn.Module) -> nn.Module:
        return with_attention(model, True).to(device, dtype).eval()

    ours = {f"gohsp {name}": on(name) for name in ("cuda", "triton") if gk.can_run(name, device, dtype)}
    return {**ours, "sliced, SDPA": plain(work.sliced), "dense, SDPA": plain(work.dense)}


@torch.no_grad()
def models(options: argparse.Namespace) -> Iterator[Row]:
    """A row for each batch and contender."""
    device, dtype = torch.device(DEVICE), getattr(torch, options.dtype)
    work = cases.load(cases.Case(options.model, options.preset))
    images = work.images(max(options.batches)).to(device, dtype)
    truths = {
        kind: model.to(device)(images[:COMPARED].double())
        for kind, model in (("masked", work.masked_in_double()), ("dense", copy.deepcopy(work.dense).double()))
    }
    for batch in options.batches:
        x, runs, errors = images[:batch].clone(), {}, {}
        row: Row = {"model": options.model, "mask": options.preset, "dtype": options.dtype, "batch": batch}

        def judge(name: str, result: Tensor, batch: int = batch, errors: dict[str, float] = errors) -> None:
            truth = truths["dense" if name.startswith("dense") else "masked"]
            errors[name] = error_of(result[:COMPARED], truth[:batch])

        if options.compile:
            model = with_attention(work.sliced, True).to(device, dtype).eval()
            compiled = torch.compile(model, fullgraph=True, dynamic=False, mode="max-autotune")
            for _ in range(3):
                judge("sliced, max-autotune", compiled(x))
            runs["sliced, max-autotune"] = lambda compiled=compiled, x=x: compiled(x)
        for name, forward in contenders(work, dtype, device).items():
            try:
                runs[name], result = captured(lambda forward=forward, x=x: forward(x))
                runs[name]()
                judge(name, result)
            except Exception as error:
                yield {**row, "contender": name, "reason": first_line(error)}
        graphed = gohsp.GraphedModel(copy.deepcopy(work.compressed).to(device, dtype).eval())
        judge("gohsp GraphedModel", graphed(x))
        runs["gohsp GraphedModel"] = lambda graphed=graphed, x=x: graphed(x)
        wake(device)
        for name, times in race(runs, options.rounds).items():
            yield {**row, "contender": name, **figures(times), "error": errors.get(name)}


def ceilings(options: argparse.Namespace) -> Iterator[Row]:
    """The rates of the GPU itself."""
    device = torch.device(DEVICE)
    big, one = torch.empty(2**30, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    other, square = torch.empty_like(big), torch.randn(8192, 8192, device=device, dtype=torch.float16)
    nodes, _ = captured(lambda: one.add_(1), 100)
    runs: dict[str, Run] = {"copy": lambda: other.copy_(big), "product": lambda: square @ square, "nodes": nodes}
    us = {name: figures(found)["us"] for name, found in race(runs, options.rounds, 3).items()}
    yield {"ceiling": "copy, TB/s", "value": round(2 * 2**30 / us["copy"] / 1e6, 3)}
    yield {"ceiling": "matmul, TFLOP/s", "value": round(2 * 8192**3 / us["product"] / 1e6, 1)}
    yield {"ceiling": "a node of a graph, us", "value": round(us["nodes"] / 100, 2)}


@torch.no_grad()
def kernels(options: argparse.Namespace) -> Iterator[Row]:
    """Ceilings, then linear layers, attention and sublayers of a cut DeiT-Small in float16 beside libraries."""
    device, half, draw = torch.device(DEVICE), torch.float16, Maker(0)
    wake(device)
    yield from ceilings(options)
    backends = [name for name in ("cuda", "triton") if gk.can_run(name, device, half)]
    for images in options.batches:
        rows, calls = images * TOKENS, 20 if images < 64 else 5

        def raced(runs: Mapping[str, Callable[[], Tensor]], calls: int = calls) -> Iterator[Row]:
            replays = {name: captured(run, calls)[0] for name, run in runs.items()}
            for name, found in race(replays, options.rounds, 3).items():
                yield {"contender": name, **figures(found, calls)}

        for inputs, outputs, activation in PRODUCTS:
            weight, bias = draw.weight(outputs, inputs).to(device, half), draw.normal(outputs).to(device, half)
            x = draw.normal(rows, inputs).to(device, half)
            arguments = (x, weight, bias, None, None, outputs, activation)
            runs: dict[str, Callable[[], Tensor]] = {
                name: lambda name=name, arguments=arguments: ops.call("packed_linear", arguments, name)
                for name in backends
            }
            runs["cuBLAS, no activation"] = lambda x=x, weight=weight, bias=bias: F.linear(x, weight, bias)
            for row in raced(runs):
                yield {"what": f"linear {inputs} to {outputs}, {activation}", "rows": rows, **row}
        qkv = draw.normal(images, TOKENS, 3 * HEADS * WIDTH).to(device, half)
        arguments = (qkv, *(None,) * 4, (WIDTH,) * HEADS, (WIDTH,) * HEADS, WIDTH**-0.5, 1e-6, TOKENS)
        runs = {
            name: lambda name=name, arguments=arguments: ops.call("ragged_attention", arguments, name)
            for name in backends
        }
        q, k, v = qkv.view(images, TOKENS, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
        runs["SDPA"] = lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v)
        for row in raced(runs):
            yield {"what": f"attention of {HEADS} heads", "rows": rows, **row}
        for operator in OPERATORS[2:]:
            x, module = draw.normal(images, TOKENS, FEATURES).to(device, half), Sublayer(operator, FEATURES)
            module = module.to(device, half).eval()

            def on(name: str, module: nn.Module = module, x: Tensor = x) -> Tensor:
                with gk.use_backend(name):
                    result: Tensor = module(x)
                return result

            for row in raced({name: lambda name=name, on=on: on(name) for name in backends}):
                yield {"what": operator, "rows": rows, **row}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_race", description=__doc__)
    parser.add_argument("what", choices=("models", "kernels"))
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument(
        "--preset", default="4x960", help="what is kept, as in the other benchmarks: HEADSxNEURONS, ragged, a mask file"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--compile", action="store_true", help="also torch.compile in max-autotune: a minute a batch")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU here: nothing was measured")
        return 0
    for row in (models if options.what == "models" else kernels)(options):
        print(json.dumps(row), flush=True)
    return 0
