# SPDX-License-Identifier: Apache-2.0
"""Schemas of all torch operators, in one place, each with the function that computes its result's shape.

Two layers. The *public* operators take compact parameters and mean the same on every backend: they are what
``torch.compile`` and ``torch.export`` see. The *native* operators (``cpu_*``, ``cuda_*``) take packed weights, belong
to the compiled libraries and have no meaning without them; public calls reach them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .descriptors import OPERATORS, Descriptor

NAMESPACE = "gohsp_kernels"

PUBLIC = {name: kind.schema() for name, kind in OPERATORS.items()}
"""Schemas of the public operators, by name."""

# Panels are the words of packed matrices, int32. A layout is int64 and begins with what gohsp_cpu_packing() said where
# the panels were packed; elsewhere it is refused. csrc/torch/cpu_ops.cpp has the order of its other numbers.
# widths is int64 [2, heads]: QK widths, then V widths. words are int32 that hold floats, and numbers tell of what:
# norms of q and k, [4, head width]: weight and bias of q, then of k; rotary positions, [2, tokens, pairs];
# biases of scores; factors of cosines, [heads].
NATIVE = {
    "cpu_pack": "(Tensor weight, Tensor? scales, Tensor? bias, int format) -> Tensor",
    "cpu_plan": "(Tensor columns, int features, bool scatter) -> Tensor",
    "cpu_embed": "(Tensor images, Tensor panels, Tensor layout, Tensor base, int[] patch) -> Tensor",
    "cpu_linear": "(Tensor x, Tensor panels, Tensor layout, int out_features) -> Tensor",
    "cpu_attention": (
        "(Tensor qkv, Tensor widths, Tensor words, int[] numbers, float scale, float eps, int v_total, "
        "int num_queries) -> Tensor"
    ),
    "cpu_sublayers": ("(Tensor x, Tensor[] panels, Tensor[] layouts, float[] constants, int num_queries) -> Tensor"),
    # The packed tensors are those of cuda.Packed; heads is int32 [heads, 6], as in csrc/cuda/kernels.h.
    "cuda_linear": (
        "(Tensor x, Tensor weights, Tensor vectors, Tensor tables, Tensor layout, int out_features, bool tf32) "
        "-> Tensor"
    ),
    "cuda_attention": (
        "(Tensor qkv, Tensor heads, Tensor? qk_norm, int widest, bool aligned, float scale, float eps, int v_total, "
        "int num_queries, bool tf32) -> Tensor"
    ),
    "cuda_sublayers": (
        "(Tensor x, Tensor[] weights, Tensor[] vectors, Tensor[] tables, Tensor[] layouts, float[] constants, "
        "bool tf32, int num_queries) -> Tensor"
    ),
    "cuda_checksum": "(Tensor pieces) -> Tensor",
}

SCHEMAS = {**PUBLIC, **NATIVE}

# A public operator compares weights with what was packed, and packs: torch.compile must not put it into a CUDA graph,
# which would go on with weights that are gone, and whose pool of memory must not hold what outlives it.
_TAGS = (torch.Tag.cudagraph_unsafe,)

_FAKES: dict[str, Callable[..., Tensor]] = {}


def _fake(*names: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def remember(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        _FAKES.update(dict.fromkeys(names, function))
        return function

    return remember


def _fake_of(kind: type[Descriptor]) -> Callable[..., Tensor]:
    def fake(x: Tensor, *rest: Any) -> Tensor:
        operator, num_queries = kind.from_flat(rest)
        return x.new_empty(operator.shape_of_result(x.shape, num_queries))

    return fake


_FAKES.update({name: _fake_of(kind) for name, kind in OPERATORS.items()})


@_fake("cpu_sublayers", "cuda_sublayers")
def _cpu_sublayers(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], rest[-1], x.shape[2])


@_fake("cpu_linear")
def _cpu_linear(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-1])


@_fake("cuda_linear")
def _cuda_linear(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], rest[-2])


@_fake("cpu_embed")
def _cpu_embed(images: Tensor, panels: Tensor, layout: Tensor, base: Tensor, patch: object) -> Tensor:
    return images.new_empty(images.shape[0], *base.shape)


@_fake("cpu_attention")
def _cpu_attention(qkv: Tensor, *rest: Any) -> Tensor:
    v_total, num_queries = rest[-2:]
    return qkv.new_empty(qkv.shape[0], num_queries, v_total)


@_fake("cuda_attention")
def _cuda_attention(qkv: Tensor, *rest: Any) -> Tensor:
    v_total, num_queries = rest[-3:-1]
    return qkv.new_empty(qkv.shape[0], num_queries, v_total)


@_fake("cuda_checksum")
def _cuda_checksum(pieces: Tensor) -> Tensor:
    return pieces.new_empty(pieces.shape[0])


# The true sizes depend on the instruction set that the library picked; nothing that is traced packs weights.
@_fake("cpu_pack")
def _cpu_pack(weight: Tensor, scales: Tensor | None, bias: Tensor | None, format: int) -> Tensor:
    return weight.new_empty(weight.shape[0] * (weight.shape[1] + 1), dtype=torch.int32)


@_fake("cpu_plan")
def _cpu_plan(columns: Tensor, features: int, scatter: bool) -> Tensor:
    return columns.new_empty(1 + features)


def _checked(name: str, fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``fake``, which refuses tensors on "meta" beside others: torch sends such a call here, not to the kernels, and
    the result would be memory that nobody wrote. That of a native operator refuses ONNX export, which has no such."""

    @functools.wraps(fake)
    def checked(*arguments: Any) -> Tensor:
        if name in NATIVE and torch.onnx.is_in_onnx_export():
            raise RuntimeError(
                f"{name}: ONNX knows nothing of packed weights; export gohsp.densify of the model that is not frozen"
            )
        found = {t.device.type for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)}
        if "meta" in found and len(found) > 1:
            raise RuntimeError(f"tensors: wanted all on one device; got some on {' and '.join(sorted(found))}")
        return fake(*arguments)

    return checked


def register(implementations: dict[str, Callable[..., Tensor]]) -> torch.library.Library:
    """Define every operator and its fake; give the public ones their implementation, the same for all devices."""
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=_TAGS if name in PUBLIC else ())
        torch.library.register_fake(f"{NAMESPACE}::{name}", _checked(name, _FAKES[name]), lib=library)
    for name in PUBLIC:
        library.impl(name, implementations[name], "CompositeExplicitAutograd")
    return library
