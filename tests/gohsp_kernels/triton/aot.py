# SPDX-License-Identifier: Apache-2.0
"""Compiles every Triton kernel for GPUs that are not there, and reads from the binaries what they cost.

    python -m tests.gohsp_kernels.triton.aot TARGET DTYPE [GROUP]        prints one JSON line a kernel

`recording` runs the backend's own host code and notes each launch instead of starting it, so that what is compiled is
what that code would launch: same tile, same argument types, same specialisation of strides and sizes. It needs a
process in which Triton does not interpret; the tests start one for each target.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gohsp_kernels.triton import config
from gohsp_kernels.triton.attention import HeadLayout, attention
from gohsp_kernels.triton.attention_backward import attention_gradient
from gohsp_kernels.triton.linear import PackedLinear
from gohsp_kernels.triton.linear_backward import epilogue_gradient, norm_gradient, weight_gradient
from gohsp_kernels.triton.mlp import PackedMlp

TARGETS = {
    "sm_80": (config.Target("cuda", 80, 108), GPUTarget("cuda", 80, 32)),
    "sm_90": (config.Target("cuda", 90, 132), GPUTarget("cuda", 90, 32)),
    "sm_100": (config.Target("cuda", 100, 148), GPUTarget("cuda", 100, 32)),
    "gfx942": (config.Target("hip", "gfx942", 304), GPUTarget("hip", "gfx942", 64)),
}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as the compiler needs it."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]

    @staticmethod
    def of(kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
        """Specialised as Triton does it: 1 and None are constants, multiples of 16 are known to be such."""
        options = {name: keywords.pop(name) for name in ("num_warps", "num_stages") if name in keywords}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        assert list(values) == list(kernel.arg_names), set(kernel.arg_names) ^ set(values)
        constexprs = {kernel.arg_names[p.num] for p in kernel.params if p.is_constexpr}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        aligned: list[str] = []
        for name, value in values.items():
            if name in constexprs or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                aligned += [name] if value.storage_offset() * value.element_size() % 16 == 0 else []
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                aligned += [name] if value % 16 == 0 else []
        return Launch(kernel, signature, constants, tuple(aligned), options)

    def compile(self, target: GPUTarget) -> Any:
        index = self.kernel.arg_names.index
        attributes = {(index(name),): [["tt.divisibility", 16]] for name in self.aligned}
        source = ASTSource(self.kernel, self.signature, self.constants, attributes)
        return triton.compile(source, target=target, options=self.options)


@contextmanager
def recording(target: config.Target) -> Iterator[list[Launch]]:
    """Launches inside the block are noted in the list and not started; the rule believes to be on ``target``."""
    launches: list[Launch] = []

    def note(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(Launch.of(kernel, arguments, keywords))

    with mock.patch.object(JITFunction, "run", note), mock.patch.object(config.Target, "of", lambda _: target):
        yield launches


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel takes of a multiprocessor."""

    case: str
    kernel: str
    threads: int
    shared_bytes: int
    registers: int  # of a thread
    spilled_bytes: int
    matrix_instructions: int
    narrow_loads: int  # of one 16-bit number from global memory
    overwritten: tuple[str, ...] = ()  # buffers that a copy may fill while a tensor core reads them

    def programs_per_processor(self, target: config.Target) -> int:
        """How many fit at once, by registers, shared memory and threads."""
        if (
            target.vendor == "hip"
        ):  # four SIMD units of 512 registers a lane; 64 KiB of local memory; a wave is 64 lanes
            waves = 4 * min(8, 512 // max(self.registers, 1))
            return min(waves // (self.threads // 64), 65536 // max(self.shared_bytes, 1))
        shared = {80: 164, 90: 228, 100: 228}[int(target.arch)] * 1024
        registers = -(-self.registers // 8) * 8 * self.threads  # dealt out by 8 a thread
        return min(65536 // registers, shared // (self.shared_bytes + 1024), 2048 // self.threads)


def overwritten_buffers(ttgir: str) -> tuple[str, ...]:
    """Shared buffers of a pipelined loop that an asynchronous copy fills while a product may still read them.

    A loop that copies P steps ahead and leaves the product of a step running (a wait with pendings) needs P + 1 slots:
    the copies of that step fill the slot of step + P, which with P slots is the one being read. Where the copies come
    before the wait, the product of the step before runs too, and it takes one slot more.
    """
    found: list[str] = []
    loop = ttgir
    while (start := loop.find("scf.for")) >= 0:
        before, loop = loop[:start], loop[start + len("scf.for") :]
        body = loop[: loop.find("scf.yield")]
        view_of = dict(re.findall(r"(%[\w#]+) = ttg\.memdesc_\w+ (%[\w#]+)", before + body))

        def buffer(name: str, view_of: dict[str, str] = view_of) -> str:
            while name in view_of:
                name = view_of[name]
            return name

        copy = re.compile(r"async_copy_global_to_local %[\w#]+, (%[\w#]+)")
        ahead = [buffer(name) for name in copy.findall(before)]
        copies = {buffer(match[1]): match.start() for match in copy.finditer(body)}
        running: set[str] = set()
        for match in re.finditer(r"warp_group_dot_wait ([^{]*)\{pendings = [1-9]", body):
            operands = {buffer(name) for name in re.findall(r"%[\w#]+", match[1])}
            for name in sorted((operands & set(copies)) - running):
                running.add(name)
                slots = re.search(rf"{name} = ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x", ttgir)
                assert slots is not None, name
                needed = ahead.count(name) + (1 if copies[name] > match.start() else 2)
                if int(slots[1]) < needed:
                    found.append(f"{name}: {slots[1]} slots of {needed}")
    return tuple(found)


def cost(case: str, launch: Launch, target: GPUTarget) -> Cost:
    compiled = launch.compile(target)
    threads = launch.options["num_warps"] * target.warp_size
    overwritten = overwritten_buffers(compiled.asm["ttgir"])
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        registers = int(re.findall(r"\.vgpr_count: +(\d+)", text)[0])
        spilled = int(re.findall(r"\.private_segment_fixed_size: +(\d+)", text)[0])
        matrix, narrow = (len(re.findall(name, text)) for name in ("v_mfma_", r"(?:global|buffer)_load_(?:u?short)"))
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [NVIDIA_TOOLS / "cuobjdump", "--dump-resource-usage", "-sass", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spilled = (int(re.findall(rf" {kind}:(\d+)", text)[0]) for kind in ("REG", "STACK"))
        matrix, narrow = (len(re.findall(name, text)) for name in (r"\s(?:H|HG|UTCH)MMA[. ]", r"LDG\.E\.U16"))
    name = launch.kernel.__name__
    return Cost(case, name, threads, compiled.metadata.shared, registers, spilled, matrix, narrow, overwritten)


ROWS, FEATURES = 64 * 197, 384


class Cases:
    """What the rule can choose, as calls of the host code: sizes of DeiT-Small, 64 images."""

    def __init__(self, target: config.Target, dtype: torch.dtype) -> None:
        self.target, self.dtype = target, dtype
        self.x = self.empty(ROWS, FEATURES)

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)

    def order(self, n: int) -> Tensor:
        return torch.arange(n, dtype=torch.int32)

    def linear(self, outputs: int, inputs: int, out_features: int, **parts: Any) -> PackedLinear:
        vector = torch.empty(outputs)
        for part in ("bias", "row_sum", "scale"):
            if parts.get(part):
                parts[part] = vector
        return PackedLinear(self.empty(outputs, inputs), out_features, **parts)

    def linears(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each tile with the heaviest prologue and the heaviest epilogue of inference, and gathering where it may."""
        x, n = self.x, FEATURES
        for i, tile in enumerate(config.tile_ladder(self.target, self.x.element_size())):
            size = f"{tile.BLOCK_M}x{tile.BLOCK_N}"
            fc1 = self.linear(960, n, 960, bias=True, row_sum=True, activation="gelu")
            proj = self.linear(n, n, n, bias=True)
            yield f"linear {size} norm gelu", lambda t=tile, p=fc1: p(x, tile=t)
            yield f"linear {size} residual", lambda t=tile, p=proj: p(x, x, tile=t)
            if i > 0 or self.x.dtype == torch.float32:
                fc1 = self.linear(960, 320, 960, bias=True, row_sum=True, activation="gelu", in_cols=self.order(n))
                proj = self.linear(352, n, n, bias=True, scale=True, out_cols=self.order(n))
                yield f"linear {size} norm gather gelu", lambda t=tile, p=fc1: p(x, tile=t)
                yield f"linear {size} residual scatter", lambda t=tile, p=proj: p(x, x, tile=t)

    def layouts(self) -> Iterator[tuple[str, HeadLayout]]:
        device = torch.device("cpu")
        yield "heads 64", HeadLayout.of((64,) * 4, (64,) * 4, device)
        yield "heads 8 to 64", HeadLayout.of((64, 24, 8, 8), (64, 40, 8, 8), device)
        yield "heads 8 to 128", HeadLayout.of((128, 24, 8, 8), (128, 64, 8, 8), device)
        yield "odd heads to 64", HeadLayout.of((63, 24, 7), (63, 40, 9), device)

    def attentions(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        for name, layout in self.layouts():
            stride = layout.qkv_channels if layout.align == 1 else -(-layout.qkv_channels // 16) * 16
            qkv = self.empty(64, 197, stride)
            # 197 tokens fit steps of 32 better, 256 steps of 64; one query takes the narrow tile.
            for tokens, queries in ((197, 197), (256, 256), (197, 1)):
                part = self.empty(64, tokens, stride)
                out = self.empty(64, queries, layout.out_channels)
                yield (
                    f"attention {name}, {queries} of {tokens}",
                    lambda q=part, n=queries, o=out, h=layout: attention(q, h, 0.125, n, out=o),
                )
            out, sums = self.empty(64, 197, layout.out_channels), torch.empty(64, layout.table.shape[0], 197)
            yield (
                f"attention gradient {name}",
                lambda q=qkv, o=out, s=sums, h=layout: attention_gradient(o, q, o, s, h, 0.125),
            )
        norms = (self.empty(64),) * 4
        layout, qkv = next(self.layouts())[1], self.empty(64, 197, 768)
        yield "attention heads 64 with norms", lambda: attention(qkv, layout, 0.125, 197, norms=norms, eps=1e-6)

    def mlps(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        rows = 64 * self.target.processors
        for features in (128, 144, 160, 192, 256):
            x, n_in = self.empty(rows, features), features - 16
            tile = config.fused_mlp_tile(self.target, 2, rows, features)
            assert tile is not None
            plain = PackedMlp(
                self.linear(384, features, 384, bias=True, row_sum=True, activation="gelu"),
                self.linear(features, 384, features, bias=True),
            )
            yield f"mlp {features}", lambda m=plain, x=x, t=tile: m.in_one(x, t)
            if features == 192:
                ragged = PackedMlp(
                    self.linear(
                        384, n_in, 384, bias=True, row_sum=True, activation="gelu", in_cols=self.order(features)
                    ),
                    self.linear(n_in, 384, features, bias=True, scale=True, out_cols=self.order(features)),
                )
                yield "mlp 192 gather scatter", lambda m=ragged, x=x, t=tile: m.in_one(x, t)

    def gradients(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        x, order, statistics = self.x, self.order(FEATURES), torch.empty(ROWS, 2)
        grad = self.empty(ROWS, 960)
        yield "weight gradient", lambda: weight_gradient(grad, x, FEATURES, None, statistics)
        yield "weight gradient without norm", lambda: weight_gradient(grad, x, FEATURES, None, None)
        yield "weight gradient gather", lambda: weight_gradient(grad, x, 320, order, statistics)
        yield "norm gradient", lambda: norm_gradient(x, x, statistics, None)
        yield "norm gradient gather", lambda: norm_gradient(x[:, :320], x, statistics, order)
        yield "epilogue gradient", lambda: epilogue_gradient(x, grad, order.repeat(2), 320, "gelu")
        back = PackedLinear(self.empty(960, FEATURES).t(), FEATURES)
        yield "input gradient", lambda: back(grad)

    def all(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        yield from self.float32()
        yield from self.mlps()

    def float32(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """All but the one-launch MLP, which is for 16 bits."""
        yield from self.linears()
        yield from self.attentions()
        yield from self.gradients()

    def some(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The largest tile of each kind of kernel, for types and GPUs beside the one for which all are compiled."""
        x, n = self.x, FEATURES
        tile = config.tile_ladder(self.target, x.element_size())[0]
        size = f"{tile.BLOCK_M}x{tile.BLOCK_N}"
        fc1 = self.linear(960, n, 960, bias=True, row_sum=True, activation="gelu")
        proj = self.linear(n, n, n, bias=True)
        yield f"linear {size} norm gelu", lambda: fc1(x, tile=tile)
        yield f"linear {size} residual", lambda: proj(x, x, tile=tile)
        attentions = dict(self.attentions())
        for name in (
            "attention heads 64, 197 of 197",
            "attention odd heads to 64, 197 of 197",
            "attention gradient heads 64",
        ):
            yield name, attentions[name]
        if x.element_size() == 2:
            yield from (case for case in self.mlps() if case[0] == "mlp 192")
        yield from (case for case in self.gradients() if case[0].startswith("weight gradient"))

    def tf32(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Products of float32 by tensor cores."""
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        yield from self.linears()
        yield from self.gradients()

    def corners(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Sizes of 1, which Triton makes constants of, and of 0."""
        x, order, norms = self.empty(1, 1), self.order(1), (self.empty(1), None) * 2
        linear, sums = self.linear, torch.empty(1, 1, 1)
        yield "linear 1 to 1, norm", lambda: linear(1, 1, 1, bias=True, row_sum=True, activation="silu")(x)
        yield "linear 1 to 1, gather", lambda: linear(1, 1, 1, row_sum=True, in_cols=order)(x)
        yield "linear 1 to 1, scatter", lambda: linear(1, 1, 1, bias=True, scale=True, out_cols=order)(x, x)
        yield "linear 8 to 8", lambda: linear(8, 8, 8)(self.empty(1, 8))  # 1 in units of 8
        yield "linear 1 to 0", lambda: linear(0, 1, 1, bias=True, out_cols=order)(x, x)
        yield "linear 0 to 1", lambda: linear(1, 0, 1, row_sum=True, in_cols=order)(x)
        layout = HeadLayout.of((1,), (1,), torch.device("cpu"))
        qkv, out = self.empty(1, 1, 3), self.empty(1, 1, 1)
        yield "attention 1", lambda: attention(qkv, layout, 1.0, 1, out=out, log_sums=sums, norms=norms, eps=1e-6)
        yield "attention gradient 1", lambda: attention_gradient(out, qkv, out, sums, layout, 1.0)
        yield "weight gradient 1", lambda: weight_gradient(x, x, 1, None, torch.empty(1, 2))
        yield "weight gradient 0", lambda: weight_gradient(x, x, 0, order, None)
        yield "norm gradient 1", lambda: norm_gradient(x, x, torch.empty(1, 2), order)
        yield "epilogue gradient 1", lambda: epilogue_gradient(x, x, order, 1, "relu")


def costs(target_name: str, dtype_name: str, group: str = "all") -> Iterator[Cost]:
    target, gpu = TARGETS[target_name]
    for case, call in getattr(Cases(target, DTYPES[dtype_name]), group)():
        with recording(target) as launches:
            call()
        assert launches, case
        for launch in launches:
            yield cost(case, launch, gpu)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in costs(*sys.argv[1:]):
        print(json.dumps(asdict(line)), flush=True)
