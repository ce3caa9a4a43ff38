# SPDX-License-Identifier: Apache-2.0
"""What runs here, and why something does not: ``python -m gohsp_kernels.info``."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from . import _native, _schemas, dispatch


def cpu_name() -> str:
    """Model name of the processor as the system reports it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def instruction_set() -> str:
    """Instruction set of the CPU kernels, or "none" where the native library cannot be loaded."""
    from . import cpu

    return cpu.capability() if _native.load() else "none"


def int8_activations() -> str:
    """How many bits activations have where they meet int8 weights, or "none" without the native library."""
    from . import cpu

    return f"{cpu.activation_levels().bit_length()} bits" if _native.load() else "none"


def bf16_weights() -> str:
    """Whether bfloat16 weights can run here and, where not, why."""
    support = dispatch.can_run("cpu", weights="bfloat16")
    return "yes" if support else f"no: {support.reason}"


def report() -> str:
    """Versions, processor, backends with reasons, and operators, as lines of text."""
    native, cuda = _native.load(), _native.load_cuda()
    lines = [
        f"torch             {torch.__version__}, {torch.get_num_threads()} threads",
        f"processor         {cpu_name()} ({platform.machine()})",
        f"native library    {native.path.name if native.path else native.reason}",
        f"CUDA library      {cuda.path.name if cuda.path else cuda.reason}",
        f"instruction set   {instruction_set()}",
        f"int8 activations  {int8_activations()}",
        f"bfloat16 weights  {bf16_weights()}",
        f"selected backend  {dispatch.selected()} ({dispatch.ENVIRONMENT_VARIABLE} or use_backend)",
        "backends on this machine, in order of preference",
    ]
    for device in ("cpu", "cuda"):
        for name, support in dispatch.backends(device).items():
            lines.append(f"  {device:5} {name:10} {'yes' if support else 'no: ' + support.reason}")
    lines.append("operators")
    lines += [f"  {name:24} {'public' if name in _schemas.PUBLIC else 'native'}" for name in _schemas.SCHEMAS]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
