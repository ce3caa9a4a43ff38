# SPDX-License-Identifier: Apache-2.0
"""Checks of the GPU backends on the GPU at hand: ``python -m gohsp_kernels.gpu_check``.

In parts, each in a process of its own: a kernel that faults takes the context of its process with it and one that hangs
is killed, and the other parts go on. Writes ``gpu-report/<device>.json`` and ``.md``. Where there is no GPU it says so
and claims nothing. ``make gpu-check`` adds whole models (``python -m bench.gpu_check``), which this package knows none
of.

A row of a report has ``ok``: whether a result was right, or None where nothing was judged; then ``reason`` says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import descriptors, dispatch, ops, testing
from .graphed import GraphedModel
from .testing import PRECISIONS, Call, Maker, poisoned

OPERATORS = tuple(descriptors.OPERATORS)

Row = dict[str, Any]

SANITIZERS = ("memcheck", "racecheck")
BATCHES = (1, 8, 64)


@dataclass(frozen=True)
class Scope:
    """On what, and how much, a part works.

    Attributes:
        device: a GPU; or the CPU, whose backends are then Triton's interpreter alone.
        cases: random calls of each operator in each precision.
        largest: number of features, tokens or neurons in them.
    """

    device: torch.device
    cases: int = 12
    largest: int = 512


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        rows: what it finds, row by row.
        judges: whether it is about right and wrong, so that not to finish is to fail; else it measures.
        minutes: after which it is stopped.
        module: to run with ``python -m``.
    """

    rows: Callable[[Scope], Iterator[Row]]
    judges: bool = True
    minutes: int = 60
    module: str = "gohsp_kernels.gpu_check"


error_of = partial(testing.error, floor=1.0)


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
    """What gohsp_kernels offers for GPUs; on the CPU that is Triton's interpreter alone."""
    skipped = ("cpu", "reference") if device.type != "cpu" else ("cpu", "reference", "cuda")
    for name, support in dispatch.backends(device, dtype).items():
        if name not in skipped:
            yield name, support


ELEMENT = 12
"""An element may be off by so many times the limit of its precision, in units of its row's root mean square."""


def explicit_cases(scope: Scope) -> Iterator[tuple[str, Call]]:
    """Name and call of what reaches every tile, form of input and way out of the GPU kernels.

    At the size of real models, or where ``scope.largest`` is below 197 at some of it.
    """
    maker, small = Maker(7), scope.largest < 197
    tokens = 37 if small else 197
    for batch in (1,) if small else (1, 8, 64):
        for keep in (("all", "all"), ("chunks", "most"), ("single", "chunks")):
            name = f"384 features, {keep[0]} in, {keep[1]} out, batch {batch}"
            yield f"mlp, {name}", maker.mlp_sublayer((batch, tokens), 384, 960, *keep)
            widths = [64, 24, 0, 40], [64, 40, 16, 8]
            yield f"attention, {name}", maker.attention_sublayer(batch, tokens, 384, *widths, *keep, scale=0.125)
        yield f"mlp, 192 features, batch {batch}", maker.mlp_sublayer((batch, tokens), 192, 384)
        one = maker.attention_sublayer(batch, tokens, 384, [64] * 4, [64] * 4, scale=0.125, num_queries=1)
        yield f"class token, batch {batch}", one
    sizes = ((197, 384, 768), (16900, 416, 520), (2049, 149, 137), (1, 768, 1000), (65, 40, 65), (25216, 768, 2304))
    for rows, inputs, outputs in sizes[2:5] if small else sizes:
        rows = min(rows, 130) if small else rows
        for form, activation in (("all", "identity"), ("chunks", "gelu"), ("single", "silu")):
            name = f"linear, {rows} rows, {inputs} to {outputs}, {form} in, {activation}"
            written = "most" if form == "chunks" else "all"
            yield name, maker.linear((rows,), inputs, form, outputs, written, activation)
    for count in (1, 16, 63, 65, tokens) if small else (1, 16, 63, 64, 65, 197, 577, 1025):
        for name, qk, v in (
            ("heads to 64", [64, 16, 40, 0], [64, 8, 24, 48]),
            ("heads to 128", [128, 72, 8], [96, 128, 8]),
            ("odd heads", [63, 3, 7], [5, 33, 64]),
        ):
            yield f"{name}, {count} tokens", maker.attention(2, count, qk, v, scale=0.125)
    if not small:
        yield "more blocks than 65535", maker.attention(9000, 17, [64] * 8, [64] * 8, scale=0.125)


@torch.no_grad()
def judge_case(call: Call, backend: str, limit: float) -> Row:
    """A call against the reference in float64, as a whole and element by element, once more, and with x transposed."""
    result, again = call.run(backend), call.run(backend)
    strided = call.with_x(call.x.transpose(-1, -2).contiguous().transpose(-1, -2)).run(backend)
    truth = call.truth()
    error, element = error_of(result, truth), testing.worst_element(result, truth)
    same = torch.equal(result, again) and torch.equal(result, strided)
    ok = error <= limit and element <= ELEMENT * limit and same
    return {"ok": ok, "error": error, "element": element, "same": same}


def explicit(scope: Scope) -> Iterator[Row]:
    """Calls that reach every tile and form, each judged; ends at the first fault, after which nothing can be run."""
    for precision, (dtype, limit) in PRECISIONS.items():
        for backend, support in gpu_backends(scope.device, dtype):
            for name, call in explicit_cases(scope) if support else ():
                row: Row = {"backend": backend, "precision": precision, "case": name}
                try:
                    with tf32(precision.endswith("tf32")), poisoned():
                        found = judge_case(call.to(dtype, scope.device), backend, limit)
                except RuntimeError as error:
                    yield {**row, "ok": False, "reason": first_line(error)}
                    if "CUDA error" in str(error):
                        return
                    continue
                yield {**row, **found}


def every_case(scope: Scope, needs_grad: bool, measure: Callable[..., float]) -> Iterator[Row]:
    """Worst of what ``measure(call, backend)`` gives, for every backend, precision and operator."""
    for precision, (dtype, limit) in PRECISIONS.items():
        for backend, _ in gpu_backends(scope.device, dtype):
            for operator in OPERATORS:
                row: Row = {"backend": backend, "precision": precision, "operator": operator}
                errors: dict[int, float] = {}
                reason = ""
                try:
                    for seed in range(scope.cases):
                        call = Maker(seed, scope.largest).ragged(operator).to(dtype, scope.device)
                        support = dispatch.can_run(
                            backend,
                            scope.device,
                            dtype,
                            needs_grad=needs_grad,
                            widest_head=call.operator.widest_head,
                        )
                        if support:
                            with tf32(precision.endswith("tf32")):
                                errors[seed] = measure(call, backend)
                        reason = reason or support.reason
                except Exception as error:
                    yield {**row, "ok": False, "cases": len(errors), "reason": first_line(error)}
                    continue
                found: Row = {"ok": None, "cases": len(errors), "reason": reason}
                if errors:
                    worst = max(errors, key=lambda seed: errors[seed])
                    found |= {"ok": errors[worst] <= limit, "error": errors[worst], "limit": limit, "worst_seed": worst}
                yield {**row, **found}


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


def numerics(scope: Scope) -> Iterator[Row]:
    """Every operator on random heterogeneous calls, against the reference in float64, and twice the same."""
    return every_case(scope, False, forward_error)


def gradients(scope: Scope) -> Iterator[Row]:
    """The same of the gradients, on a third of the calls. Chains are longer, limits the same."""
    smaller = Scope(scope.device, -(-scope.cases // 3), scope.largest)
    return every_case(smaller, True, gradient_error)


def opcheck(scope: Scope) -> Iterator[Row]:
    """torch.library.opcheck: schema, fake tensors, autograd registration, tracing with dynamic shapes."""
    for backend, support in gpu_backends(scope.device, torch.float16):
        for operator in OPERATORS:
            row: Row = {"backend": backend, "operator": operator}
            if not support:
                yield {**row, "ok": None, "reason": support.reason}
                continue
            call = Maker(1, scope.largest).ragged(operator).to(torch.float16, scope.device)
            try:
                with dispatch.use_backend(backend):
                    torch.library.opcheck(getattr(torch.ops.gohsp_kernels, operator).default, call.flat())
                yield {**row, "ok": True}
            except Exception as error:
                yield {**row, "ok": False, "reason": first_line(error)}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"


class Sublayer(nn.Module):
    """One sublayer of DeiT-Small cut to 4 heads and 960 neurons a block, or the same with fewer ``features``."""

    def __init__(self, operator: str, features: int) -> None:
        super().__init__()
        maker, heads, width, hidden = Maker(0), 4, min(64, features), 5 * features // 2
        norm, scale, middle = (maker.normal(features), maker.normal(features)), maker.normal(features), heads * width
        if operator == "mlp_sublayer":
            outer, inner = (hidden, features), (features, hidden)
            constants: tuple[Any, ...] = (scale, None, None, "gelu", 1e-6)
        else:
            outer, inner = (3 * middle, features), (features, middle)
            widths = (width,) * heads
            constants = (scale, *(None,) * 6, widths, widths, width**-0.5, 1e-6, 1e-6)
        self.operator = operator
        layers = maker.weight(*outer), maker.normal(outer[0]), maker.weight(*inner), maker.normal(inner[0])
        self.constants = constants[1:]
        self.weights = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in (*norm, *layers, scale))

    def forward(self, x: Tensor) -> Tensor:
        queries = (x.shape[1],) if self.operator == "attention_sublayer" else ()
        result: Tensor = ops.call(self.operator, (x, *self.weights, *self.constants, *queries), None)
        return result


def sizes(scope: Scope) -> tuple[int, int]:
    """Tokens and features of DeiT-Small, or fewer."""
    return min(197, scope.largest), min(384, scope.largest)


def graphs(scope: Scope) -> Iterator[Row]:
    """Both sublayers captured in a CUDA graph: on new input, bit for bit what a call outside gives."""
    tokens, features = sizes(scope)
    for precision, (dtype, _) in PRECISIONS.items():
        for backend, support in gpu_backends(scope.device, dtype):
            for operator in OPERATORS[2:]:
                row: Row = {"backend": backend, "precision": precision, "operator": operator}
                if not support:
                    yield {**row, "ok": None, "reason": support.reason}
                    continue
                model = Sublayer(operator, features).to(scope.device, dtype).eval()
                images = [Maker(i).normal(1, tokens, features).to(scope.device, dtype) for i in (1, 2)]
                try:
                    with dispatch.use_backend(backend), tf32(precision.endswith("tf32")), torch.no_grad():
                        graphed = GraphedModel(model)
                        equal = [torch.equal(graphed(x), model(x)) for x in images]
                    yield {**row, "ok": all(equal)}
                except Exception as error:
                    yield {**row, "ok": False, "reason": first_line(error)}


def sanitizer(scope: Scope) -> Iterator[Row]:
    """The numerics again, one call of each operator, under NVIDIA's compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        yield {"ok": None, "reason": "there is no compute-sanitizer on the PATH"}
        return
    for tool in SANITIZERS:
        with tempfile.TemporaryDirectory() as folder:
            once = Scope(scope.device, 1, scope.largest)
            prefix = (program, "--tool", tool, "--error-exitcode", "86")
            # Without PyTorch's own pool each tensor is an allocation whose ends the tool knows.
            process = start_child(PARTS["numerics"], "numerics", once, Path(folder) / "rows", prefix, caching=False)
        lines = [line for line in process.stdout.splitlines() if line.startswith("=========")]
        ok = process.returncode == 0
        yield {"tool": tool, "ok": ok, "reason": "" if ok else " ".join(lines[:6]) or process.stderr[-300:]}


def tuning(scope: Scope) -> Iterator[Row]:
    """Tiles of the Triton kernels at the shapes of DeiT, into the user's cache, where later parts find them."""
    support = dispatch.can_run("triton", scope.device, torch.float16)
    if not support:
        yield {"ok": None, "reason": support.reason}
        return
    from . import tune

    lines: list[str] = []
    tune.tune(list(tune.shapes()), scope.device, write=lines.append)
    for line in lines:
        yield {"ok": None, "result": line}


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


def speed(scope: Scope) -> Iterator[Row]:
    """Both sublayers of the pruned DeiT-Small beside the reference, each replayed from a CUDA graph."""
    tokens, features = sizes(scope)
    for dtype in (torch.float16, torch.bfloat16):
        backends = dict(gpu_backends(scope.device, dtype))
        for operator in OPERATORS[2:]:
            for batch in BATCHES:
                model = Sublayer(operator, features).to(scope.device, dtype).eval()
                x = Maker(1).normal(batch, tokens, features).to(scope.device, dtype)
                row: Row = {"operator": operator, "precision": str(dtype).removeprefix("torch."), "batch": batch}
                for backend in (*(name for name, support in backends.items() if support), "reference"):
                    with dispatch.use_backend(backend):
                        graphed = GraphedModel(model)
                        row[f"{backend}_ms"] = milliseconds(partial(graphed, x), scope.device)
                yield {**row, "ok": None}


PARTS: dict[str, Part] = {
    "explicit": Part(explicit, minutes=30),
    "numerics": Part(numerics),
    "opcheck": Part(opcheck, minutes=20),
    "gradients": Part(gradients),
    "graphs": Part(graphs, minutes=20),
    "sanitizer": Part(sanitizer, minutes=180),
    "tuning": Part(tuning, judges=False, minutes=180),
    "speed": Part(speed, judges=False, minutes=20),
}


def start_child(
    part: Part, name: str, scope: Scope, out: Path, prefix: Sequence[str] = (), caching: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a part in a process, whose rows go to ``out``, one JSON object a line.

    Raises:
        subprocess.TimeoutExpired: if it took longer than the part may.
    """
    command = [*prefix, sys.executable, "-m", part.module, "--part", name, "--out", str(out)]
    command += ["--device", str(scope.device), "--cases", str(scope.cases), "--largest", str(scope.largest)]
    environment = os.environ if caching else {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60 * part.minutes)


def run_part(part: Part, name: str, scope: Scope) -> Row:
    """A part's rows, those before a fault included, and the fault."""
    started, error = time.perf_counter(), ""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        try:
            process = start_child(part, name, scope, out)
            if process.returncode != 0:
                error = f"exit code {process.returncode}: {process.stderr.strip()[-1500:]}"
        except subprocess.TimeoutExpired:
            error = f"not finished after {part.minutes} minutes"
        rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {"rows": rows, "error": error, "seconds": round(time.perf_counter() - started, 1)}


def verdict(part: Part, result: Row) -> bool | None:
    """False if a row is wrong or a part that judges did not finish; None if nothing was judged."""
    judged = [row["ok"] for row in result["rows"] if row.get("ok") is not None]
    if False in judged or (result["error"] and part.judges):
        return False
    return True if judged else None


def names_of_gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def about(device: str) -> Row:
    """What a figure depends on besides the code."""
    found: Row = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    if torch.cuda.is_available():
        found["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return found


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "/").replace("\n", " ")


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table, a column for each key that one of them has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([_cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def markdown(report: Row) -> str:
    """The report for people."""
    words = {True: "right", False: "FAILED", None: "nothing judged"}
    summary = [
        {"part": name, "verdict": words[part["ok"]], "rows": len(part["rows"]), "seconds": part["seconds"]}
        for name, part in report["parts"].items()
    ]
    about = ", ".join(f"{key} {value}" for key, value in report.items() if key not in ("parts", "device") and value)
    text = f"# {report['device']}\n\n{about}\n\n{table(summary)}\n"
    for name, part in report["parts"].items():
        text += f"\n## {name}\n\n"
        text += f"Did not finish:\n\n```\n{part['error']}\n```\n\n" if part["error"] else ""
        text += f"{table(part['rows'])}\n" if part["rows"] else "No row.\n"
    return text


def write(path: Path, text: str) -> None:
    """Write beside the place, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def check(
    gpus: Sequence[str],
    folder: Path,
    scope: Scope,
    parts: Mapping[str, Part],
    run: Callable[[Part, str, Scope], Row] = run_part,
) -> int:
    """Run ``parts`` on the first of ``gpus`` and write the report after each; the exit code: 1 where one failed."""
    if not gpus:
        print("no GPU here: nothing was checked, and nothing is claimed")
        return 0
    report: Row = {**about(gpus[0]), "parts": {}}
    path = folder / "-".join(gpus[0].replace("/", " ").split())
    for name, part in parts.items():
        result = run(part, name, scope)
        report["parts"][name] = {"ok": verdict(part, result), **result}
        write(path.with_name(path.name + ".json"), json.dumps(report, indent=1) + "\n")
        write(path.with_name(path.name + ".md"), markdown(report))
        print(f"{name}: {report['parts'][name]['ok']}  {result['error'].splitlines()[-1] if result['error'] else ''}")
    print(f"written to {path}.json and .md")
    return 1 if any(part["ok"] is False for part in report["parts"].values()) else 0


def main(arguments: Sequence[str] | None = None, parts: Mapping[str, Part] = PARTS) -> int:
    """The command line of ``parts``; the exit code."""
    parser = argparse.ArgumentParser(description="Checks the GPU backends on the first GPU and writes a report.")
    parser.add_argument("--folder", type=Path, default=Path("gpu-report"), help="of the reports")
    parser.add_argument("--part", choices=list(parts), help="only this one, here in this process")
    parser.add_argument("--out", type=Path, help="file for the rows of --part; by default they are printed")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--cases", type=int, default=Scope.cases, help="random calls of each kind")
    parser.add_argument("--largest", type=int, default=Scope.largest, help="size in them")
    options = parser.parse_args(arguments)
    scope = Scope(options.device, options.cases, options.largest)
    if options.part is None:
        return check(names_of_gpus(), options.folder, scope, parts)
    with options.out.open("w") if options.out else sys.stdout as out:
        for row in parts[options.part].rows(scope):
            print(json.dumps(row), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
