# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries, each once, on first use. Importing the package neither builds nor needs them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

CPU_LIBRARY = "_C_cpu"
CUDA_LIBRARY = "_C_cuda"


@dataclass(frozen=True)
class Library:
    """A loaded library, or why it is not there. True in a boolean context when loaded."""

    path: Path | None
    reason: str = ""

    def __bool__(self) -> bool:
        return self.path is not None


@functools.cache
def load() -> Library:
    """Load the CPU library; the outcome, good or bad, is kept for the life of the process."""
    return _open(CPU_LIBRARY, "a C++ compiler")


@functools.cache
def load_cuda() -> Library:
    """Load the CUDA library, likewise. It needs a PyTorch with CUDA, but no GPU."""
    return _open(CUDA_LIBRARY, "nvcc")


def _open(name: str, needs: str) -> Library:
    path = Path(__file__).parent / f"{name}.so"
    if not path.exists():
        return Library(None, f"the native library {path.name} was not built; reinstall with {needs} at hand")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(None, f"the native library {path.name} does not load: {error}")
    return Library(path)
