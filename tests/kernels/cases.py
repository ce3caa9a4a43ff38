# SPDX-License-Identifier: Apache-2.0
"""Random heterogeneous operator calls, shared by the kernel tests, whatever the backend."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import cpu
from gohsp_kernels.registry import BACKENDS

OPERATORS = {
    "packed_linear": gk.packed_linear,
    "ragged_attention": gk.ragged_attention,
    "attention_sublayer": gk.attention_sublayer,
    "mlp_sublayer": gk.mlp_sublayer,
}


@dataclass
class Call:
    """One call of a public operator."""

    operator: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str | None = None) -> Tensor:
        return OPERATORS[self.operator](*self.args, **self.kwargs, backend=backend)

    def with_x(self, x: Tensor) -> Call:
        return Call(self.operator, (x, *self.args[1:]), self.kwargs)

    def to(self, dtype: torch.dtype) -> Call:
        def convert(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Call(self.operator, tuple(map(convert, self.args)), {k: convert(v) for k, v in self.kwargs.items()})

    def described(self) -> tuple[Any, Tensor, int | None]:
        """The operator with its arguments, the activations, and the number of queries, as backends are given them."""
        caught: list[tuple[Any, Tensor, int | None]] = []

        def catch(operator: Any, x: Tensor, num_queries: int | None) -> Tensor:
            caught.append((operator, x, num_queries))
            return x

        with mock.patch.object(BACKENDS["reference"], "run", catch):
            self.run("reference")
        return caught[0]

    def flat(self) -> tuple[Any, ...]:
        """The arguments in the order of the operator's schema."""
        operator, x, num_queries = self.described()
        return (x, *operator.flat(num_queries))

    def tensors(self) -> list[Tensor]:
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the truth; infinite where ``result`` is not finite."""
    assert result.shape == truth.shape
    if not torch.isfinite(result).all():
        return float("inf")
    return float((result.double() - truth.double()).norm() / truth.double().norm().clamp_min(1e-30))


def run_again(files: Sequence[Path | str], capability: str) -> None:
    """Run test files in a process that is told to use another instruction set; skipped in such a process itself."""
    if os.environ.get("GOHSP_CPU_CAPABILITY") or capability == cpu.capability():
        pytest.skip("this process runs it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files)]
    environment = {**os.environ, "GOHSP_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


class Maker:
    """Draws calls from a seeded generator. Weights are scaled so that results stay near 1."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        return self.normal(outputs, inputs) / max(inputs, 1) ** 0.5

    def columns(self, features: int, kept: int | None) -> Tensor | None:
        """``kept`` ascending columns, or None for all."""
        if kept is None:
            return None
        return torch.randperm(features, generator=self.generator)[:kept].sort().values

    def linear(
        self, leading: tuple[int, ...], features: int, kept_in: int | None, out: int, kept_out: int | None, act: str
    ) -> Call:
        inputs, outputs = features if kept_in is None else kept_in, out if kept_out is None else kept_out
        kwargs = {
            "in_cols": self.columns(features, kept_in),
            "out_cols": self.columns(out, kept_out),
            "out_features": out,
            "activation": act,
        }
        args = (self.normal(*leading, features), self.weight(outputs, inputs), self.normal(outputs))
        return Call("packed_linear", args, kwargs)

    def qk_norm(self, width: int) -> dict[str, Tensor]:
        names = ("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias")
        return {name: self.normal(width) for name in names}

    def attention(self, batch: int, tokens: int, qk: list[int], v: list[int], **kwargs: Any) -> Call:
        qkv = self.normal(batch, tokens, 2 * sum(qk) + sum(v))
        return Call("ragged_attention", (qkv, qk, v, 0.25), kwargs)

    def attention_sublayer(
        self,
        batch: int,
        tokens: int,
        features: int,
        qk: list[int],
        v: list[int],
        kept_in: int | None = None,
        kept_out: int | None = None,
        **kwargs: Any,
    ) -> Call:
        channels = 2 * sum(qk) + sum(v)
        inputs, outputs = (features if kept is None else kept for kept in (kept_in, kept_out))
        args = (
            self.normal(batch, tokens, features),
            self.normal(features),
            self.normal(features),
            self.weight(channels, inputs),
            self.normal(channels),
            self.weight(outputs, sum(v)),
            self.normal(outputs),
        )
        layout = {
            "qk_widths": qk,
            "v_widths": v,
            "scale": 0.25,
            "layer_scale": self.normal(outputs),
            "in_cols": self.columns(features, kept_in),
            "out_cols": self.columns(features, kept_out),
        }
        return Call("attention_sublayer", args, {**layout, **kwargs})

    def mlp_sublayer(
        self,
        leading: tuple[int, ...],
        features: int,
        hidden: int,
        kept_in: int | None = None,
        kept_out: int | None = None,
        **kwargs: Any,
    ) -> Call:
        inputs, outputs = (features if kept is None else kept for kept in (kept_in, kept_out))
        args = (
            self.normal(*leading, features),
            self.normal(features),
            self.normal(features),
            self.weight(hidden, inputs),
            self.normal(hidden),
            self.weight(outputs, hidden),
            self.normal(outputs),
        )
        layout = {
            "layer_scale": self.normal(outputs),
            "in_cols": self.columns(features, kept_in),
            "out_cols": self.columns(features, kept_out),
        }
        return Call("mlp_sublayer", args, {**layout, **kwargs})


@st.composite
def kept(draw: st.DrawFn, features: int) -> int | None:
    """A number of kept columns: all (None), none, one, or anything between."""
    return draw(st.one_of(st.none(), st.sampled_from([0, min(1, features)]), st.integers(0, features)))


@st.composite
def calls(draw: st.DrawFn, operator: str) -> Call:
    """A call of ``operator`` with ragged sizes, any of which may be zero."""
    maker = Maker(draw(st.integers(0, 2**31)))
    batch, tokens = draw(st.sampled_from([0, 1, 2, 3, 7])), draw(st.sampled_from([1, 2, 5, 17, 50, 67]))
    features = draw(st.sampled_from([1, 3, 16, 24, 61, 64, 192]))
    activation = draw(st.sampled_from(sorted(gk.ACTIVATIONS)))
    if operator == "packed_linear":
        out = draw(st.sampled_from([1, 8, 31, 64, 100]))
        return maker.linear((batch, tokens), features, draw(kept(features)), out, draw(kept(out)), activation)
    if operator == "mlp_sublayer":
        hidden = draw(st.sampled_from([0, 1, 15, 16, 33, 100]))
        return maker.mlp_sublayer(
            (batch, tokens), features, hidden, draw(kept(features)), draw(kept(features)), activation=activation
        )
    heads = draw(st.integers(0, 5))
    v = draw(st.lists(st.sampled_from([0, 1, 7, 8, 16, 31, 64]), min_size=heads, max_size=heads))
    options: dict[str, Any] = {"num_queries": draw(st.sampled_from([None, 1, tokens // 2]))}
    if draw(st.booleans()):
        width = draw(st.sampled_from([1, 8, 24, 33]))
        qk, norms = [width] * heads, maker.qk_norm(width)
    else:
        qk, norms = draw(st.lists(st.sampled_from([0, 1, 5, 8, 33, 64]), min_size=heads, max_size=heads)), {}
    if operator == "ragged_attention":
        return maker.attention(batch, tokens, qk, v, **options, **norms)
    return maker.attention_sublayer(
        batch, tokens, features, qk, v, draw(kept(features)), draw(kept(features)), **options, **norms
    )


def samples() -> dict[str, Call]:
    """One typical call of each public operator."""
    maker = Maker(0)
    return {
        "packed_linear": maker.linear((2, 5), 24, 17, 32, 20, "gelu"),
        "ragged_attention": maker.attention(2, 9, [8, 0, 5], [8, 3, 16]),
        "attention_sublayer": maker.attention_sublayer(2, 9, 24, [8, 0, 5], [8, 3, 16], 17, 20),
        "mlp_sublayer": maker.mlp_sublayer((2, 9), 24, 40, 17, 20),
    }
