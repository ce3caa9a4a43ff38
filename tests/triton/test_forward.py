# SPDX-License-Identifier: Apache-2.0
"""Every operator in Triton's interpreter against the reference in float64: random calls and every edge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gohsp_kernels.triton import config, operators
from gohsp_kernels.triton.attention import HeadLayout
from gohsp_kernels.triton.mlp import pack_mlp
from tests.kernels.cases import OPERATORS, Call, Maker, calls, samples

from .helpers import TOLERANCE, assert_close, check, run

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16]


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """New tensors are filled with NaN, so that an element that is never written, or read too early, shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_calls(operator: str, dtype: torch.dtype, data: st.DataObject) -> None:
    check(data.draw(calls(operator)), dtype)


EDGES: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "no head": ("attention_sublayer", (2, 7, 16, [], []), {}),
    "a head without QK channels": ("attention_sublayer", (2, 7, 16, [0, 4], [4, 4]), {}),
    "a head without V channels": ("attention_sublayer", (2, 7, 16, [4, 4], [0, 4]), {}),
    "no V channel at all": ("attention_sublayer", (2, 7, 16, [4, 4], [0, 0]), {}),
    "no input column, attention": ("attention_sublayer", (2, 7, 16, [4, 4], [4, 4], 0), {}),
    "no output column, attention": ("attention_sublayer", (2, 7, 16, [4, 4], [4, 4], None, 0), {}),
    "no query": ("attention_sublayer", (2, 7, 16, [4], [4]), {"num_queries": 0}),
    "no image": ("attention_sublayer", (0, 7, 16, [4], [4]), {}),
    "one token": ("attention_sublayer", (3, 1, 16, [4], [4]), {}),
    "class token": ("attention_sublayer", (3, 70, 16, [4, 8], [8, 4], 12, 11), {"num_queries": 1}),
    "class and distillation token": ("attention_sublayer", (3, 70, 16, [4, 8], [8, 4], 12, 11), {"num_queries": 2}),
    "heads of every padded width": ("attention", (1, 70, [3, 128, 40, 17], [128, 16, 33, 1]), {}),
    "every width padded to 8 only": ("attention", (1, 40, [8, 128, 40, 16], [120, 16, 32, 24]), {}),
    "one feature": ("mlp_sublayer", ((2, 7), 1, 3), {}),
    "no hidden neuron": ("mlp_sublayer", ((2, 7), 16, 0), {}),
    "no input column, MLP": ("mlp_sublayer", ((2, 7), 16, 12, 0), {}),
    "no output column, MLP": ("mlp_sublayer", ((2, 7), 16, 12, None, 0), {}),
    "no row": ("mlp_sublayer", ((0, 7), 16, 12), {}),
    "leading dimensions": ("mlp_sublayer", ((2, 3, 2, 5), 16, 12), {}),
    "a single row": ("mlp_sublayer", ((), 16, 12), {}),
    "nothing in, nothing out": ("linear", ((3,), 5, 0, 4, 0, "gelu"), {}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edge", EDGES)
def test_edges(edge: str, dtype: torch.dtype) -> None:
    method, args, kwargs = EDGES[edge]
    check(getattr(Maker(7), method)(*args, **kwargs), dtype)


@pytest.mark.slow
def test_the_tokens_of_an_image() -> None:
    """197 tokens, ragged, in the sizes of DeiT-Tiny: the only call here of full length."""
    maker = Maker(8)
    check(maker.attention_sublayer(1, 197, 192, [64, 24, 0], [64, 40, 16], 170, 181), torch.float16)
    check(maker.mlp_sublayer((1, 197), 192, 400, 170, 181), torch.float16)


def test_no_bias_no_norm_no_scale() -> None:
    call = Maker(10).attention_sublayer(2, 7, 16, [4, 4], [4, 4], layer_scale=None)
    x, _, _, qkv_weight, _, proj_weight, _ = call.args
    check(Call("attention_sublayer", (x, None, None, qkv_weight, None, proj_weight, None), call.kwargs))
    call = Maker(10).mlp_sublayer((2, 7), 16, 12, layer_scale=None)
    x, _, _, fc1_weight, _, fc2_weight, _ = call.args
    check(Call("mlp_sublayer", (x, None, None, fc1_weight, None, fc2_weight, None), call.kwargs))


@pytest.mark.parametrize("biased", [False, True])
def test_norms_on_q_and_k(biased: bool) -> None:
    """With an eps that shows, of a width that is padded."""
    maker = Maker(12)
    norms = {name: norm for name, norm in maker.qk_norm(5).items() if biased or name.endswith("weight")}
    check(maker.attention(2, 20, [5, 5], [8, 3], eps=0.5, **norms))
    check(maker.attention_sublayer(2, 20, 16, [5, 5], [8, 3], qk_eps=0.5, **norms))


@pytest.mark.parametrize("name", samples())
def test_non_contiguous_input(name: str) -> None:
    call = samples()[name]
    strided = call.args[0].transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    check(Call(call.operator, (strided, *call.args[1:]), call.kwargs))


def test_nan_in_one_image_stays_there() -> None:
    call = Maker(11).attention_sublayer(3, 7, 16, [4, 4], [4, 4])
    truth = run(call)
    call.args[0][1, 3] = float("nan")
    result = run(call)
    assert result[1].isnan().all()
    assert torch.equal(result[[0, 2]], truth[[0, 2]])


def test_large_scores_do_not_overflow() -> None:
    call = Maker(13).attention(1, 80, [8], [8])
    check(Call(call.operator, (call.args[0] * 100, *call.args[1:]), call.kwargs), tolerance=1e-5)


def test_tiny_layer_scale_survives_float16() -> None:
    """1e-5 on weights of 0.1 is below float16's smallest normal number: it must not be folded into them."""
    call = Maker(14).mlp_sublayer((4, 9), 16, 24)
    call.kwargs["layer_scale"] *= 1e-5
    call.args[0].mul_(1e-5)  # so that the residual does not hide the branch; LayerNorm takes the factor out again
    call.kwargs["eps"] = 1e-20
    check(call, torch.float16)


@pytest.mark.parametrize("tile", [*config.tile_ladder(config.Target("cuda", 90, 132), 2)])
def test_every_tile_of_the_linear_kernel(tile: config.Tile) -> None:
    """More rows, columns and depth than one tile has, and remainders of each."""
    call = Maker(15).linear((150,), 150, 137, 149, 140, "gelu")
    rounded = call.to(torch.float16)
    linear, x, _ = rounded.described()
    packed = operators._pack_linear(linear, x)
    truth = rounded.to(torch.float64).run("reference")
    assert_close(packed(x, tile=tile), truth, TOLERANCE[torch.float16])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("features", "kept_in", "kept_out"),
    [(192, None, None), (192, 170, 181), (130, None, None), (130, 100, 127), (128, 0, None), (256, None, 0)],
)
def test_mlp_in_one_launch(features: int, kept_in: int | None, kept_out: int | None, dtype: torch.dtype) -> None:
    call = Maker(16).mlp_sublayer((50,), features, 75, kept_in, kept_out).to(dtype)
    sublayer, x, _ = call.described()
    packed = pack_mlp(sublayer, x)
    truth = call.to(torch.float64).run("reference")
    result = packed.in_one(x, config.MlpTile(*config.panels(features), 32, 32, 4, 2))
    assert_close(result, truth, TOLERANCE[dtype])


@pytest.mark.parametrize("missing", ["bias", "norm", "scale"])
def test_mlp_in_one_launch_with_parts_missing(missing: str) -> None:
    call = Maker(17).mlp_sublayer((40,), 144, 20)
    sublayer, x, _ = call.described()
    gone = {
        "bias": ("fc1_bias", "fc2_bias", "norm_bias"),
        "norm": ("norm_weight", "norm_bias"),
        "scale": ("layer_scale",),
    }
    sublayer = replace(sublayer, **dict.fromkeys(gone[missing], None))
    arguments = dict(zip((*sublayer.tensor_names, *sublayer.constant_names), sublayer.flat(), strict=True))
    truth = Call("mlp_sublayer", (x,), arguments).to(torch.float64)
    result = pack_mlp(sublayer, x).in_one(x, config.MlpTile(128, 16, 32, 32, 4, 2))
    assert_close(result, truth.run("reference"), TOLERANCE[torch.float32])


def test_wide_models_take_two_launches_and_narrow_ones_one() -> None:
    target = config.Target("cuda", 90, 132)
    assert config.fused_mlp_tile(target, 2, 64 * 197, 192) == config.MlpTile(128, 64, 64, 32, 8, 2)
    for rows, features, itemsize in ((64 * 197, 384, 2), (64 * 197, 96, 2), (197, 192, 2), (64 * 197, 192, 4)):
        assert config.fused_mlp_tile(target, itemsize, rows, features) is None


def test_heads_that_are_too_wide_are_refused() -> None:
    with pytest.raises(ValueError, match="qk_widths, v_widths: wanted heads of at most 128 channels; got 129"):
        HeadLayout.of((129,), (8,), torch.device("cpu"))


def test_changed_parameters_are_noticed() -> None:
    call = Maker(18).mlp_sublayer((2, 7), 16, 12)
    check(call)
    call.args[3].mul_(2)
    check(call)
    check(call, torch.float16)
    check(call)


def test_what_is_summed_and_multiplied_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the statistics load their rows for themselves; one multiprocessor, so that tiles are the largest."""
    monkeypatch.setattr(config.Target, "of", lambda device: config.Target("cuda", 90, 1))
    for kept in (None, 70):
        check(Maker(19).mlp_sublayer((130,), 100, 40, kept), torch.float16)
