# SPDX-License-Identifier: Apache-2.0
"""What the compiled CUDA kernels take of a GPU, read from the library, beside Triton's kernels: ``gpu-static``.

Nothing here runs on a GPU. Registers, spills and instructions are those of the binaries, disassembled by the tools that
Triton's wheel carries; how many blocks fit on a multiprocessor follows from them by the occupancy formula.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from gohsp_kernels import _native

KIB = 1024
SHARED_BYTES = {  # of a multiprocessor
    "sm_80": 164 * KIB,
    "sm_90": 228 * KIB,
    "sm_90a": 228 * KIB,
    "sm_100": 228 * KIB,
    "sm_120": 100 * KIB,
}
TRITON_TARGETS = ("sm_80", "sm_90", "sm_100")
"""GPUs that tests/gohsp_kernels/triton/aot.py compiles for; the others are in the CUDA library alone."""

FINISHES = ("identity", "gelu", "other")
"""Activations that a linear kernel is compiled for, in the order of Finish (csrc/cuda/linear.cuh)."""
ELEMENT_BYTES = {"F16": 2, "Bf16": 2, "Tf32": 4, "F32": 4}
WARP = 32


@dataclass(frozen=True)
class Cost:
    """What one kernel takes of a multiprocessor.

    Attributes:
        backend: "cuda" or "triton".
        target: a key of SHARED_BYTES.
        kernel: name and, of the CUDA kernels, template arguments.
        threads: threads of a block.
        shared_bytes: dynamic shared memory of a block.
        registers: registers of a thread.
        spilled_bytes: stack of a thread.
        matrix_instructions: HMMA and its successors in the code.
        wide_copies: asynchronous copies and loads of 16 bytes from global memory in the code.
        local_accesses: loads and stores of local memory in the code.
    """

    backend: str
    target: str
    kernel: str
    threads: int
    shared_bytes: int
    registers: int
    spilled_bytes: int
    matrix_instructions: int
    wide_copies: int
    local_accesses: int

    @property
    def blocks(self) -> int:
        """How many blocks a multiprocessor holds at once, by registers, shared memory and threads."""
        registers = -(-self.registers // 8) * 8 * self.threads  # dealt out by 8 a thread
        shared = SHARED_BYTES[self.target] // (self.shared_bytes + 1024)  # 1 KiB is the system's
        return min(65536 // registers, shared, 2048 // self.threads)

    @property
    def warps(self) -> int:
        return self.blocks * self.threads // WARP


def linear_block(precision: str, bm: int, bn: int, m: int, n: int, k: int, chunks: int, _: int) -> tuple[int, int]:
    """Threads and shared bytes of a LinearTile (csrc/cuda/linear.cuh)."""
    return WARP * m * n * k, 4 * (bm + bn) * chunks * 16 + bm * 8


def warpgroup_block(precision: str, bm: int, bn: int, stages: int, _: int) -> tuple[int, int]:
    """Threads and shared bytes of a WarpgroupTile (csrc/cuda/linear.cuh)."""
    return 2 * bm, stages * (bm + bn) * 128 + bm * 8


def attention_block(precision: str, width: int, keys: int, warps: int, _: int) -> tuple[int, int]:
    """Threads and shared bytes of an AttentionTile (csrc/cuda/attention.cuh); a launch may ask for fewer of both."""
    return WARP * warps, (16 * warps + 2 * keys) * width * ELEMENT_BYTES[precision]


BLOCKS = {"Linear": linear_block, "Warpgroup": warpgroup_block, "Attention": attention_block}


def block_of(mangled: str) -> tuple[str, int, int]:
    """Readable name, threads and shared bytes of a kernel."""
    tile = re.search(r"(Linear|Warpgroup|Attention)TileINS0_\d+([A-Za-z]+\d+)E((?:Li\d+E)+)", mangled)
    if tile is None:
        if "checksum_kernel" in mangled:
            return "checksum", 256, 2 * KIB
        element = re.search(r"rows_kernelI(?:NS0_\d+(\w+?)E|(f))E", mangled)
        assert element is not None, mangled
        return f"rows {element[1] or 'float'}", 256, 0
    kind, precision, numbers = tile[1], tile[2], [int(n) for n in re.findall(r"\d+", tile[3])]
    finish = re.search(r"FinishE(\d)E", mangled)
    words = [kind.lower(), precision, *map(str, numbers), *([FINISHES[int(finish[1])]] if finish else [])]
    return " ".join(words), *BLOCKS[kind](precision, *numbers)


def _dump(library: Path, *options: str) -> str:
    import triton  # whose wheel carries the tools

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *options, library], capture_output=True, text=True, check=True).stdout


def cuda_costs(library: Path) -> list[Cost]:
    """Every kernel in the library, for every GPU that it was compiled for."""
    usage: dict[tuple[str, str], tuple[int, int]] = {}
    target = name = ""
    for line in _dump(library, "--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            target = found[1]
        elif found := re.match(r" Function (\w+):", line):
            name = found[1]
        elif found := re.match(r"  REG:(\d+) STACK:(\d+)", line):
            usage[target, name] = int(found[1]), int(found[2])
    code: dict[tuple[str, str], list[int]] = {}
    patterns = [re.compile(p) for p in (r"\s(?:HMMA|HGMMA|UTCHMMA)\.", r"\sLDG(?:STS)?\.E\S*\.128", r"\s(?:LDL|STL)\b")]
    for line in _dump(library, "-sass").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            target = found[1]
        elif found := re.match(r"\s+Function : (\w+)", line):
            counts = code[target, found[1]] = [0] * len(patterns)
        elif " ;" in line:
            for i, pattern in enumerate(patterns):
                counts[i] += pattern.search(line) is not None
    result = []
    for (target, mangled), (registers, spilled) in usage.items():
        kernel, threads, shared = block_of(mangled)
        result.append(Cost("cuda", target, kernel, threads, shared, registers, spilled, *code[target, mangled]))
    return sorted(result, key=lambda cost: (cost.kernel, cost.target))


def triton_costs(target: str, dtype: str = "fp16") -> Iterator[Cost]:
    """The Triton kernels of inference, compiled in a process of their own; takes minutes the first time."""
    command = [sys.executable, "-m", "tests.gohsp_kernels.triton.aot", target, dtype]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=True)
    for line in run.stdout.splitlines():
        c = json.loads(line)
        if not any(word in c["case"] for word in ("gradient", "odd", "1 of", "256 of")):
            yield Cost(
                "triton", target, c["case"], c["threads"], c["shared_bytes"], c["registers"], c["spilled_bytes"],
                c["matrix_instructions"], -1, -1,
            )  # fmt: skip


def table(costs: list[Cost]) -> Table:
    """One row a kernel; what was not counted is a dash."""
    columns = ("backend", "target", "kernel", "threads", "shared", "registers", "spilled", "MMA", "16 B", "local")
    result = Table(*columns, "blocks", "warps", title="read from the binaries, nothing was run")
    for c in costs:
        numbers = (c.threads, c.shared_bytes, c.registers, c.spilled_bytes, c.matrix_instructions, c.wide_copies)
        cells = ["-" if n < 0 else str(n) for n in (*numbers, c.local_accesses, c.blocks, c.warps)]
        result.add_row(c.backend, c.target, c.kernel, *cells)
    return result


def run(targets: list[str], triton: bool, console: Console) -> int:
    """Print the table; 1 where there is no CUDA library to read."""
    library = _native.load_cuda()
    if library.path is None:
        console.print(f"no figures: {library.reason}", markup=False)
        return 1
    costs = [cost for cost in cuda_costs(library.path) if cost.target in targets]
    if triton:
        costs += [cost for target in targets if target in TRITON_TARGETS for cost in triton_costs(target)]
    console.print(table(costs))
    return 0
