# SPDX-License-Identifier: Apache-2.0
"""What holds for chains whose weights are rounded, whatever they are rounded to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gohsp_kernels as gk
from gohsp_kernels import _native, chain, cpu
from gohsp_kernels.formats import FORMATS, ROUNDED
from gohsp_kernels.testing import Call, Maker, error

from . import test_bf16, test_int8
from .cases import run_again
from .test_chain import FEATURES, bound

checks = pytest.importorskip("gohsp_kernels._checks", reason="the checks module is not built")
needs_native = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)
each_form = pytest.mark.parametrize("form", ROUNDED)

FLIPPED = 2e-3
"""Tolerance of what follows a norm or a softmax: their last bit decides which way a value is rounded."""


def frozen(calls: list[Call], form: str) -> gk.FrozenChain:
    """As ``SublayerChain.frozen(weights=form)``, on any instruction set."""
    packed = (cpu.pack_sublayer(chain.descriptor(bound(call)), FEATURES, form) for call in calls)
    return gk.FrozenChain(FEATURES, tuple(packed))


@each_form
@pytest.mark.parametrize("inputs", [57, 61])
@pytest.mark.parametrize("capability", checks.capabilities())
def test_what_stands_behind_a_row_does_not_count(capability: str, inputs: int, form: str) -> None:
    """The kernel's own row still holds the longer one of the call before."""
    product = test_int8.product if form == "int8" else test_bf16.product
    maker = Maker(9)
    x, weight, bias = maker.normal(13, inputs), maker.weight(40, inputs), maker.normal(40)
    before = product(capability, x, weight, bias)
    assert product(capability, torch.full((1, 64), float("nan")), torch.ones(1, 64), torch.zeros(1)).isnan().all()
    assert torch.equal(product(capability, x, weight, bias), before)


@needs_native
@each_form
def test_nan_of_an_earlier_call_does_not_leak(form: str) -> None:
    maker = Maker(7)
    calls = [maker.attention_sublayer(0, 0, FEATURES, [8], [8], 17), maker.mlp_sublayer((0,), FEATURES, 31, 9, 20)]
    model, x = frozen(calls, form), maker.normal(3, 20, FEATURES)
    before = model(x)
    poisoned = x.clone()
    poisoned[1] = float("nan")
    result = model(poisoned)
    assert result[1].isnan().any(dim=-1).all() and torch.equal(result[[0, 2]], before[[0, 2]])
    assert torch.equal(model(x), before)


@needs_native
@each_form
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_result_does_not_depend_on_threads_or_batch(form: str, threads: int) -> None:
    maker = Maker(8)
    calls = [maker.attention_sublayer(0, 0, FEATURES, [8, 5], [8, 3]), maker.mlp_sublayer((0,), FEATURES, 64)]
    model, x, before = frozen(calls, form), maker.normal(4, 50, FEATURES), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = model(x)
        for i in range(4):
            assert error(model(x[i : i + 1]), together[i : i + 1].double()) < FLIPPED
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "part", ["rotary positions", "biased scores", "cosines", "a gate", "an inner norm", "RMSNorm", "a norm behind"]
)
def test_every_part_beside_every_format(part: str, form: str) -> None:
    """Each behaves as the format's own description says, between sublayers without any."""
    maker = Maker(12)
    attention: dict[str, Any] = {}
    mlp: dict[str, Any] = {}
    written: tuple[int, ...] = (31, 33)
    if part == "rotary positions":
        attention = {"rope": maker.rope(20, [12, 6, 70]), "rope_pairs": "neighbours"}
    elif part == "biased scores":
        attention = maker.bias(3, 20, 3)
    elif part == "cosines":
        attention = maker.cosine(3)
    elif part == "a norm behind":
        attention = mlp = {"post_norm": True}
        written = ()
    elif part == "a gate":
        mlp = {"activation": "silu", **maker.gate(50, 29)}
    elif part == "an inner norm":
        attention, mlp = maker.inner_norm(17, 24), maker.inner_norm(50, 64)
    else:
        attention = mlp = {"norm": "rms"}
    calls = [
        maker.attention_sublayer(0, 0, FEATURES, [12, 6, 70], [8, 2, 7], 30, *written[:1], **attention),
        maker.mlp_sublayer((0,), FEATURES, 50, 29, *written[1:], **mlp),
        maker.attention_sublayer(0, 0, FEATURES, [5, 11], [8, 2]),
        maker.mlp_sublayer((0,), FEATURES, 64),
    ]
    x = maker.normal(3, 20, FEATURES)
    truth = x.double()
    for call in calls:
        sublayer, attend = chain.descriptor(bound(call)), cpu.reference_attention(form)
        truth = FORMATS[form].reference(sublayer, truth, cpu.activation_levels(), attend)
    limit = 2e-6 if form == "float32" else FLIPPED
    assert error(frozen(calls, form)(x), truth) < limit


@pytest.mark.slow
@pytest.mark.parametrize("capability", checks.capabilities())
def test_other_instruction_sets(capability: str) -> None:
    """This file and those of the forms again."""
    here = Path(__file__)
    run_again([here, here.with_name("test_int8.py"), here.with_name("test_bf16.py")], capability)
