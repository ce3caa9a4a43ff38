# SPDX-License-Identifier: Apache-2.0
"""What a figure was measured on: the processor, the threads, the instruction set and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

import gohsp_kernels as gk
from gohsp_kernels import cpu


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe() -> dict[str, Any]:
    """The machine and the versions, as plain values for results.json."""
    support = gk.backends()["cpu"]
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": f"native, {cpu.capability()}" if support.ok else f"PyTorch reference ({support.reason})",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")},
    }
