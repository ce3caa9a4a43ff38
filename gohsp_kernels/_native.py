# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries, each once, on first use. Importing the package neither builds nor needs them."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    library = _open(CPU_LIBRARY, "a C++ compiler")
    reason = _missing(library, "gohsp_cpu_missing")
    return Library(None, reason) if reason else library


@functools.cache
def load_cuda() -> Library:
    """Load the CUDA library, likewise. It needs a PyTorch with CUDA, but no GPU."""
    return _open(CUDA_LIBRARY, "nvcc")


@functools.cache
def cuda_missing(device: int) -> str:
    """Why kernels of the CUDA library cannot run on the GPU of this number; empty where they can. Asked once.

    Such as a driver that is older than the library's runtime, or a library that was compiled for other GPUs.
    """
    return _missing(load_cuda(), "gohsp_cuda_missing", device)


def _missing(library: Library, name: str, *arguments: int) -> str:
    """What the library's function of this name says is missing, or why there is no library."""
    if library.path is None:
        return library.reason
    function = getattr(ctypes.CDLL(str(library.path)), name, None)
    if function is None:
        return f"the native library {library.path.name} is of another version; reinstall"
    function.restype = ctypes.c_char_p
    said: bytes = function(*arguments)
    return said.decode()


def _open(name: str, needs: str) -> Library:
    path = Path(__file__).parent / f"{name}.so"
    if not path.exists():
        return Library(None, f"the native library {path.name} was not built; reinstall with {needs} at hand")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Library(None, f"the native library {path.name} does not load: {error}")
    return Library(path)


def function(name: str, result: Any) -> Any:
    """A plain C function of the CPU library.

    Args:
        name: as it is exported.
        result: ctypes type of what it returns.

    Raises:
        RuntimeError: if the library cannot be loaded.
    """
    library = load()
    if not library:
        raise RuntimeError(library.reason)
    found = getattr(ctypes.CDLL(str(library.path)), name)
    found.restype = result
    return found


@functools.cache
def numbers(of: str) -> dict[str, int]:
    """The numbers of one list of csrc/common/wire.h by name, for what Python writes and C++ reads.

    Raises:
        RuntimeError: if the library cannot be loaded.
    """
    names = function("gohsp_names", ctypes.c_char_p)(of.encode())
    return {name: number for number, name in enumerate(names.decode().split())}
