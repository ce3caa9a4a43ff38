# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs without a GPU: what is called in a capture is noted, and a replay calls it again on the same memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from gohsp_kernels import graphed
from gohsp_kernels.triton import attention, linear, mlp


class StandIn(TorchDispatchMode):
    """A graph: what was called in its capture, to be called again with the same memory in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view and not func._schema.is_mutable:
            self.operations.append(lambda: result.copy_(func(*args, **(kwargs or {}))))
        elif func._schema.is_mutable:
            self.operations.append(lambda: func(*args, **(kwargs or {})))
        return result

    def replay(self) -> None:
        for operation in self.operations:
            operation()


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    """Give CPU tensors graphs. The list gets each graph that is captured."""
    graphs: list[StandIn] = []

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    @contextlib.contextmanager
    def capture(graph: StandIn, stream: object, capture_error_mode: str) -> Iterator[None]:
        graphs.append(graph)
        with graph:
            yield

    def launch(kernel: Any, programs: int, device: Any, *arguments: Any, **meta: Any) -> None:
        def start() -> None:
            with _disable_current_modes():  # the interpreter is written with PyTorch
                kernel[(programs,)](*arguments, **meta)

        start()
        if isinstance(mode := _get_current_dispatch_mode(), StandIn):
            mode.operations.append(start)

    monkeypatch.setattr(graphed, "CAPTURABLE", "cpu")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for module in (attention, linear, mlp):
        monkeypatch.setattr(module, "launch", launch)
    return graphs
