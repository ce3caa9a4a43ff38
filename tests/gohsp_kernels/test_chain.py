# SPDX-License-Identifier: Apache-2.0
"""SublayerChain is its sublayers one after another, on every backend."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import _native, chain, cpu
from gohsp_kernels.testing import Call, Maker, error

from .cases import kept

needs_native = pytest.mark.skipif(not _native.load(), reason=_native.load().reason)
FEATURES = 40
bound = Call.bound


def one_by_one(x: Tensor, calls: list[Call]) -> Tensor:
    for call in calls:
        x = call.with_x(x).truth()
    return x


@st.composite
def chains(draw: st.DrawFn) -> list[Call]:
    """Up to six sublayers in any order, heterogeneous."""
    maker, calls = Maker(draw(st.integers(0, 2**31))), []
    for kind in draw(st.lists(st.sampled_from("am"), min_size=1, max_size=6)):
        columns = draw(kept(FEATURES)), draw(kept(FEATURES))
        if kind == "a":
            heads = draw(st.integers(0, 3))
            qk, v = ([draw(st.sampled_from([0, 3, 8, 17])) for _ in range(heads)] for _ in "qv")
            calls.append(maker.attention_sublayer(0, 0, FEATURES, qk, v, *columns))
        else:
            calls.append(maker.mlp_sublayer((0,), FEATURES, draw(st.sampled_from([0, 5, 48])), *columns))
    return calls


@needs_native
@settings(max_examples=60, deadline=None)
@given(calls=chains(), batch=st.sampled_from([0, 1, 2, 5, 9]), tokens=st.sampled_from([1, 7, 30]), data=st.data())
def test_random_chains(calls: list[Call], batch: int, tokens: int, data: st.DataObject) -> None:
    queries = data.draw(st.sampled_from([tokens, 1, 0]))
    x = Maker(batch).normal(batch, tokens, FEATURES)
    result = gk.SublayerChain(list(map(bound, calls)))(x, num_queries=queries, backend="cpu")
    assert error(result, one_by_one(x.double(), calls)[:, :queries]) < 2e-6


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_chain_of_a_small_transformer(backend: str) -> None:
    maker = Maker(1)
    calls = [
        maker.attention_sublayer(0, 0, FEATURES, [8, 8], [8, 8], 30, 31),
        maker.mlp_sublayer((0,), FEATURES, 50, 29, 33),
        maker.attention_sublayer(0, 0, FEATURES, [5, 11, 3], [8, 2, 7]),
        maker.mlp_sublayer((0,), FEATURES, 64),
    ]
    x = maker.normal(3, 20, FEATURES)
    for queries in (None, 2):
        result = gk.SublayerChain(list(map(bound, calls)))(x, num_queries=queries, backend=backend)
        assert error(result, one_by_one(x.double(), calls)[:, :queries]) < 2e-6


@needs_native
def test_chain_that_begins_and_ends_with_two_mlps() -> None:
    """What stands before the first attention reads x, and what follows the last writes the result."""
    maker = Maker(5)
    mlps = [maker.mlp_sublayer((0,), FEATURES, 50, kept_in, 33) for kept_in in (None, 29, 17, None)]
    calls = [*mlps[:2], maker.attention_sublayer(0, 0, FEATURES, [8, 8], [8, 8]), *mlps[2:]]
    x = maker.normal(3, 20, FEATURES)
    for part in (calls, calls[:2]):
        for queries in (None, 2):
            result = gk.SublayerChain(list(map(bound, part)))(x, num_queries=queries, backend="cpu")
            assert error(result, one_by_one(x.double(), part)[:, :queries]) < 2e-6


@needs_native
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_workers_share_images_and_buffers(batch: int) -> None:
    """Calls so long that workers meet in the middle of tasks, and attentions whose keys and values take turns."""
    maker, threads = Maker(6), torch.get_num_threads()
    calls = [maker.attention_sublayer(0, 0, FEATURES, [24, 16, 24], [16, 24, 24]) for _ in range(3)]
    chain, x = gk.SublayerChain(list(map(bound, calls))), maker.normal(batch, 300, FEATURES)
    truth = one_by_one(x.double(), calls)
    try:
        for count in (1, 2, 3, 4) * 4:
            torch.set_num_threads(count)
            assert error(chain(x, backend="cpu"), truth) < 2e-6
    finally:
        torch.set_num_threads(threads)


def test_empty_chain_gives_its_input() -> None:
    x = torch.randn(2, 5, 8)
    assert torch.equal(gk.SublayerChain([])(x, num_queries=3), x[:, :3])


def test_chain_is_differentiable() -> None:
    maker = Maker(2)
    x = maker.normal(2, 5, FEATURES).requires_grad_()
    gk.SublayerChain([bound(maker.mlp_sublayer((0,), FEATURES, 8))])(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


@needs_native
def test_chain_follows_its_parameters_and_its_input() -> None:
    maker = Maker(3)
    calls = [maker.attention_sublayer(0, 0, FEATURES, [8], [8]), maker.mlp_sublayer((0,), FEATURES, 50)]
    x = maker.normal(2, 5, FEATURES)
    for call in calls:
        gk.SublayerChain(list(map(bound, calls)))(x, backend="cpu")
        call.operator.key.mul_(2)
        result = gk.SublayerChain(list(map(bound, calls)))(x, backend="cpu")
        assert error(result, one_by_one(x.double(), calls)) < 2e-6
    with pytest.raises(ValueError, match=r"norm_weight: wanted shape \[39\]; got shape \[40\]"):
        gk.SublayerChain(list(map(bound, calls)))(x[..., :39], backend="cpu")
    packed = [cpu.packed(chain.descriptor(bound(call)), FEATURES) for call in calls]
    with pytest.raises(RuntimeError, match="x: wanted the number of features that sublayer 0 was packed for; got 39"):
        cpu.run_packed(x[..., :39], packed, 5)


@needs_native
def test_wrong_members_give_one_clear_error() -> None:
    maker = Maker(4)
    x = maker.normal(2, 5, FEATURES)
    member = bound(maker.mlp_sublayer((0,), FEATURES, 8))
    with pytest.raises(ValueError, match="sublayers: wanted partials of attention_sublayer or mlp_sublayer"):
        gk.SublayerChain([partial(gk.packed_linear, weight=torch.ones(1, 1))])(x)
    for bound_wrongly, got in (({"backend": "cpu"}, "backend too"), ({"num_queries": 2}, "num_queries too")):
        with pytest.raises(ValueError, match=f"sublayers: wanted a partial of mlp_sublayer that binds .* got {got}"):
            gk.SublayerChain([partial(member, **bound_wrongly)])
    with pytest.raises(ValueError, match=r"sublayers: wanted .* got no fc1_weight, no fc2_weight"):
        gk.SublayerChain([partial(gk.mlp_sublayer)])
    with pytest.raises(ValueError, match=r"fc1_bias: wanted shape \[8\]; got shape \[7\]"):
        gk.SublayerChain([partial(member, fc1_bias=torch.zeros(7))])(x)
    with pytest.raises(ValueError, match="num_queries: wanted 0 to 5"):
        gk.SublayerChain([member])(x, num_queries=6)
    with pytest.raises(ValueError, match="x: wanted 3 dimensions"):
        gk.SublayerChain([member])(x[0])
