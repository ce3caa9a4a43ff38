# SPDX-License-Identifier: Apache-2.0
"""How near gohsp's sublayers come to what the machine can do, and where the rest of the time goes.

The limits are measured in the same rounds as the sublayers: the rate of torch's own fp32 product of two 2048 x 2048
matrices, and the rate at which torch copies a tensor larger than the caches. A sublayer cannot pass the lesser of the
first, and the second times its FLOPs a byte. Bytes are the least that have to move: weights, input and output.

The stages are found on one thread, where nothing waits, by differences: a matrix product with a gather less the same
without, and so on; and divided by the number of threads. Waiting is what the whole takes beyond its own time on one
thread so divided. Stages are operators of their own, so the line "norm, residual, less what fusion saves" may be
negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

import gohsp_kernels as gk
from bench.harness import cases, results
from bench.harness.cases import SEED, Case, Workload
from bench.harness.compare import TOLERANCE, Place, milliseconds, numbers_table, relative_error, row
from bench.harness.environment import Settings, version_of
from bench.harness.results import Row
from bench.harness.timing import time_in_turns
from bench.routines import sublayers
from gohsp.timing import Timing

GEMM_SIZE = 2048
COPY_FLOATS = 1 << 25

Thunk = Callable[[], object]
Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """Sublayers of one kind, of all blocks.

    Attributes:
        name: "attention", "mlp", or "encoder" for both.
        run: Runs them.
        linear_flops, attention_flops: FLOPs of the linear layers, and of QK^T and PV.
        bytes: Bytes of weights, input and output.
    """

    name: str
    run: Callable[[], Tensor]
    linear_flops: float
    attention_flops: float
    bytes: float

    @property
    def flops(self) -> float:
        return self.linear_flops + self.attention_flops


@dataclass(frozen=True)
class Rates:
    """What the machine reached, round by round: FLOPs and bytes a second."""

    gemm: np.ndarray
    copy: np.ndarray

    def limit(self, part: Part) -> np.ndarray:
        return np.minimum(self.gemm, self.copy * part.flops / part.bytes)


def run(todo: Sequence[Case], batches: Sequence[int], settings: Settings, backend: str = "cpu") -> list[str]:
    """Measure gohsp against the machine's limits, for each case and batch.

    Args:
        todo: The cases.
        batches: Images at a time.
        settings: Rounds, threads, file and console.
        backend: Backend of gohsp_kernels whose share is measured.

    Returns:
        Names of the parts that were refused for a wrong result: then nothing is timed.

    Raises:
        RuntimeError: The backend cannot run here.
    """
    support = gk.can_run(backend)
    if not support:
        raise RuntimeError(f"roofline: backend {backend!r}: {support.reason}")
    refused: list[str] = []
    for case in todo:
        work = cases.load(case)
        for batch in batches:
            x = sublayers.tokens(work, batch)
            parts = [_part(work, name, x, backend) for name in (*sublayers.PARTS, "encoder")]
            wrong = _wrong(work, parts, x)
            refused += wrong
            if not wrong:
                _measure(work, parts, x, backend, settings)
    return refused


def _wrong(work: Workload, parts: Sequence[Part], x: Tensor) -> list[str]:
    double = work.masked_in_double().blocks
    steps: dict[str, list[sublayers.Step]] = {
        name: [sublayers.plain(block, name) for block in double] for name in sublayers.PARTS
    }
    steps["encoder"] = list(double)
    expected = {name: sublayers.chain(chain, x.double())() for name, chain in steps.items()}
    return [part.name for part in parts if relative_error(part.run(), expected[part.name]) > TOLERANCE]


def _part(work: Workload, name: str, x: Tensor, backend: str) -> Part:
    tokens, batch = x.shape[1], x.shape[0]
    layouts = [mask.layout() for mask in work.mask.blocks]
    attention = sum(tokens * tokens * (sum(m.qk_widths) + sum(m.v_widths)) for m in layouts)
    counts = work.count.blocks
    macs = {"attention": sum(c.attn_macs for c in counts), "mlp": sum(c.mlp_macs for c in counts)}
    params = {"attention": sum(c.attn_params for c in counts), "mlp": sum(c.mlp_params for c in counts)}
    kinds = sublayers.PARTS if name == "encoder" else (name,)
    attention = attention if "attention" in kinds else 0
    linear = sum(macs[kind] for kind in kinds) - attention
    moved = sum(params[kind] for kind in kinds) + 2 * x.numel() * len(counts) * len(kinds)
    return Part(name, _runner(work, name, x, backend), 2.0 * batch * linear, 2.0 * batch * attention, 4.0 * moved)


def _runner(work: Workload, name: str, x: Tensor, backend: str) -> Callable[[], Tensor]:
    blocks = work.compressed.blocks
    # As a model runs them: all blocks at once.
    steps = [blocks] if name == "encoder" else [sublayers.fused(block, name) for block in blocks]
    return _on(backend, sublayers.chain(steps, x))


def _on(backend: str, function: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with gk.use_backend(backend):
            return function()

    return run


def _measure(work: Workload, parts: Sequence[Part], x: Tensor, backend: str, settings: Settings) -> None:
    batch, tokens, _ = x.shape
    functions: dict[str, Thunk] = {part.name: part.run for part in parts}
    alone = {_alone(part.name): part.run for part in parts}
    alone |= {name: _on(backend, stage) for name, stage in _stages(work, x).items()}
    functions |= {name: _on_one_thread(function, settings.threads) for name, function in alone.items()}
    functions |= {"gemm": matrix_product(), "copy": _copy()}
    heading = f"{work.case.label}, batch {batch}"
    timings = time_in_turns(functions, settings.rounds, settings.console, heading)
    gemm = 2.0 * GEMM_SIZE**3 / np.array(timings["gemm"].seconds)
    rates = Rates(gemm, 8.0 * COPY_FLOATS / np.array(timings["copy"].seconds))
    place = Place("roofline", work.case.label, "machine", batch, tokens)
    stages = {part.name: _where_time_goes(part, timings, rates, settings.threads) for part in parts}
    rows = [
        row(place, "torch", "gemm rate", list(rates.gemm / 1e9), "GFLOP/s", settings),
        row(place, "torch", "copy rate", list(rates.copy / 1e9), "GB/s", settings),
    ]
    for part in parts:
        rows += _rows(place, part, timings[part.name], rates, stages[part.name], settings)
    results.append(settings.out, rows)
    settings.console.print(_limits_table(heading, parts, timings, rates))
    settings.console.print(_stages_table(heading, stages))


def _alone(name: str) -> str:
    return f"{name} on one thread"


def _on_one_thread(function: Thunk, threads: int) -> Thunk:
    def run() -> None:
        torch.set_num_threads(1)
        try:
            function()
        finally:
            torch.set_num_threads(threads)

    return run


def matrix_product() -> Thunk:
    """Return a square product of GEMM_SIZE in torch's own fp32: the yardstick of the machine."""
    a, b = torch.randn(2, GEMM_SIZE, GEMM_SIZE).unbind()
    return lambda: torch.mm(a, b)


def _copy() -> Thunk:
    source = torch.ones(COPY_FLOATS)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _stages(work: Workload, x: Tensor) -> dict[str, Thunk]:
    """Return the operators that a sublayer is made of, each for all blocks."""
    lists: dict[str, list[Thunk]] = {}
    for block in work.compressed.blocks:
        for name, stage in (*_attention_stages(block.attn, x), *_mlp_stages(block.mlp, x)):
            lists.setdefault(name, []).append(stage)
    return {name: _all(stages) for name, stages in lists.items()}


def _attention_stages(attn: Any, x: Tensor) -> list[tuple[str, Thunk]]:
    qkv, heads = _random(x, attn.qkv.weight.shape[0]), _random(x, attn.proj.weight.shape[1])
    layout = (attn.qk_widths, attn.v_widths, attn.scale)
    norms = attn.qk_norm_arguments()
    return [
        ("qkv", _linear(attn.qkv, _read(x, attn.in_cols))),
        ("qkv, gather", _linear(attn.qkv, x, in_cols=attn.in_cols)),
        ("heads", lambda: gk.ragged_attention(qkv, *layout, **norms)),
        ("proj", _linear(attn.proj, heads)),
        ("proj, scatter", _linear(attn.proj, heads, out_cols=attn.out_cols, out_features=attn.dim)),
    ]


def _mlp_stages(mlp: Any, x: Tensor) -> list[tuple[str, Thunk]]:
    hidden = _random(x, mlp.fc2.weight.shape[1])
    return [
        ("fc1", _linear(mlp.fc1, _read(x, mlp.in_cols))),
        ("fc1, gather", _linear(mlp.fc1, x, in_cols=mlp.in_cols)),
        ("fc1, activation", _linear(mlp.fc1, _read(x, mlp.in_cols), activation=mlp.activation)),
        ("fc2", _linear(mlp.fc2, hidden)),
        ("fc2, scatter", _linear(mlp.fc2, hidden, out_cols=mlp.out_cols, out_features=mlp.dim)),
    ]


def _linear(layer: Any, x: Tensor, **options: Any) -> Thunk:
    # A copy of the weight for each stage: packed weights are kept one form a tensor.
    weight, bias = layer.weight.clone(), layer.bias
    return lambda: gk.packed_linear(x, weight, bias, **options)


def _random(x: Tensor, features: int) -> Tensor:
    return torch.randn(*x.shape[:-1], features, generator=torch.Generator().manual_seed(SEED))


def _read(x: Tensor, columns: Tensor | None) -> Tensor:
    return x if columns is None else x.index_select(-1, columns)


def _all(stages: Sequence[Thunk]) -> Thunk:
    def run() -> None:
        with torch.inference_mode():
            for stage in stages:
                stage()

    return run


def _where_time_goes(part: Part, timings: Mapping[str, Timing], rates: Rates, threads: int) -> dict[str, float]:
    """Return milliseconds by stage; they add up to the whole."""
    whole = 1e3 * timings[part.name].median
    t = {name: 1e3 * timing.median / threads for name, timing in timings.items()}
    rate = float(np.median(rates.gemm)) / 1e3
    stages = {"products at the GEMM rate": part.linear_flops / rate}
    products, extras = 0.0, {}
    if part.name != "mlp":
        products += t["qkv"] + t["proj"]
        extras["heads: QK and PV at the GEMM rate"] = part.attention_flops / rate
        extras["heads: softmax and the rest"] = t["heads"] - part.attention_flops / rate
        extras["gather"] = t["qkv, gather"] - t["qkv"]
        extras["scatter"] = t["proj, scatter"] - t["proj"]
    if part.name != "attention":
        products += t["fc1"] + t["fc2"]
        extras["activation"] = t["fc1, activation"] - t["fc1"]
        extras["gather"] = extras.get("gather", 0.0) + t["fc1, gather"] - t["fc1"]
        extras["scatter"] = extras.get("scatter", 0.0) + t["fc2, scatter"] - t["fc2"]
    stages["products below the GEMM rate"] = products - stages["products at the GEMM rate"]
    stages |= extras
    stages["norm, residual, less what fusion saves"] = t[_alone(part.name)] - sum(stages.values())
    stages["waiting of threads"] = whole - t[_alone(part.name)]
    return stages


def _rows(
    place: Place, part: Part, timing: Timing, rates: Rates, stages: Mapping[str, float], settings: Settings
) -> list[Row]:
    here = Place(place.routine, place.case, part.name, place.batch, place.tokens)
    version = {"version": version_of("gohsp")}
    reached = part.flops / np.array(timing.seconds)
    numbers: dict[str, tuple[Sequence[float], str]] = {
        "time": (milliseconds(timing), "ms"),
        "flops": ([part.flops / 1e9], "GFLOP"),
        "bytes": ([part.bytes / 1e6], "MB"),
        "intensity": ([part.flops / part.bytes], "FLOP/byte"),
        "rate": (list(reached / 1e9), "GFLOP/s"),
        "share of limit": (list(reached / rates.limit(part)), "x"),
        "share of gemm rate": (list(reached / rates.gemm), "x"),
        **{f"stage: {name}": ([ms], "ms") for name, ms in stages.items()},
    }
    return [row(here, "gohsp", metric, values, unit, settings, **version) for metric, (values, unit) in numbers.items()]


def _limits_table(heading: str, parts: Sequence[Part], timings: Mapping[str, Timing], rates: Rates) -> Table:
    gemm, copy = np.median(rates.gemm) / 1e9, np.median(rates.copy) / 1e9
    title = f"{heading}\nmeasured: {gemm:.1f} GFLOP/s ({GEMM_SIZE} cubed), copy {copy:.1f} GB/s"
    columns = ("GFLOP", "MB", "FLOP/B", "bound by", "ms", "GFLOP/s", "of limit", "of GEMM")
    table = numbers_table(title, "part", columns)
    for part in parts:
        reached = part.flops / np.array(timings[part.name].seconds)
        table.add_row(
            part.name,
            f"{part.flops / 1e9:.2f}",
            f"{part.bytes / 1e6:.1f}",
            f"{part.flops / part.bytes:.0f}",
            "GEMM" if np.median(rates.limit(part)) >= np.median(rates.gemm) else "copy",
            f"{1e3 * timings[part.name].median:.3f}",
            f"{np.median(reached) / 1e9:.1f}",
            f"{np.median(reached / rates.limit(part)):.0%}",
            f"{np.median(reached / rates.gemm):.0%}",
        )
    return table


def _stages_table(heading: str, stages: Mapping[str, Mapping[str, float]]) -> Table:
    table = numbers_table(f"{heading}\nwhere the time goes, by differences", "stage, ms", list(stages))
    names = dict.fromkeys(name for part in stages.values() for name in part)
    for name in names:
        table.add_row(name, *(f"{part[name]:.3f}" if name in part else "" for part in stages.values()))
    return table
