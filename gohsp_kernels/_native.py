# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled library, once, on first use. Importing the package never builds and never fails for want of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

CPU_LIBRARY = "_C_cpu"


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
    path = Path(__file__).parent / f"{CPU_LIBRARY}.so"
    if not path.exists():
        return Library(None, f"the native library {path.name} was not built; reinstall with a C++ compiler at hand")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(None, f"the native library {path.name} does not load: {error}")
    return Library(path)
