# SPDX-License-Identifier: Apache-2.0
"""The native operators under torch's opcheck, on the emulated kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.library import opcheck

from gohsp_kernels import _schemas, cuda
from gohsp_kernels.testing import Maker, samples

from . import helpers  # noqa: F401 (registers the operators)

NATIVE = [name for name in _schemas.NATIVE if name.startswith("cuda_")]


_held: list[torch.Tensor] = []


def native_samples() -> dict[str, tuple[Any, ...]]:
    """Arguments of one call of each native operator."""
    half = {name: call.to(torch.float16).described() for name, call in samples().items()}
    operator, x, _ = half["packed_linear"]
    linear = cuda._pack_linear(operator, x)
    attention, stream, _ = half["attention_sublayer"]
    chain = (cuda.pack_attention(attention, stream), cuda.pack_mlp(half["mlp_sublayer"][0], stream))
    lists = [[getattr(s, part) for s in chain] for part in ("weights", "vectors", "tables", "layout")]
    constants = [c for s in chain for c in s.constants]
    qkv = Maker(1).normal(2, 9, 26 + 27).half()
    heads = cuda._head_table((8, 0, 5), (8, 3, 16), qkv.device)
    _held.extend((qkv, heads))  # the pieces of cuda_checksum are addresses in them
    return {
        "cuda_linear": (x, linear.weights, linear.vectors, linear.tables, linear.layout, 32, False),
        "cuda_attention": (qkv, heads, None, 16, False, 0.2, 1e-6, 27, 9, False),
        "cuda_sublayers": (stream, *lists, constants, False, 5),
        "cuda_checksum": (torch.tensor([[qkv.data_ptr(), 100], [heads.data_ptr(), 8]]),),
    }


def test_every_operator_has_a_fake_and_a_sample() -> None:
    assert set(native_samples()) == set(NATIVE)
    assert set(NATIVE) <= set(_schemas._FAKES)


@pytest.mark.parametrize("name", NATIVE)
def test_opcheck(name: str) -> None:
    opcheck(getattr(torch.ops.gohsp_kernels, name).default, native_samples()[name])
