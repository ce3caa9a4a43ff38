# SPDX-License-Identifier: Apache-2.0
"""What only the CUDA kernels have, in emulation: tiles, forms of input, statistics, tensor cores, chains.

A race, an access out of bounds, a read of what nobody wrote: each ends the run with the emulation's Fault.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import cuda
from gohsp_kernels.testing import TOLERANCE, Call, Maker, poisoned, samples
from tests.gohsp_kernels.cases import CHOICES, choosing
from tests.gohsp_kernels.test_chain import bound, chains, one_by_one
from tests.gohsp_kernels.triton.helpers import assert_close

from .helpers import check, checks, run

HALF = torch.float16
DTYPES = list(TOLERANCE)


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """New tensors are filled with NaN, so that an element that is never written, or read too early, shows."""
    with poisoned():
        yield


@pytest.fixture(params=CHOICES)
def choice(request: pytest.FixtureRequest) -> Iterator[str]:
    with choosing(request.param):
        yield request.param


@pytest.mark.parametrize("processors", ["large", "few"])
def test_more_keys_than_fit(processors: str) -> None:
    """Keys and values that shared memory has no room for come in turns, to one warp a tile and to several."""
    with choosing(processors):
        check(Maker(33).attention(1, 270, [24], [40]), HALF)
        check(Maker(33).attention(1, 70, [128], [72]), torch.float32)


@pytest.mark.slow
@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [160, 149])
def test_more_than_one_tile(features: int, dtype: torch.dtype) -> None:
    """More rows, columns and depth than one tile has, and remainders of each."""
    maker = Maker(15)
    check(maker.linear((150,), features, 137, 149, 140, "gelu"), dtype)
    check(maker.linear((130,), features, None, 260, None, "silu"), dtype)
    check(maker.mlp_sublayer((2, 67), features, 200, 100, 131), dtype)


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("form", ["direct", "zeros", "chunks", "copy"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_of_input(form: str, dtype: torch.dtype) -> None:
    """Depths of many steps, so that the pipeline turns over, in each form in which columns are left out."""
    maker = Maker(16)
    call = maker.linear((70,), 416, None if form == "direct" else 300, 72, None, "identity")
    chunks = {"zeros": 52, "chunks": 20, "copy": 52}
    if form != "direct":
        cols = {
            "zeros": torch.arange(416)[torch.arange(416) % 8 < 6],  # every chunk has kept columns
            "chunks": torch.cat([torch.arange(96), torch.arange(320, 384)]),
            "copy": torch.arange(3, 416, 8),  # one column a chunk
        }[form]
        call = call.but(in_cols=cols, weight=maker.weight(72, len(cols)))
    check(call, dtype)
    if dtype == HALF:
        linear, x, _ = call.to(dtype).described()
        layout = cuda._pack_linear(linear, x).layout
        depth, found = int(layout[4]), int(layout[6])
        assert found == {"direct": 0, "zeros": 0, "chunks": 1, "copy": 2}[form]
        assert depth == (7 if form == "copy" else chunks.get(form, 52))


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [8, 24, 200, 264])
def test_statistics_of_the_rows(features: int, dtype: torch.dtype) -> None:
    """From the rows themselves: nobody has left any for the first LayerNorm of a call."""
    check(Maker(17).mlp_sublayer((3, 17), features, 24), dtype)
    check(Maker(17).mlp_sublayer((3, 17), features, 24, features // 2), dtype)


@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_far_from_zero(dtype: torch.dtype) -> None:
    """LayerNorm on the results cancels; at 8 standard deviations from zero nothing may be lost but a few roundings."""
    call = Maker(18).mlp_sublayer((20,), 64, 32, layer_scale=None)
    call.x.add_(8.0)
    result, truth = run(call.to(dtype)), call.to(dtype).truth()
    x = call.to(dtype).x.double()
    assert_close(result.double() - x, truth - x, 5 * TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("dtype", DTYPES)
def test_fragments_are_read_without_bank_conflicts(dtype: torch.dtype) -> None:
    maker = Maker(23)
    calls = [maker.linear((130,), 96, None, 130, None, "relu"), maker.attention(1, 70, [64, 24], [40, 64])]
    calls.append(maker.attention(1, 70, [128], [72]))
    checks.bank_conflicts()
    for call in calls:
        run(call.to(dtype))
        assert checks.bank_conflicts() == 0


def test_tf32_rounds_where_torch_allows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Maker(19).linear((40,), 64, None, 32, None, "identity")
    truth = call.truth()
    monkeypatch.setattr(cuda, "_uses_tf32", lambda: True)
    result = run(call)
    assert_close(result, truth, 1e-3)
    with pytest.raises(AssertionError):
        assert_close(result, truth, 1e-5)
    check(Maker(19).attention(1, 40, [24, 8], [16, 24]), torch.float32, limit=1e-3)


def test_tensor_cores_do_not_mix_the_heads_padding_in() -> None:
    """Heads that begin anywhere, next to channels of other heads that would spoil them."""
    call = Maker(20).attention(2, 37, [3, 7, 1], [5, 1, 9]).to(HALF)
    call.x[..., 3:11] *= 1e3  # other heads' queries and the first head's keys
    check(call, HALF)


# --- chains -----------------------------------------------------------------------------------------------------------
def run_chain(x: Tensor, calls: list[Call], queries: int) -> Tensor:
    chain = gk.SublayerChain([bound(call) for call in calls])
    with torch.no_grad():
        return chain._on("cuda", x, queries)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=chains(), batch=st.sampled_from([0, 1, 3]), tokens=st.sampled_from([1, 7, 30]), data=st.data())
def test_random_chains(calls: list[Call], batch: int, tokens: int, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    queries = data.draw(st.sampled_from([tokens, 1, 0]))
    calls = [call.to(dtype) for call in calls]
    x = Maker(batch).normal(batch, tokens, 40).to(dtype)
    truth = one_by_one(x.double(), calls)[:, :queries]
    # Each sublayer rounds the residual stream once more.
    assert_close(run_chain(x, calls, queries), truth, len(calls) * TOLERANCE[dtype])


@pytest.mark.slow
@pytest.mark.usefixtures("choice")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("features", [64, 192])
@pytest.mark.parametrize("kept_out", [None, 150, 30])
def test_statistics_that_the_writer_of_the_rows_leaves(features: int, dtype: torch.dtype, kept_out: int | None) -> None:
    """In a chain the next LayerNorm takes them where rows are written whole, far from zero and near it."""
    maker, kept = Maker(31), None if kept_out is None else kept_out * features // 192
    calls = [
        call.to(dtype)
        for _ in range(2)
        for call in (
            maker.attention_sublayer(0, 0, features, [16, 8], [8, 16], None, kept),
            maker.mlp_sublayer((0,), features, 40, kept, kept),
        )
    ]
    x = maker.normal(2, 35, features).add_(torch.tensor([[[6.0]], [[0.0]]]))
    x[..., features // 2 :] += 4  # so that means of 32 columns differ
    x = x.to(dtype)
    truth = one_by_one(x.double(), calls)
    assert_close(run_chain(x, calls, 35), truth, len(calls) * TOLERANCE[dtype])


def test_chain_follows_its_parameters_and_its_input() -> None:
    maker = Maker(3)
    calls = [maker.attention_sublayer(0, 0, 40, [8], [8]).to(HALF), maker.mlp_sublayer((0,), 40, 50).to(HALF)]
    x = maker.normal(2, 5, 40).to(HALF)
    chain = gk.SublayerChain([bound(call) for call in calls])
    with torch.no_grad():
        for call in calls:
            chain._on("cuda", x, 5)
            call.operator.key.mul_(2)
            assert_close(chain._on("cuda", x, 5), one_by_one(x.double(), calls), 2 * TOLERANCE[HALF])
        assert chain._on("cuda", x.float(), 5).dtype == torch.float32


# --- what is refused --------------------------------------------------------------------------------------------------
WRONG: dict[str, Any] = {
    "in_cols: wanted ascending indices of the 24 features, without repeats": {"in_cols": torch.arange(17).flip(0)},
    "out_cols: wanted ascending indices of the 24 features, without repeats": {"out_cols": torch.arange(5, 25)},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_columns_give_one_clear_error(message: str) -> None:
    call = Maker(22).mlp_sublayer((2, 5), 24, 8, 17, 20)
    with pytest.raises(ValueError) as error:
        run(call.but(**WRONG[message]))
    assert message in str(error.value)


def test_the_operators_check_what_they_are_given() -> None:
    call = samples()["mlp_sublayer"].to(HALF)
    sublayer, x, _ = call.described()
    packed = cuda.pack_mlp(sublayer, x)
    wrong = partial(cuda.run_packed, num_queries=9)
    with pytest.raises(RuntimeError, match="x: wanted 24 features, for which it was packed; got 23"):
        wrong(x[..., :23], [packed])
    with pytest.raises(RuntimeError, match="x: wanted float16, bfloat16 or float32"):
        wrong(x.double(), [packed])
    with pytest.raises(RuntimeError, match="weights: wanted the dtype of x"):
        wrong(x.bfloat16(), [packed])
    with pytest.raises(RuntimeError, match="num_queries: wanted 0 to 9"):
        cuda.run_packed(x, [packed], 10)
    shorter = cuda.Packed(packed.weights[:-8], packed.vectors, packed.tables, packed.layout, packed.constants)
    with pytest.raises(RuntimeError, match="weights: too short"):
        wrong(x, [shorter])
    longer = cuda.Packed(packed.weights, packed.vectors.repeat(2), packed.tables, packed.layout, packed.constants)
    with pytest.raises(RuntimeError, match="layouts: do not fit the packed weights of sublayer 0"):
        wrong(x, [longer])
