# SPDX-License-Identifier: Apache-2.0
"""Sublayers one after another: what a whole encoder is to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import cpu, dispatch
from ._autocast import autocast_dtype, run_in
from ._flops import Macs, telling
from ._watchers import is_counted
from .descriptors import BIASED, ROTARY, AttentionSublayer, MlpSublayer, Sublayer, wrong
from .ops import attention_sublayer, check_queries, mlp_sublayer, run
from .registry import BACKENDS, PackedChain, needs_grad

_KINDS: dict[Callable[..., Tensor], type[Sublayer]] = {
    attention_sublayer: AttentionSublayer,
    mlp_sublayer: MlpSublayer,
}


class SublayerChain:
    """Sublayers applied one after another; the CPU and CUDA backends run them in one call.

    On the CPU the workers wait for each other once a block instead of three times, and images of a batch not at all; on
    a GPU the kernels follow each other without Python between them. Build
    the chain once and call it often: a call then reads the parameters once, to tell whether they have changed.

    Args:
        sublayers: ``functools.partial`` of :func:`attention_sublayer` or :func:`mlp_sublayer` that binds, by keyword,
            all arguments but ``x``, ``num_queries`` and ``backend``. The tensors are held, not copied; a change of
            their values is noticed.

    Raises:
        ValueError: for anything else among the sublayers.
    """

    def __init__(self, sublayers: Sequence[partial[Tensor]]) -> None:
        for sublayer in sublayers:
            if sublayer.func not in _KINDS or sublayer.args:
                raise wrong("sublayers", "partials of attention_sublayer or mlp_sublayer, bound by keyword", sublayer)
        self._sublayers = [descriptor(sublayer) for sublayer in sublayers]
        attentions = [i for i, sublayer in enumerate(self._sublayers) if isinstance(sublayer, AttentionSublayer)]
        self._last_attention = attentions[-1] if attentions else -1
        self._packed: dict[str, PackedChain] = {}
        self._widest = max((sublayer.widest_head for sublayer in self._sublayers), default=0)
        self._parts = frozenset().union(*(sublayer.parts for sublayer in self._sublayers))
        self._placed = [sublayer for sublayer in self._sublayers if not sublayer.parts.isdisjoint((ROTARY, BIASED))]
        self._tensors = [t for sublayer in self._sublayers for t in sublayer.tensors if t is not None]

    def __call__(self, x: Tensor, *, num_queries: int | None = None, backend: str | None = None) -> Tensor:
        """Run the chain.

        Args:
            x: [batch, tokens, features], float.
            num_queries: give the first so many tokens only; the last attention and what follows compute no others.
            backend: name of a backend; None for the selected one.

        Returns:
            [batch, num_queries, features].

        Raises:
            ValueError: for arguments that do not fit together.
            RuntimeError: if the named backend cannot run the call.
        """
        if x.dim() != 3:
            raise wrong("x", "3 dimensions (batch, tokens, features)", f"shape {list(x.shape)}")
        queries = check_queries(num_queries, x.shape[1])
        for sublayer in self._placed:
            sublayer.check_images(x.shape[0], x.shape[1])
        if self._sublayers and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor):
            differentiable = needs_grad((x, *self._tensors))
            rows = x.shape[0] * x.shape[1]
            dtype = autocast_dtype(x)
            chosen = dispatch.choose(
                backend, x.device, dtype or x.dtype, differentiable, self._widest, rows, parts=self._parts
            )
            if not differentiable and chosen != "reference":
                return run_in(dtype, partial(self._on, chosen), x, queries, residual=True)
        return self._one_by_one(x, queries, backend)

    def frozen(self, features: int, weights: str = "float32") -> FrozenChain:
        """The chain as it is now, packed for the CPU backend and free of the tensors that it was made from.

        Args:
            features: width of the residual stream.
            weights: "float32"; "bfloat16": weights in bfloat16, and activations that are rounded to it where they meet
                such weights, and each other in attention; or "int8": weights of 8 bits with one scale an output, and
                activations that become 8 bits row by row where they meet such weights. Norms, softmax, residual and
                sums stay in float32, and with int8 all of attention.

        Raises:
            ValueError: for arguments that do not fit together, or for weights of another name.
            RuntimeError: if the CPU backend cannot run here, or not with such weights.
        """
        support = dispatch.can_run("cpu", weights=weights)
        if not support:
            raise RuntimeError(f"backend 'cpu': {support.reason}")
        for sublayer in self._sublayers:
            sublayer.check(features)
        costs = tuple(Macs.of(s) for s in self._sublayers)
        if weights == "float32":
            return FrozenChain(features, tuple(cpu.packed(s, features) for s in self._sublayers), costs)
        # Not through the cache, which would hold what only the frozen chain needs.
        return FrozenChain(features, tuple(cpu.pack_sublayer(s, features, weights) for s in self._sublayers), costs)

    def _on(self, backend: str, x: Tensor, queries: int) -> Tensor:
        packed = self._packed.get(backend)
        if packed is None or not packed.fits(x):
            packed = BACKENDS[backend].chain(x, self._sublayers)
            if packed is None:
                return self._one_by_one(x, queries, backend)
            self._packed[backend] = packed
        return packed(x, queries)

    def _one_by_one(self, x: Tensor, queries: int, backend: str | None) -> Tensor:
        for i, sublayer in enumerate(self._sublayers):
            sublayer.check(x.shape[2])
            x = run(sublayer, x, backend, queries if i == self._last_attention else x.shape[1])
        return x if self._last_attention >= 0 else x[:, :queries]


@dataclass(frozen=True)
class FrozenChain:
    """Packed sublayers of the CPU backend without the parameters behind them: inference only, half the memory.

    Attributes:
        features: width of the residual stream.
        sublayers: packed.
        costs: of each of them, for those who count.
    """

    features: int
    sublayers: tuple[cpu.PackedSublayer, ...]
    costs: tuple[Macs, ...] = ()

    def __call__(self, x: Tensor, *, num_queries: int | None = None) -> Tensor:
        """Run the chain; arguments and result as :class:`SublayerChain`, x float32 on the CPU."""
        if x.dim() != 3 or x.shape[2] != self.features or x.dtype != torch.float32 or x.device.type != "cpu":
            wanted = f"float32 [batch, tokens, {self.features}] on the cpu"
            raise wrong("x", wanted, f"{x.dtype} {list(x.shape)} on {x.device}")
        queries = check_queries(num_queries, x.shape[1])
        if not self.sublayers:
            return x[:, :queries]
        with telling(self.costs, x) if is_counted() else nullcontext():
            return cpu.run_packed(x, self.sublayers, queries)


def descriptor(sublayer: partial[Tensor]) -> Any:
    """What a partial of a sublayer's function binds, as an object.

    Raises:
        ValueError: it does not bind all arguments but ``x``, ``num_queries``, ``backend`` and those with a default.
    """
    kind = _KINDS[sublayer.func]
    unknown = sublayer.keywords.keys() - {*kind.tensor_names, *kind.constant_names}
    missing = kind.needed_names - sublayer.keywords.keys()
    if unknown or missing:
        wanted = f"a partial of {kind.name} that binds its arguments but x, num_queries and backend"
        got = [f"{name} too" for name in sorted(unknown)] + [f"no {name}" for name in sorted(missing)]
        raise wrong("sublayers", wanted, ", ".join(got))
    return kind.of(sublayer.keywords)
