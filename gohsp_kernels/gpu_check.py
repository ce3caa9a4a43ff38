# SPDX-License-Identifier: Apache-2.0
"""Checks of the GPU backends on the GPU at hand: ``python -m gohsp_kernels.gpu_check --seconds 500 --folder FOLDER``.

In parts, of which each has a share of the seconds, what is worth most first; docs/gpu-check.md goes through them. Cases
run in processes of their own, many at a time (:mod:`gohsp_kernels._gpu_jobs`), and each row is in
``FOLDER/DEVICE.jsonl`` as soon as it is known. Needs torch, Triton and numpy alone, no network, and no build where the
libraries are there. ``make gpu-check`` adds whole models (``python -m bench.gpu_check``), which this package knows none
of.

``--device cpu`` rehearses it: the CUDA kernels in emulation, Triton's in its interpreter, few and small cases.

A row has ``ok``: whether a result was right, or None where nothing was judged; then ``reason`` says why.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _gpu, _native, descriptors, dispatch, gpu_cases, graphed, ops
from ._gpu_jobs import SPOILED, Deadline, Job, Report, Row, run_jobs, worker
from ._gpu_timing import captured, figures, race, wake
from .cuda import CudaBackend
from .gpu_cases import error_of, explicit_cases, judge
from .graphed import GraphedModel
from .registry import BACKENDS, Request
from .testing import PRECISIONS, Call, Maker, poisoned

OPERATORS = tuple(descriptors.OPERATORS)
BATCHES = (1, 64, 8)
TOKENS, FEATURES, HEADS, WIDTH, HIDDEN = 197, 384, 4, 64, 960
"""DeiT-Small cut to 4 heads and 960 neurons a block, at 224 pixels."""

HALF = ("float16",)

Case = tuple[str, Callable[[], "Row | list[Row]"]]


@dataclass(frozen=True)
class Scope:
    """On what, and how much, a process works.

    Attributes:
        device: a GPU; or the CPU for a rehearsal.
        backend: "cuda" or "triton"; empty where a part takes both.
        precision: one of ``PRECISIONS``.
        cases: random calls of each operator.
        largest: number of features, tokens or neurons in them; below ``TOKENS`` all cases are small.
    """

    device: torch.device
    backend: str = ""
    precision: str = "float16"
    cases: int = 12
    largest: int = 512

    @property
    def small(self) -> bool:
        return self.largest < TOKENS

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    @property
    def limit(self) -> float:
        return PRECISIONS[self.precision][1]


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        cases: names of its cases, and how each gives a row or several.
        share: of the time, beside those of the others. What is left over goes to the parts after it.
        backends, precisions: for which there are processes of their own.
        slices: processes among which the cases of one of those are divided: of "cuda", then of others.
        together: whether they may run at the same time.
        tools: of compute-sanitizer, under each of which all is run.
        seconds: after so many a case counts as hanging; Triton compiles in them.
        module: to run with ``python -m``.
    """

    cases: Callable[[Scope], Iterator[Case]]
    share: float
    backends: tuple[str, ...] = ("cuda", "triton")
    precisions: tuple[str, ...] = ("float16", "bfloat16", "float32", "float32 as tf32")
    slices: tuple[int, int] = (1, 1)
    together: bool = True
    tools: tuple[str, ...] = ()
    seconds: float = 90
    module: str = "gohsp_kernels.gpu_check"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether float32 products may be tf32."""
    before, torch.backends.cuda.matmul.fp32_precision = (
        torch.backends.cuda.matmul.fp32_precision,
        "tf32" if allowed else "ieee",
    )
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def gpu_backends(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, dispatch.Support]]:
    """What gohsp_kernels offers for GPUs."""
    for name, support in dispatch.backends(device, dtype).items():
        if name not in ("cpu", "reference"):
            yield name, support


class Emulated(CudaBackend):
    """The CUDA kernels as the module of the tests has them, for tensors on the CPU."""

    def missing(self, request: Request) -> str:
        if request.device.type != "cpu":
            return super().missing(request)
        return _gpu.missing_numbers(request) or ("has no backward" if request.needs_grad else "")


def rehearse() -> None:
    """Let the CUDA backend take tensors on the CPU, as far as this build has the emulation."""
    try:
        importlib.import_module("gohsp_kernels._checks_cuda")
    except ImportError:
        return
    BACKENDS["cuda"] = Emulated()


# --- right or wrong --------------------------------------------------------------------------------------------------
def judged(scope: Scope, draw: gpu_cases.Draw, seed: int) -> Row:
    """A case of :mod:`gohsp_kernels.gpu_cases` on fresh numbers; new tensors begin as NaN."""
    with tf32(scope.precision.endswith("tf32")), poisoned():
        return judge(draw(Maker(seed)).to(scope.dtype, scope.device), scope.backend, scope.limit)


def _explicit(cases: Mapping[str, gpu_cases.Draw], scope: Scope) -> Iterator[Case]:
    for seed, (name, draw) in enumerate(cases.items()):
        yield name, partial(judged, scope, draw, seed)


def explicit(scope: Scope) -> Iterator[Case]:
    """Calls that reach every tile, form of input and way out."""
    return _explicit(explicit_cases(scope.small), scope)


def smoke(scope: Scope) -> Iterator[Case]:
    """The first of each kind: a verdict within half a minute."""
    found, kinds = {}, set()
    for name, draw in explicit_cases(scope.small).items():
        kind = name.split(",")[0]
        if kind not in kinds and kind in ("mlp", "attention", "chain", "linear", "heads to 64"):
            found[name] = draw
            kinds.add(kind)
    return _explicit(found, scope)


def largest(scope: Scope) -> Iterator[Case]:
    """What needs numbers of 64 bits."""
    if not scope.small:
        yield from _explicit(gpu_cases.LARGEST, scope)


def sanitized(scope: Scope) -> Iterator[Case]:
    """The explicit cases but for the slowest."""
    slow = ("25216 rows", "more blocks", "batch 64")
    cases = {name: draw for name, draw in explicit_cases(scope.small).items() if not any(s in name for s in slow)}
    return _explicit(cases, scope)


def numerics(scope: Scope) -> Iterator[Case]:
    """Every operator on random heterogeneous calls, against the reference in float64, and twice the same."""
    for seed in range(scope.cases):
        for operator in OPERATORS:
            yield f"{operator}, seed {seed}", partial(measured, scope, operator, seed, False)


def gradients(scope: Scope) -> Iterator[Case]:
    """The same of the gradients, on a third of the calls. Chains of operations are longer, limits the same."""
    for seed in range(-(-scope.cases // 3)):
        for operator in OPERATORS:
            yield f"{operator}, seed {seed}", partial(measured, scope, operator, seed, True)


def measured(scope: Scope, operator: str, seed: int, needs_grad: bool) -> Row:
    """Error of a random call, or of its gradients, against the limit of the precision."""
    call = Maker(seed, scope.largest).ragged(operator).to(scope.dtype, scope.device)
    widest = call.operator.widest_head
    support = dispatch.can_run(scope.backend, scope.device, scope.dtype, needs_grad=needs_grad, widest_head=widest)
    if not support:
        return {"ok": None, "reason": support.reason}
    with tf32(scope.precision.endswith("tf32")):
        error = (gradient_error if needs_grad else forward_error)(call, scope.backend)
    return {"ok": error <= scope.limit, "error": error}


@torch.no_grad()
def forward_error(call: Call, backend: str) -> float:
    """Error against the reference in float64 on the same rounded numbers; infinite if a second run differs."""
    result = call.run(backend)
    return error_of(result, call.truth()) if torch.equal(result, call.run(backend)) else float("inf")


def gradient_error(call: Call, backend: str) -> float:
    """Error of all gradients together, under a random gradient of the result."""

    def gradients(call: Call, backend: str) -> Tensor:
        leaves = [tensor.requires_grad_() for tensor in call.tensors()]
        result = call.run(backend)
        if not result.requires_grad:  # the reference of a call without any head
            return torch.cat([torch.zeros_like(leaf).flatten() for leaf in leaves])
        grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(5)).to(result)
        found = torch.autograd.grad(result, leaves, grad, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    truth = gradients(call.to(torch.float64), "reference")
    return error_of(gradients(call, backend), truth)


def opcheck(scope: Scope) -> Iterator[Case]:
    """torch.library.opcheck: schema, fake tensors, autograd registration, tracing with dynamic shapes."""

    def check(operator: str) -> Row:
        call = Maker(1, scope.largest).ragged(operator).to(scope.dtype, scope.device)
        with dispatch.use_backend(scope.backend):
            torch.library.opcheck(getattr(torch.ops.gohsp_kernels, operator).default, call.flat())
        return {"ok": True}

    for operator in OPERATORS:
        yield operator, partial(check, operator)


class Sublayer(nn.Module):
    """One sublayer of DeiT-Small cut to 4 heads and 960 neurons a block, or the same with fewer ``features``."""

    def __init__(self, operator: str, features: int) -> None:
        super().__init__()
        maker, width, hidden = Maker(0), min(WIDTH, features), 5 * features // 2
        norm, scale, middle = (maker.normal(features), maker.normal(features)), maker.normal(features), HEADS * width
        if operator == "mlp_sublayer":
            outer, inner = (hidden, features), (features, hidden)
            constants: tuple[Any, ...] = (scale, None, None, "gelu", 1e-6)
        else:
            outer, inner = (3 * middle, features), (features, middle)
            widths = (width,) * HEADS
            constants = (scale, *(None,) * 6, widths, widths, width**-0.5, 1e-6, 1e-6)
        self.operator = operator
        layers = maker.weight(*outer), maker.normal(outer[0]), maker.weight(*inner), maker.normal(inner[0])
        self.constants = constants[1:]
        self.weights = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in (*norm, *layers, scale))

    def forward(self, x: Tensor, backend: str | None = None) -> Tensor:
        queries = (x.shape[1],) if self.operator == "attention_sublayer" else ()
        result: Tensor = ops.call(self.operator, (x, *self.weights, *self.constants, *queries), backend)
        return result


def sizes(scope: Scope) -> tuple[int, int]:
    """Tokens and features of DeiT-Small, or fewer."""
    return min(TOKENS, scope.largest), min(FEATURES, scope.largest)


def graphs(scope: Scope) -> Iterator[Case]:
    """Both sublayers in a CUDA graph: bit for bit what a call outside gives, on other input and with other weights."""

    def check(operator: str) -> Row:
        if scope.device.type != graphed.CAPTURABLE:
            return {"ok": None, "reason": f"only {graphed.CAPTURABLE} has graphs"}
        tokens, features = sizes(scope)
        model = Sublayer(operator, features).to(scope.device, scope.dtype).eval()
        images = [Maker(i).normal(1, tokens, features).to(scope.device, scope.dtype) for i in (1, 2)]
        with dispatch.use_backend(scope.backend), tf32(scope.precision.endswith("tf32")), torch.no_grad():
            fast = GraphedModel(model)
            equal = [torch.equal(fast(x), model(x)) for x in images]
            model.weights[2].data.mul_(2)
            equal.append(torch.equal(fast(images[0]), model(images[0])))
        return {"ok": all(equal)}

    for operator in OPERATORS[2:]:
        yield operator, partial(check, operator)


# --- speed -----------------------------------------------------------------------------------------------------------
def milliseconds(run: Callable[[], object], device: torch.device, rounds: int = 50) -> float:
    """Median time of a call after some that are not counted; on a GPU by its own clock."""
    times = []
    for _ in range(rounds + 5):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            before = time.perf_counter()
            run()
            times.append((time.perf_counter() - before) * 1e3)
    return statistics.median(times[5:])


def raced(runs: Mapping[str, Callable[[], Tensor]], truth: Tensor, device: torch.device, calls: int) -> list[Row]:
    """A row for each contender: times in turn, from CUDA graphs, and the error. Without a GPU nobody's clock."""
    replays: dict[str, Callable[[], object]] = {}
    rows: dict[str, Row] = {}
    for name, run in runs.items():
        try:
            if device.type == "cuda":
                replays[name], result = captured(run, calls)
                replays[name]()
            else:
                result = run()
        except Exception as error:
            rows[name] = {"contender": name, "ok": None, "reason": first_line(error)}
            continue
        rows[name] = {"contender": name, "ok": None, "error": error_of(result, truth)}
    for name, times in race(replays, 15, 3).items() if replays else ():
        rows[name].update(figures(times, calls))
    return list(rows.values())


def ceilings(scope: Scope) -> list[Row]:
    """The rates of the GPU itself: copies, a large product, and one node of a graph to the next."""
    device = scope.device
    if device.type != "cuda":
        return [{"ok": None, "reason": "a GPU has them"}]
    wake(device)
    big, one = torch.empty(2**30, dtype=torch.uint8, device=device), torch.zeros(1, device=device)
    other, square = torch.empty_like(big), torch.randn(8192, 8192, device=device, dtype=torch.float16)
    nodes, _ = captured(lambda: one.add_(1), 100)
    runs = {"copy": lambda: other.copy_(big), "product": lambda: square @ square, "nodes": nodes}
    us = {name: figures(found)["us"] for name, found in race(runs, 10, 3).items()}
    return [
        {"contender": "copy, TB/s", "ok": None, "value": round(2 * 2**30 / us["copy"] / 1e6, 3)},
        {"contender": "matmul, TFLOP/s", "ok": None, "value": round(2 * 8192**3 / us["product"] / 1e6, 1)},
        {"contender": "a node of a graph, us", "ok": None, "value": round(us["nodes"] / 100, 2)},
    ]


def speed(scope: Scope, batches: Sequence[int] = BATCHES) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """Ceilings; sublayers beside the reference, eager and compiled; products beside cuBLAS, attention beside SDPA."""
    yield "ceilings", partial(ceilings, scope)
    tokens, features = sizes(scope)
    for batch in batches:
        for operator in OPERATORS[2:]:
            yield f"{operator}, batch {batch}", partial(_race_sublayer, scope, operator, batch, tokens, features)
        for inputs, outputs, activation in products(features):
            name = f"linear, {batch * tokens} rows, {inputs} to {outputs}, {activation}"
            yield name, partial(_race_linear, scope, batch * tokens, inputs, outputs, activation)
        yield f"attention, batch {batch}", partial(_race_attention, scope, batch, tokens)


def products(features: int) -> Iterator[tuple[int, int, str]]:
    """Inputs, outputs and activation of the linear layers of the cut DeiT-Small."""
    middle, hidden = HEADS * min(WIDTH, features), 5 * features // 2
    yield features, 3 * middle, "identity"
    yield features, hidden, "gelu"
    yield hidden, features, "identity"
    yield middle, features, "identity"


def _able(scope: Scope) -> list[str]:
    return [name for name, support in gpu_backends(scope.device, scope.dtype) if support]


def _calls(batch: int) -> int:
    return 20 if batch < 64 else 5


@torch.no_grad()
def _race_sublayer(scope: Scope, operator: str, batch: int, tokens: int, features: int) -> list[Row]:
    model = Sublayer(operator, features).to(scope.device, scope.dtype).eval()
    x = Maker(1).normal(batch, tokens, features).to(scope.device, scope.dtype)
    truth = Sublayer(operator, features).to(scope.device, torch.float64)(x.double(), "reference")
    runs: dict[str, Callable[[], Tensor]] = {name: partial(model, x, name) for name in _able(scope)}
    runs["PyTorch"] = partial(model, x, "reference")
    if scope.device.type == "cuda":
        compiled = torch.compile(lambda x: model(x, "reference"), dynamic=False)
        runs["torch.compile"] = partial(compiled, x)
    return raced(runs, truth, scope.device, _calls(batch))


@torch.no_grad()
def _race_linear(scope: Scope, rows: int, inputs: int, outputs: int, activation: str) -> list[Row]:
    call = Maker(1).linear((rows,), inputs, None, outputs, None, activation).to(scope.dtype, scope.device)
    weight, bias = call.tensors()[1:]
    runs: dict[str, Callable[[], Tensor]] = {name: partial(call.run, name) for name in _able(scope)}
    found = raced(
        {**runs, "cuBLAS, no activation": partial(F.linear, call.x, weight, bias)}, call.truth(), scope.device, 5
    )
    return [{**row, "error": None} if row["contender"].startswith("cuBLAS") else row for row in found]


@torch.no_grad()
def _race_attention(scope: Scope, batch: int, tokens: int) -> list[Row]:
    width = [WIDTH] * HEADS
    call = Maker(1).attention(batch, tokens, width, width, scale=WIDTH**-0.5).to(scope.dtype, scope.device)
    q, k, v = call.x.view(batch, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    runs: dict[str, Callable[[], Tensor]] = {name: partial(call.run, name) for name in _able(scope)}
    return raced({**runs, "SDPA": sdpa}, call.truth(), scope.device, _calls(batch))


def tuning(scope: Scope) -> Iterator[Case]:
    """Tiles of the Triton kernels at the shapes of the cut DeiT-Small, into the user's cache."""
    from . import tune

    def check(key: str, shape: tune.Shape) -> Row:
        if scope.device.type != "cuda":
            return {"ok": None, "reason": "only a GPU can be measured"}
        lines: list[str] = []
        tune.tune([shape], scope.device, [scope.dtype], write=lines.append)
        return {"ok": None, "result": " ".join(lines)}

    found: dict[str, tune.Shape] = {}
    for batch in BATCHES:
        for inputs, outputs, activation in products(FEATURES):
            shape: tune.Shape = tune.LinearShape(
                batch * TOKENS, inputs, outputs, activation == "gelu" or outputs > 2 * inputs
            )
            found.setdefault(shape.key(scope.dtype), shape)
        shape = tune.AttentionShape(batch, TOKENS, HEADS, WIDTH)
        found.setdefault(shape.key(scope.dtype), shape)
    for key, shape in found.items():
        yield key, partial(check, key, shape)


PARTS: dict[str, Part] = {
    "smoke": Part(smoke, 12, precisions=HALF),
    "explicit": Part(explicit, 32, slices=(2, 3)),
    "largest": Part(largest, 4, backends=("cuda",), precisions=HALF),
    "sanitizer": Part(
        sanitized,
        13,
        backends=("cuda",),
        precisions=("float16", "float32"),
        slices=(3, 3),
        tools=("memcheck", "racecheck"),
    ),
    "speed": Part(speed, 16, backends=("",), precisions=HALF, together=False),
    "graphs": Part(graphs, 4),
    "gradients": Part(gradients, 7, backends=("triton",)),
    "opcheck": Part(opcheck, 3, precisions=HALF),
    "numerics": Part(numerics, 6, slices=(1, 2)),
    "tuning": Part(tuning, 3, backends=("triton",), precisions=HALF, together=False),
}


# --- one process -----------------------------------------------------------------------------------------------------
def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


def spoiled(device: torch.device) -> bool:
    """Whether the GPU gives nothing more to this process, as after a fault of a kernel."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _in_json(row: Row) -> Row:
    """A row without numbers that JSON does not have."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def work(part: Part, scope: Scope, part_of: tuple[int, int], first: int, say: Callable[[Row], object]) -> int:
    """Run every n-th case of a part from number ``first`` on, each named before it begins; the exit code."""
    if scope.backend:
        support = dispatch.can_run(scope.backend, scope.device, scope.dtype)
        if not support:
            say({"ok": None, "reason": support.reason})
            return 0
    for number, (name, run) in enumerate(part.cases(scope)):
        if number < first or number % part_of[1] != part_of[0]:
            continue
        say({"begins": name, "number": number})
        began, fault = time.perf_counter(), False
        try:
            found = run()
        except Exception as error:
            found = {"ok": False, "reason": first_line(error)}
            fault = spoiled(scope.device)
        for row in found if isinstance(found, list) else [found]:
            say({"case": name, **_in_json(row), "s": round(time.perf_counter() - began, 2)})
        if fault:
            return SPOILED
    return 0


# --- all of them -----------------------------------------------------------------------------------------------------
def jobs(name: str, part: Part, scope: Scope) -> Iterator[Job]:
    """The processes of a part, those that say most first."""
    sanitizer = shutil.which("compute-sanitizer")
    for tool in part.tools or ("",):
        for precision in part.precisions:
            for backend in part.backends:
                count = part.slices[0 if backend == "cuda" else 1]
                for i in range(count):
                    about = {"part": name, "backend": backend, "precision": precision, "tool": tool}
                    options = [
                        "--part",
                        name,
                        "--backend",
                        backend,
                        "--precision",
                        precision,
                        "--slice",
                        f"{i}/{count}",
                    ]
                    options += [
                        "--device",
                        str(scope.device),
                        "--cases",
                        str(scope.cases),
                        "--largest",
                        str(scope.largest),
                    ]
                    command = worker(part.module, *options)
                    environment = {"OMP_NUM_THREADS": "1"}  # there are as many processes as cores
                    if scope.device.type == "cpu":
                        environment["TRITON_INTERPRET"] = "1"
                    if tool:
                        # Without PyTorch's own pool each tensor is an allocation whose ends the tool knows.
                        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
                        command = [*_sanitizing(sanitizer or "compute-sanitizer", tool), *command]
                    yield Job({key: value for key, value in about.items() if value}, command, environment, part.seconds)


@functools.cache
def _sanitizing(program: str, tool: str) -> tuple[str, ...]:
    """The beginning of a command line; only our kernels are looked at where the tool can choose."""
    try:
        known = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=20).stdout
    except OSError:
        known = ""
    only = ("--kernel-regex", "kns=gohsp") if "--kernel-regex" in known else ()
    return program, "--tool", tool, "--error-exitcode", "86", *only


def names_of_gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def about(device: str) -> Row:
    """What a figure depends on besides the code."""
    found: Row = {"device": device, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "numpy"):
        try:
            found[name] = importlib.import_module(name).__version__
        except ImportError:
            found[name] = "missing"
    found |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    library = _native.load_cuda()
    found["library"] = library.reason or "loads"
    if torch.cuda.is_available():
        found["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        found["library"] = _native.cuda_missing(torch.cuda.current_device()) or "runs"
    return found


def free_place(folder: Path, name: str) -> Path:
    """Where no report is yet: a second run adds to what the first has found."""
    places = (folder / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(place for place in places if not Path(f"{place}.jsonl").exists())


@contextmanager
def stopped_by_signals(deadline: Deadline) -> Iterator[None]:
    """In the ``with`` block a signal to end brings the deadline forward: processes end, and the report is written."""
    before = {number: signal.signal(number, lambda *_: deadline.stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check(device: str, folder: Path, scope: Scope, parts: Mapping[str, Part], seconds: float, at_once: int) -> int:
    """Run parts and write the report; the exit code: 1 where something was wrong."""
    report = Report(free_place(folder, "-".join(device.replace("/", " ").split())), about(device))
    deadline, whole, past = Deadline(seconds), sum(part.share for part in parts.values()), 0.0
    with stopped_by_signals(deadline):
        for name, part in parts.items():
            past += part.share
            began = time.monotonic()
            if part.tools and shutil.which("compute-sanitizer") is None:
                report.add({"part": name, "ok": None, "reason": "there is no compute-sanitizer on the PATH"})
            else:
                run_jobs(list(jobs(name, part, scope)), at_once if part.together else 1, deadline, past / whole, report)
            report.finish_part(name, time.monotonic() - began)
    print(f"written to {report.path}.jsonl and .md")
    return 1 if report.wrong() else 0


def main(arguments: Sequence[str] | None = None, parts: Mapping[str, Part] = PARTS) -> int:
    """The command line of ``parts``; the exit code."""
    parser = argparse.ArgumentParser(description="Checks the GPU backends on the first GPU and writes a report.")
    parser.add_argument("--seconds", type=float, default=500, help="that all of it may take")
    parser.add_argument("--folder", type=Path, default=Path("gpu-report"), help="of the report")
    parser.add_argument("--only", nargs="+", choices=list(parts), help="these parts, which then share the seconds")
    parser.add_argument("--device", type=torch.device, help="cuda; or cpu for a rehearsal")
    parser.add_argument("--at-once", type=int, default=max(1, min(12, (os.cpu_count() or 1) - 2)), help="processes")
    parser.add_argument("--cases", type=int, help="random calls of each operator")
    parser.add_argument("--largest", type=int, help="size in them")
    inner = parser.add_argument_group("one process of it, whose rows are printed")
    inner.add_argument("--part", choices=list(parts))
    inner.add_argument("--backend", default="")
    inner.add_argument("--precision", default="float16", choices=list(PRECISIONS))
    inner.add_argument("--slice", default="0/1")
    inner.add_argument("--first", type=int, default=0)
    options = parser.parse_args(arguments)
    device = options.device or torch.device("cuda")
    small = device.type == "cpu"
    scope = Scope(
        device,
        options.backend,
        options.precision,
        options.cases or (2 if small else 12),
        options.largest or (24 if small else 512),
    )
    if small:
        rehearse()
    if options.part is not None:
        i, count = map(int, options.slice.split("/"))

        def say(row: Row) -> None:
            print(json.dumps(row), flush=True)

        return work(parts[options.part], scope, (i, count), options.first, say)
    names = ["CPU"] if small else names_of_gpus()
    if not names:
        print("no GPU here: nothing was checked, and nothing is claimed")
        return 0
    chosen = {name: part for name, part in parts.items() if name in (options.only or parts)}
    return check(names[0], options.folder, scope, chosen, options.seconds, options.at_once)


if __name__ == "__main__":
    sys.exit(main())
