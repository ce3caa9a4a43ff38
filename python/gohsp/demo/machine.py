# SPDX-License-Identifier: Apache-2.0
"""What the demo's figures were measured on: the processor, the threads, the kernels and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import gohsp_kernels as gk
from gohsp_kernels.info import cpu_name, instruction_set


def describe() -> dict[str, Any]:
    """The machine and the versions, as plain values for results.json."""
    support = gk.can_run("cpu")
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": f"native, {instruction_set()}" if support else f"PyTorch reference ({support.reason})",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "numpy")},
    }
