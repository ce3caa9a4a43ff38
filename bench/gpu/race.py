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
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from bench.gpu.models_check import with_attention
from bench.harness import cases
from gohsp_kernels import gpu_check
from gohsp_kernels._gpu_timing import captured, figures, race, wake
from gohsp_kernels.gpu_check import Row, Scope, error_of, first_line

DEVICE = "cuda"
COMPARED = 8  # images that go through the model in float64


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


def kernels(options: argparse.Namespace) -> Iterator[Row]:
    """The part "speed" of the GPU check: ceilings, then sublayers, linear layers and attention beside libraries."""
    for name, run in gpu_check.speed(Scope(torch.device(DEVICE), "", options.dtype), options.batches):
        for row in run():
            yield {"what": name, **{key: value for key, value in row.items() if key != "ok"}}


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
