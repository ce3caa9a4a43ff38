# SPDX-License-Identifier: Apache-2.0
"""Checks of the GPU backends on whatever GPU is here: ``python -m gohsp_kernels.gpu_check``, or ``make gpu-check``.

Runs both sublayers of a pruned DeiT-Small in every dtype against the float64 reference, captures a call in a CUDA
graph, times them against the reference, and writes ``gpu-check/<device>.json``. Where there is no GPU it says so,
claims nothing and exits with 0.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import dispatch, ops

TOLERANCES = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""Largest relative norm of the error; float32 allows tf32 products."""

BACKENDS = ("cuda", "triton")

OPERATORS: dict[str, Callable[..., Tensor]] = {
    "attention_sublayer": ops.attention_sublayer,
    "mlp_sublayer": ops.mlp_sublayer,
}
FEATURES, HEADS, WIDTH, HIDDEN = 384, 4, 64, 960  # DeiT-Small cut to 4 heads and 960 neurons a block


def names_of_gpus() -> list[str]:
    """Names of the GPUs that torch sees."""
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def arguments(operator: str, device: str, dtype: torch.dtype, batch: int = 8) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of one call at DeiT-Small's shapes, with bias, norm and layer scale."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    def weight(outputs: int, inputs: int) -> Tensor:
        return normal(outputs, inputs, scale=inputs**-0.5)

    x = normal(batch, 197, FEATURES), normal(FEATURES), normal(FEATURES)
    scale = {"layer_scale": normal(FEATURES)}
    if operator == "mlp_sublayer":
        return (*x, weight(HIDDEN, FEATURES), normal(HIDDEN), weight(FEATURES, HIDDEN), normal(FEATURES)), scale
    channels = HEADS * WIDTH
    qkv = weight(3 * channels, FEATURES), normal(3 * channels)
    widths = {"qk_widths": (WIDTH,) * HEADS, "v_widths": (WIDTH,) * HEADS, "scale": WIDTH**-0.5}
    return (*x, *qkv, weight(FEATURES, channels), normal(FEATURES)), {**scale, **widths}


def relative_error(operator: str, backend: str, device: str, dtype: torch.dtype) -> float:
    """Relative norm of the difference to the reference in float64, on the same rounded inputs."""
    args, kwargs = arguments(operator, device, dtype)

    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) else value

    truth = OPERATORS[operator](*map(double, args), **{k: double(v) for k, v in kwargs.items()}, backend="reference")
    result = OPERATORS[operator](*args, **kwargs, backend=backend)
    return float((result.double() - truth).norm() / truth.norm())


def captured_equals_eager(operator: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether a call captured in a CUDA graph gives, on new input, what a call outside gives."""
    args, kwargs = arguments(operator, "cuda", dtype, batch=1)
    call = lambda: OPERATORS[operator](*args, **kwargs, backend=backend)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    args[0].mul_(0.5)
    graph.replay()
    return torch.equal(result, call())


def median_ms(operator: str, backend: str, dtype: torch.dtype, rounds: int = 50) -> float:
    """Median milliseconds of a call, by CUDA events."""
    args, kwargs = arguments(operator, "cuda", dtype, batch=64)
    times = []
    for _ in range(rounds + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        OPERATORS[operator](*args, **kwargs, backend=backend)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def check(operator: str, backend: str, dtype: torch.dtype) -> dict[str, Any]:
    """All checks of one operator on one backend in one dtype; where it cannot run, the reason."""
    support = dispatch.can_run(backend, "cuda", dtype)
    row: dict[str, Any] = {"operator": operator, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
    if not support:
        return {**row, "ok": None, "reason": support.reason}
    error = relative_error(operator, backend, "cuda", dtype)
    captured = captured_equals_eager(operator, backend, dtype)
    times = {f"{name}_ms": median_ms(operator, name, dtype) for name in (backend, "reference")}
    return {**row, "ok": error < TOLERANCES[dtype] and captured, "error": error, "graph": captured, **times}


def write(path: Path, device: str, rows: list[dict[str, Any]]) -> None:
    """Write the report beside its place, then rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"device": device, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    part.replace(path)


def main(
    gpus: Sequence[str] | None = None,
    folder: Path = Path("gpu-check"),
    run: Callable[[str, str, torch.dtype], dict[str, Any]] = check,
) -> int:
    """Check the first GPU; return the exit code: 1 where a check failed."""
    gpus = names_of_gpus() if gpus is None else gpus
    if not gpus:
        print("no GPU here: nothing was checked, and nothing is claimed")
        return 0
    with torch.no_grad():
        rows = [run(*check) for check in itertools.product(OPERATORS, BACKENDS, TOLERANCES)]
    path = folder / f"{gpus[0].replace(' ', '-').replace('/', '-')}.json"
    write(path, gpus[0], rows)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    print(f"written to {path}")
    return 1 if any(row["ok"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
