# SPDX-License-Identifier: Apache-2.0
"""What only the Triton kernels have, in Triton's interpreter: tiles, one launch or two, what Hopper does otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from gohsp_kernels.testing import TOLERANCE, Call, Maker, poisoned
from gohsp_kernels.triton import config, operators
from gohsp_kernels.triton.attention import HeadLayout
from gohsp_kernels.triton.mlp import pack_mlp
from tests.gohsp_kernels import cases

from .helpers import assert_close

pytestmark = pytest.mark.interpreter

DTYPES = [torch.float32, torch.float16]


check = partial(cases.check, backend="triton")


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    with poisoned():
        yield


@pytest.mark.parametrize("tile", [*config.tile_ladder(config.Target("cuda", 90, 132), 2)])
def test_every_tile_of_the_linear_kernel(tile: config.Tile) -> None:
    """More rows, columns and depth than one tile has, and remainders of each."""
    call = Maker(15).linear((150,), 150, 137, 149, 140, "gelu")
    rounded = call.to(torch.float16)
    linear, x, _ = rounded.described()
    packed = operators._pack_linear(linear, x)
    truth = rounded.truth()
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
    truth = call.truth()
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
    result = pack_mlp(sublayer, x).in_one(x, config.MlpTile(128, 16, 32, 32, 4, 2))
    assert_close(result, Call(sublayer, x).truth(), TOLERANCE[torch.float32])


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
    check(call, torch.float32)
    call.operator.key.mul_(2)
    check(call, torch.float32)
    check(call, torch.float16)
    check(call, torch.float32)


def test_what_is_summed_and_multiplied_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the statistics load their rows for themselves; one multiprocessor, so that tiles are the largest."""
    monkeypatch.setattr(config.Target, "of", lambda device: config.Target("cuda", 90, 1))
    for kept in (None, 70):
        check(Maker(19).mlp_sublayer((130,), 100, 40, kept), torch.float16)
