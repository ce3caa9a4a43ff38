# SPDX-License-Identifier: Apache-2.0
"""Sublayers one after another: what a whole encoder is to the kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import cpu, cuda, dispatch
from ._autocast import autocast_dtype, run_in
from .ops import attention_sublayer, check_attention, check_mlp, check_queries, mlp_sublayer, wrong

# Tensor arguments of the sublayers but for x, in the order of their schemas.
_ATTENTION_TENSORS = (
    *("norm_weight", "norm_bias", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias", "layer_scale"),
    *("in_cols", "out_cols", "q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias"),
)
_MLP_TENSORS = (
    *("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias", "layer_scale"),
    *("in_cols", "out_cols"),
)


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
            if sublayer.func not in (attention_sublayer, mlp_sublayer) or sublayer.args:
                raise wrong("sublayers", "partials of attention_sublayer or mlp_sublayer, bound by keyword", sublayer)
        self._sublayers = tuple(sublayers)
        attentions = [i for i, sublayer in enumerate(sublayers) if sublayer.func is attention_sublayer]
        self._last_attention = attentions[-1] if attentions else -1
        self._packed: cpu.PackedChain | None = None
        self._packed_gpu: dict[str, cuda.PackedChain] = {}
        widths = ("qk_widths", "v_widths")
        self._widest = max((w for s in sublayers for name in widths for w in s.keywords.get(name, ())), default=0)
        self._tensors = [t for s in sublayers for t in s.keywords.values() if isinstance(t, Tensor)]

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
        if self._sublayers and not torch.compiler.is_compiling() and not isinstance(x, FakeTensor):
            needs_grad = dispatch.needs_grad((x, *self._tensors))
            rows = x.shape[0] * x.shape[1]
            dtype = autocast_dtype(x)
            chosen = dispatch.choose(backend, x.device, dtype or x.dtype, needs_grad, self._widest, rows)
            if chosen == "cpu":
                return self._on_cpu(x, queries)
            if chosen == "cuda" or (chosen == "triton" and not needs_grad):
                return run_in(dtype, partial(self._on_gpu, chosen), x, queries, residual=True)
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
        if weights == "float32":
            return FrozenChain(features, tuple(self._pack(features).current()))
        # Not through the cache, which would hold what only the frozen chain needs.
        return FrozenChain(features, tuple(_describe(features, s).pack(weights) for s in self._sublayers))

    def _pack(self, features: int) -> cpu.PackedChain:
        if self._packed is None or self._packed.features != features:
            self._packed = cpu.PackedChain(features, [_describe(features, s) for s in self._sublayers])
        return self._packed

    def _on_cpu(self, x: Tensor, queries: int) -> Tensor:
        return self._pack(x.shape[2])(x, queries)

    def _on_gpu(self, backend: str, x: Tensor, queries: int) -> Tensor:
        packed = self._packed_gpu.get(backend)
        if packed is None or not packed.fits(x):
            kind = cuda.PackedChain if backend == "cuda" else _triton_chain()
            packed = self._packed_gpu[backend] = kind(x, [_describe(x.shape[2], s) for s in self._sublayers])
        return packed(x, queries)

    def _one_by_one(self, x: Tensor, queries: int, backend: str | None) -> Tensor:
        for i, sublayer in enumerate(self._sublayers):
            if i == self._last_attention:
                x = sublayer(x, num_queries=queries, backend=backend)
            else:
                x = sublayer(x, backend=backend)
        return x if self._last_attention >= 0 else x[:, :queries]


@dataclass(frozen=True)
class FrozenChain:
    """Packed sublayers of the CPU backend without the parameters behind them: inference only, half the memory.

    Attributes:
        features: width of the residual stream.
        sublayers: packed.
    """

    features: int
    sublayers: tuple[cpu.PackedSublayer, ...]

    def __call__(self, x: Tensor, *, num_queries: int | None = None) -> Tensor:
        """Run the chain; arguments and result as :class:`SublayerChain`, x float32 on the CPU."""
        if x.dim() != 3 or x.shape[2] != self.features or x.dtype != torch.float32 or x.device.type != "cpu":
            wanted = f"float32 [batch, tokens, {self.features}] on the cpu"
            raise wrong("x", wanted, f"{x.dtype} {list(x.shape)} on {x.device}")
        queries = check_queries(num_queries, x.shape[1])
        return cpu.run_packed(x, self.sublayers, queries) if self.sublayers else x[:, :queries]


def _triton_chain() -> type[cuda.PackedChain]:
    from .triton.operators import PackedChain  # imports Triton, which a machine without a GPU need not have

    return PackedChain


def _describe(features: int, sublayer: partial[Tensor]) -> cpu.Sublayer:
    """What a partial of a sublayer binds, in the order of the schema."""
    bound = sublayer.keywords
    eps = bound.get("eps", 1e-6)
    if sublayer.func is mlp_sublayer:
        tensors = tuple(map(bound.get, _MLP_TENSORS))
        constants: tuple[Any, ...] = (bound.get("activation", "gelu"), eps)
        return cpu.Sublayer("mlp_sublayer", tensors, constants, partial(check_mlp, features, tensors, constants))
    tensors = tuple(map(bound.get, _ATTENTION_TENSORS))
    widths = (tuple(bound["qk_widths"]), tuple(bound["v_widths"]))
    constants = (*widths, bound["scale"], eps, bound.get("qk_eps", 1e-6))
    check = partial(check_attention, features, tensors, constants)
    return cpu.Sublayer("attention_sublayer", tensors, constants, check)
