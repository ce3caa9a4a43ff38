# SPDX-License-Identifier: Apache-2.0
"""Compiles Triton kernels for GPUs that are not there, and reads what the binaries cost.

`recording` runs the backend's own host code and notes each launch instead of starting it, so that what is compiled is
what that code would launch: same tile, same argument types, same specialisation of strides and sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

OPTIONS = ("num_warps", "num_stages")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, as the compiler needs it."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {sorted(self.signature.items())} {self.constants} {self.aligned} {self.options}"

    @staticmethod
    def of(kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
        """Specialised as Triton does it: 1 and None are constants, multiples of 16 are known to be such."""
        options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
        assert list(values) == kernel.arg_names, set(kernel.arg_names) ^ set(values)
        constexprs = {kernel.arg_names[p.num] for p in kernel.params if p.is_constexpr}
        signature, constants, aligned = {}, {}, []
        for name, value in values.items():
            if name in constexprs or value is None or (type(value) is int and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    aligned.append(name)
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0:
                    aligned.append(name)
        return Launch(kernel, signature, constants, tuple(aligned), options)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Launches inside the block are noted in the list, each kind once, and not started."""
    launches: dict[str, Launch] = {}

    def note(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launch = Launch.of(kernel, arguments, keywords)
        launches.setdefault(launch.key, launch)
        result.append(launch) if launches[launch.key] is launch else None

    result: list[Launch] = []
    with mock.patch.object(JITFunction, "run", note):
        yield result


@dataclass(frozen=True)
class Budget:
    """What a compiled kernel takes."""

    kernel: str
    target: str
    shared_bytes: int
    registers: int = 0
    spill_bytes: int = 0
    instructions: dict[str, int] = field(default_factory=dict)


def compile_launch(launch: Launch, target: GPUTarget) -> Any:
    index = launch.kernel.arg_names.index
    attributes = {(index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    return triton.compile(source, target=target, options=launch.options)
