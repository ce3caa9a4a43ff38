# SPDX-License-Identifier: Apache-2.0
"""To look into a model while it runs, and to leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def inputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Give a list that receives the input of each of the modules at every call, in the order of the calls."""
    caught: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
            stack.callback(handle.remove)
        yield caught


@contextmanager
def outputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """Give a list that receives the output of each of the modules at every call, in the order of the calls."""
    caught: list[Tensor] = []
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_hook(lambda _, __, output: caught.append(output))
            stack.callback(handle.remove)
        yield caught
