# SPDX-License-Identifier: Apache-2.0
"""What ``torch.utils.flop_counter`` counts for our operators: two a multiply-accumulate, all tokens in all blocks.

Models that are not frozen run on PyTorch's own operations while somebody counts. Of attention torch leaves out what its
CPU kernel does, for any model; it is counted here as torch counts it elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from .descriptors import OPERATORS, Descriptor


class Macs(NamedTuple):
    """Multiply-accumulates of a sublayer: for each token, and for each pair of tokens of an image."""

    token: int
    pair: int

    @classmethod
    def of(cls, operator: Descriptor) -> Macs:
        """Those of an operator, by its weights and its heads."""
        weights = (t for t in operator.tensors if t is not None and t.dim() == 2)
        widths = (*getattr(operator, "qk_widths", ()), *getattr(operator, "v_widths", ()))
        return cls(sum(w.numel() for w in weights), sum(widths))

    def times(self, rows: int, tokens: int) -> int:
        """Those of so many rows, each a token that meets all tokens of its image."""
        return rows * (self.token + tokens * self.pair)


_work: ContextVar[int] = ContextVar("_work", default=0)


@contextmanager
def telling(costs: Iterable[Macs], x: Tensor) -> Iterator[None]:
    """Tell the counter what the packed sublayers that run in the block do: nothing can be read from panels."""
    batch, tokens, _ = x.shape
    before = _work.set(sum(cost.times(batch * tokens, tokens) for cost in costs))
    try:
        yield
    finally:
        _work.reset(before)


def _of_sublayers(*args: Any, **kwargs: Any) -> int:
    return 2 * _work.get()


def _of_linear(x: Tensor, panels: Tensor, layout: Tensor, out_features: int, **kwargs: Any) -> int:
    _, outputs, _, inputs = layout[:4].tolist()  # the last is -1 where all columns are read
    return 2 * x[..., 0].numel() * outputs * (x.shape[-1] if inputs < 0 else inputs)


def _of_embedding(images: Tensor, panels: Tensor, layout: Tensor, base: Tensor, patch: Any, **kwargs: Any) -> int:
    height, width = patch
    patches = (images.shape[2] // height) * (images.shape[3] // width)
    return 2 * images.shape[0] * patches * images.shape[1] * height * width * base.shape[1]


def _of_public(kind: type[Descriptor]) -> Any:
    def formula(x: Tensor, *flat: Any, **kwargs: Any) -> int:
        operator, _ = kind.from_flat(flat)
        return 2 * Macs.of(operator).times(x[..., 0].numel(), x.shape[-2])

    return formula


def _of_cpu_attention(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def register() -> None:
    """Register the formulas with torch's counter."""
    ops = torch.ops.gohsp_kernels
    register_flop_formula(ops.cpu_sublayers, get_raw=True)(_of_sublayers)
    register_flop_formula(ops.cpu_linear, get_raw=True)(_of_linear)
    register_flop_formula(ops.cpu_embed, get_raw=True)(_of_embedding)
    for name, kind in OPERATORS.items():
        register_flop_formula(getattr(ops, name), get_raw=True)(_of_public(kind))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if attention not in flop_registry:
        register_flop_formula(attention)(_of_cpu_attention)
