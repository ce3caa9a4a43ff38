# SPDX-License-Identifier: Apache-2.0
"""A model replayed from CUDA graphs: one launch a call, where launching kernel by kernel would take the time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import dispatch
from ._cache import keeping, read_on
from ._stamp import Stamp

CAPTURABLE = "cuda"  # type of the device that has graphs; PyTorch gives AMD's the same name
WARM_UP = 3
"""Calls before the capture: the first packs weights and compiles kernels, which a capture cannot hold."""


class GraphedModel:
    """``model`` for inference at a few fixed input shapes, each captured in a CUDA graph on its first call.

    For small batches, whose kernels end sooner than the CPU can start the next. Each call compares the content of all
    parameters and buffers with what was captured, and captures the graph anew where one has changed or was exchanged
    for another object; modules that are added or replaced it does not notice. Calls share buffers, so they must not
    overlap: one thread, one stream.

    Args:
        model: a module from one tensor to one tensor, in evaluation mode, that reads nothing back to the CPU.
        max_shapes: how many shapes may be captured. Each holds the memory of its activations.

    Raises:
        TypeError: for anything but a module.
    """

    def __init__(self, model: nn.Module, max_shapes: int = 4) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: wanted a torch.nn.Module; got {type(model).__name__}")
        self.model = model
        self.max_shapes = max_shapes
        # The tables and not what is in them, which load_state_dict(assign=True) exchanges; a list of all parameters
        # made at each call would take as long as a replay.
        self._tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
        self._graphs: dict[tuple[Any, ...], tuple[Stamp, _Graph]] = {}

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """What the model gives for ``x``, in memory of its own, without gradient.

        Raises:
            RuntimeError: in training mode; for a shape beyond ``max_shapes``.
            ValueError: for a tensor that is not on a GPU.
            TypeError: where the model gives something else than a tensor.
        """
        if self.model.training:
            raise RuntimeError("model: wanted evaluation mode, as a graph repeats one forward pass; call model.eval()")
        if x.device.type != CAPTURABLE:
            raise ValueError(f"x: wanted a tensor on {CAPTURABLE}, as only a GPU has graphs; got one on {x.device}")
        key = (x.shape, x.dtype, x.device, dispatch.selected())
        captured = self._graphs.get(key)
        if captured is not None:
            # Replayed before it is known whether the weights are still these: it writes to buffers of its own and reads
            # memory that the stamp and the graph hold. So the host looks at the weights while the GPU works.
            same = captured[0].begin()
            result = captured[1].replay(x)
            if same(self._tensors()):
                return result
            del result, same, captured, self._graphs[key]  # before the next one asks for its memory
        elif len(self._graphs) >= self.max_shapes:
            known = ", ".join(str(list(shape)) for shape, *_ in self._graphs)
            raise RuntimeError(
                f"x: wanted one of at most max_shapes={self.max_shapes} shapes, those captured being {known}; "
                f"got {list(x.shape)} {x.dtype}. Pad the batch, or raise max_shapes"
            )
        _, graph = self._graphs[key] = (Stamp(self._tensors()), _Graph(self.model, x))
        return graph.replay(x)

    def _tensors(self) -> list[Tensor | None]:
        return [tensor for table in self._tables for tensor in table.values()]


class _Graph:
    """One captured forward pass with its input and output buffers."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        self.input = x.detach().clone()
        with torch.cuda.device(x.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    result = model(self.input)
            torch.cuda.current_stream().wait_stream(stream)
            if not isinstance(result, Tensor):
                raise TypeError(f"model: wanted one that gives a tensor; got {type(result).__name__}")
            del result
            self.graph = torch.cuda.CUDAGraph()
            # The graph reads packed weights by address: they must outlive their place in the cache.
            # In the mode of this thread: one of the process would break when a DataLoader pins memory meanwhile.
            capture = torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local")
            with keeping() as self.packed, capture:
                self.output: Tensor = model(self.input)
            read_on(torch.cuda.current_stream(), self.packed)  # which packed on the other one

    def replay(self, x: Tensor) -> Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output.clone()
