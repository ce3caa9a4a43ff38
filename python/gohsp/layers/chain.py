# SPDX-License-Identifier: Apache-2.0
"""The blocks of a compressed model as one chain of sublayers."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import gohsp_kernels as gk
from gohsp.layers.compact import PrunedBlock, hook_tables, is_computed
from gohsp.models.registry import find_compact_blocks

log = logging.getLogger("gohsp")


class PrunedBlocks(nn.Sequential):
    """The blocks of a compressed model, which run as one chain of sublayers wherever nothing inside must be called."""

    def forward(self, x: Tensor, num_queries: int | None = None) -> Tensor:
        """Return the output of the last block.

        Args:
            x: [B, N, D].
            num_queries: Give the first so many tokens only; see :class:`PrunedBlock`.

        Returns:
            [B, num_queries or N, D].
        """
        if gk.is_rewritten() or gk.is_counted():  # whoever looks for operations gets all of them
            return self._one_by_one(x, None)[:, :num_queries]
        if torch.compiler.is_compiling() or self.training:
            return self._one_by_one(x, num_queries)
        if x.requires_grad and torch.is_grad_enabled():
            _tell_of_gradients()
        chain = _chains.get(self)
        if chain is None or not chain.is_current():
            chain = _chains[self] = _BlockChain(self)
        return chain.run(x, num_queries) if chain.is_whole() else self._one_by_one(x, num_queries)

    def _one_by_one(self, x: Tensor, num_queries: int | None) -> Tensor:
        blocks = list(self)
        for block in blocks[:-1]:
            x = block(x)
        last = blocks[-1]
        return last(x, num_queries=num_queries) if isinstance(last, PrunedBlock) else last(x)[:, :num_queries]


@cache
def _tell_of_gradients() -> None:
    """Tell, once, whoever evaluates without having said so."""
    log.warning(
        "a model in evaluation mode is called with gradients enabled, which its kernels do not have: PyTorch's own "
        "operations run, and are slower. Where no gradients are wanted, call it under torch.inference_mode() or "
        "torch.no_grad()"
    )


def find_bare_blocks(model: nn.Module) -> list[PrunedBlock]:
    """Return the blocks of a compressed model that are their weights and nothing more.

    Raises:
        ValueError: The model is not compressed, or a hook or an adapter hangs in one of its blocks.
    """
    blocks: list[PrunedBlock] = find_compact_blocks(model)
    for index, block in enumerate(blocks):
        if added := block.what_was_added():
            raise ValueError(
                f"model: blocks.{index}: {added}, which would be lost; wanted nothing but weights. "
                "Remove hooks and merge adapters first"
            )
    return blocks


class _BlockChain:
    """The chain of a sequence of blocks, and what it was made of.

    Looking up some 300 modules and parameters by name takes a millisecond, a twentieth of a small model's time, so it
    is done once. The tables that hold them are remembered, so that whatever is replaced, added or removed is noticed.
    """

    def __init__(self, blocks: PrunedBlocks) -> None:
        members: list[Any] = list(blocks)
        self._is_one = all(
            isinstance(block, PrunedBlock) and block.is_as_made() and block.is_one_chain() for block in members
        )
        self._chain = gk.SublayerChain([s for block in members for s in block.sublayers()] if self._is_one else [])
        self._entries: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._hooks: list[dict[int, Any]] = []
        self._computes = any(is_computed(module) for module in blocks.modules())
        for module in blocks.modules():
            for table in (module._modules, module._parameters, module._buffers):
                self._entries += [(table, name, value) for name, value in table.items()]
                self._sizes.append((table, len(table)))
            own = module.__dict__
            self._entries += [(own, name, own.get(name)) for name in _CONSTANTS]
            if module is not blocks:  # whose own hooks are called as ever
                self._hooks += hook_tables(module)

    def run(self, x: Tensor, num_queries: int | None) -> Tensor:
        """Return the output of the last block."""
        return self._chain(x, num_queries=num_queries)

    def is_current(self) -> bool:
        """Return whether everything is still what the chain was made of."""
        if any(len(table) != size for table, size in self._sizes):
            return False
        return all(table.get(name) is value for table, name, value in self._entries)

    def is_whole(self) -> bool:
        """Return whether the chain does all that calls of the modules would do.

        It calls no hook, and it holds parameters: a weight that is computed from others would stay as it was.
        """
        return self._is_one and not self._computes and not any(self._hooks)


# Plain attributes of the modules that the sublayers are told of, and what would run instead of the class's own code.
_CONSTANTS = ("eps", "scale", "qk_widths", "v_widths", "activation", "rope_pairs", "features", "forward")

# Beside the modules and not in them, so that a copy or a checkpoint of a model does not carry packed weights along.
_chains: WeakKeyDictionary[PrunedBlocks, _BlockChain] = WeakKeyDictionary()
