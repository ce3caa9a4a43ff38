# SPDX-License-Identifier: Apache-2.0
"""What tests add to :mod:`gohsp_kernels.testing`: random calls that hypothesis draws, and backends that have no device.

Triton's kernels run in its interpreter, those of CUDA in emulation.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import cpu
from gohsp_kernels.descriptors import (
    BIASED,
    COSINE,
    GATED,
    INNER_NORM,
    NORM_KINDS,
    POST_NORM,
    RMS_NORM,
    ROPE_PAIRS,
    ROTARY,
)
from gohsp_kernels.registry import BACKENDS
from gohsp_kernels.testing import TOLERANCE, Call, Maker, error, poisoned


def run_again(files: Sequence[Path | str], capability: str) -> None:
    """Run test files in a process that is told to use another instruction set; skipped in such a process itself."""
    if os.environ.get("GOHSP_CPU_CAPABILITY") or capability == cpu.capability():
        pytest.skip("this process runs it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *map(str, files)]
    environment = {**os.environ, "GOHSP_CPU_CAPABILITY": capability}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


def run(call: Call, backend: str) -> Tensor:
    """The result; that of the CUDA kernels in emulation, past the choice of the backend, which wants a GPU."""
    if backend != "cuda":
        return call.run(backend)
    importlib.import_module("gohsp_kernels._checks_cuda")  # registers the emulated kernels for tensors on the CPU
    with torch.no_grad():
        return BACKENDS["cuda"].run(*call.described())


def check(call: Call, dtype: torch.dtype, backend: str, *, limit: float | None = None, floor: float = 0.0) -> None:
    """A result in ``dtype`` against the truth for the same rounded numbers. Its memory begins as NaN, x stays alone."""
    rounded = call.to(dtype)
    x = rounded.x.clone()
    with poisoned():
        result = run(rounded, backend)
    assert result.dtype == dtype and result.is_contiguous() and torch.equal(rounded.x, x)
    found, limit = error(result, rounded.truth(), floor), limit or TOLERANCE[dtype]
    assert found <= limit, f"error {found:.2e}, limit {limit:.2e}"


CHOICES = {
    "large": (8, 128, 1),
    "small": (8, 64, 12),
    "few": (8, 32, 108),
    "hopper large": (9, 128, 1),
    "hopper small": (9, 64, 108),
}
"""Compute capability of the GPU, rows of a linear layer's tile, multiprocessors (an attention makes blocks by them)."""


@contextmanager
def choosing(choice: str) -> Iterator[None]:
    """Every product of the emulated CUDA kernels on one tile, whatever its size; as it is where there is no choice."""
    if not choice:
        yield
        return
    checks: Any = importlib.import_module("gohsp_kernels._checks_cuda")
    major, rows, processors = CHOICES[choice]
    before = checks.pretend_capability(major), checks.largest_tile(rows), checks.pretend_processors(processors)
    try:
        yield
    finally:
        checks.pretend_capability(before[0])
        checks.largest_tile(before[1])
        checks.pretend_processors(before[2])


@st.composite
def kept(draw: st.DrawFn, features: int) -> int | None:
    """A number of kept columns: all (None), none, one, or anything between."""
    return draw(st.one_of(st.none(), st.sampled_from([0, min(1, features)]), st.integers(0, features)))


@st.composite
def calls(draw: st.DrawFn, operator: str, parts: Collection[str] = ()) -> Call:
    """A call of ``operator`` with ragged sizes, any of which may be zero, and with some of the parts."""
    maker = Maker(draw(st.integers(0, 2**31)))
    batch, tokens = draw(st.sampled_from([0, 1, 2, 3, 7])), draw(st.sampled_from([1, 2, 5, 17, 50, 67]))
    features = draw(st.sampled_from([1, 3, 16, 24, 61, 64, 192]))
    activation = draw(st.sampled_from(sorted(gk.ACTIVATIONS)))
    if operator == "packed_linear":
        out = draw(st.sampled_from([1, 8, 31, 64, 100]))
        return maker.linear((batch, tokens), features, draw(kept(features)), out, draw(kept(out)), activation)
    if operator == "mlp_sublayer":
        hidden = draw(st.sampled_from([0, 1, 15, 16, 33, 100]))
        inputs = draw(kept(features))
        more = draw(inner_parts(maker, hidden, parts))
        if GATED in parts and draw(st.booleans()):
            more |= maker.gate(hidden, features if inputs is None else inputs)
        return maker.mlp_sublayer(
            (batch, tokens), features, hidden, inputs, draw(written(features, more)), activation=activation, **more
        )
    heads = draw(st.integers(0, 5))
    v = draw(st.lists(st.sampled_from([0, 1, 7, 8, 16, 31, 64]), min_size=heads, max_size=heads))
    options: dict[str, Any] = {"num_queries": draw(st.sampled_from([None, 1, tokens // 2]))}
    if draw(st.booleans()):
        width = draw(st.sampled_from([1, 8, 24, 33]))
        qk, norms = [width] * heads, maker.qk_norm(width)
    else:
        qk, norms = draw(st.lists(st.sampled_from([0, 1, 5, 8, 33, 64]), min_size=heads, max_size=heads)), {}
    if ROTARY in parts and all(width % 2 == 0 for width in qk):
        pairs = draw(st.sampled_from(ROPE_PAIRS))
        options |= {"rope": maker.rope(tokens, qk), "rope_pairs": pairs}
    if BIASED in parts and draw(st.booleans()):
        options |= maker.bias(heads, tokens, draw(st.sampled_from([0, 1, batch])))
    if COSINE in parts and not norms and draw(st.booleans()):
        options |= maker.cosine(heads)
    if operator == "ragged_attention":
        return maker.attention(batch, tokens, qk, v, **options, **norms)
    options |= draw(inner_parts(maker, sum(v), parts))
    columns = draw(kept(features)), draw(written(features, options))
    return maker.attention_sublayer(batch, tokens, features, qk, v, *columns, **options, **norms)


def written(features: int, options: dict[str, Any]) -> st.SearchStrategy[int | None]:
    """A number of columns that are written: all of them in front of a norm."""
    return st.none() if options.get("post_norm") else kept(features)


@st.composite
def inner_parts(draw: st.DrawFn, maker: Maker, width: int, parts: Collection[str]) -> dict[str, Any]:
    """Place and kind of the norms, and a norm in front of the last matrix, of whose features ``width`` are left."""
    found: dict[str, Any] = {}
    if POST_NORM in parts:
        found["post_norm"] = draw(st.booleans())
    if RMS_NORM in parts:
        found["norm"] = draw(st.sampled_from(NORM_KINDS))
    if INNER_NORM in parts and draw(st.booleans()):
        found |= maker.inner_norm(width, width + draw(st.sampled_from([0, 1, 50])) or 1)
    return found
