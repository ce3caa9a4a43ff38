# SPDX-License-Identifier: Apache-2.0
"""Lists of columns: what is wrong with one is said before anything runs, the same on every backend."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gohsp_kernels as gk
from gohsp_kernels import descriptors, dispatch

pytestmark = pytest.mark.interpreter

BACKENDS = [name for name in ("reference", "cpu", "triton") if dispatch.can_run(name)]

FEATURES = 16
WANTED = "ascending indices of the 16 features, without repeats"
WRONG: dict[str, tuple[Tensor, str]] = {
    "descending": (torch.tensor([3, 1]), f"{WANTED}; got [3, 1]"),
    "repeated": (torch.tensor([1, 1]), f"{WANTED}; got [1, 1]"),
    "negative": (torch.tensor([-1, 2]), f"{WANTED}; got [-1, 2]"),
    "past the end": (torch.tensor([1, 16]), f"{WANTED}; got [1, 16]"),
    "both": (torch.tensor([1, -1]), f"{WANTED}; got [1, -1]"),
    "of 32 bits": (torch.tensor([1, 3], dtype=torch.int32), "a 1-D int64 tensor; got 1-D torch.int32"),
    "a mask": (torch.ones(FEATURES, dtype=torch.bool), "a 1-D int64 tensor; got 1-D torch.bool"),
    "a matrix": (torch.tensor([[1, 3]]), "a 1-D int64 tensor; got 2-D torch.int64"),
    "a scalar": (torch.tensor(1), "a 1-D int64 tensor; got 0-D torch.int64"),
}


def linear(columns: dict[str, Tensor], features: int = FEATURES) -> Callable[..., Tensor]:
    """Two columns in, two out, of as many features."""
    return partial(
        gk.packed_linear,
        weight=torch.ones(2 if "out_cols" in columns else features, 2 if "in_cols" in columns else features),
        out_features=features,
        **columns,
    )


def attention(columns: dict[str, Tensor], features: int = FEATURES) -> Callable[..., Tensor]:
    return partial(
        gk.attention_sublayer,
        norm_weight=None,
        norm_bias=None,
        qkv_weight=torch.ones(12, 2 if "in_cols" in columns else features),
        qkv_bias=None,
        proj_weight=torch.ones(2 if "out_cols" in columns else features, 4),
        proj_bias=None,
        qk_widths=(4,),
        v_widths=(4,),
        scale=0.5,
        **columns,
    )


def mlp(columns: dict[str, Tensor], features: int = FEATURES) -> Callable[..., Tensor]:
    return partial(
        gk.mlp_sublayer,
        norm_weight=None,
        norm_bias=None,
        fc1_weight=torch.ones(5, 2 if "in_cols" in columns else features),
        fc1_bias=None,
        fc2_weight=torch.ones(2 if "out_cols" in columns else features, 5),
        fc2_bias=None,
        **columns,
    )


def chain(columns: dict[str, Tensor]) -> Callable[..., Tensor]:
    return gk.SublayerChain([mlp({}), attention(columns)])


OPERATORS: dict[str, Callable[..., Any]] = {"linear": linear, "attention": attention, "mlp": mlp, "chain": chain}


def x(features: int = FEATURES) -> Tensor:
    return torch.randn(1, 5, features, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", ["in_cols", "out_cols"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_list_is_one_error_on_every_backend(case: str, operator: str, argument: str, backend: str) -> None:
    cols, wanted = WRONG[case]
    call = OPERATORS[operator]({argument: cols})
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), pytest.raises(ValueError) as caught:
            call(x(), backend=backend)
        assert str(caught.value) == f"{argument}: wanted {wanted}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_list_is_found_before_gradients_are_needed(backend: str) -> None:
    with pytest.raises(ValueError, match="in_cols: wanted ascending indices"):
        linear({"in_cols": torch.tensor([3, 1])})(x().requires_grad_(), backend=backend)


def test_a_wrong_list_made_in_inference_mode_is_found() -> None:
    with torch.inference_mode():
        cols = torch.tensor([3, 1])
        with pytest.raises(ValueError, match="in_cols: wanted ascending indices"):
            linear({"in_cols": cols})(x(), backend="reference")


def test_of_a_long_list_the_place_is_shown() -> None:
    cols = torch.arange(100)
    cols[60] = 7
    with pytest.raises(ValueError, match=r"got \[0, 1, 2, 3, \.\.\., 99\], where 7 follows 59$"):
        gk.packed_linear(torch.ones(1, 200), torch.ones(1, 100), in_cols=cols)
    with pytest.raises(ValueError, match=r"of the 50 features, without repeats; got \[0, 1, 2, 3, \.\.\., 99\]$"):
        gk.packed_linear(torch.ones(1, 50), torch.ones(1, 100), in_cols=torch.arange(100))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_list_is_read_again_only_when_it_changed(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = descriptors._width_needed
    monkeypatch.setattr(descriptors, "_width_needed", lambda cols: read.append(cols) or original(cols))
    cols = torch.tensor([1, 3])
    with mode():
        for features in (FEATURES, 24, FEATURES):  # one reading serves all widths
            mlp({"in_cols": cols, "out_cols": cols}, features)(x(features), backend="reference")
    assert len(read) == 1
    cols[1] = 5
    for _ in range(2):
        mlp({"in_cols": cols}, FEATURES)(x(), backend="reference")
    assert len(read) == 2
    cols[1] = 0
    with pytest.raises(ValueError, match=r"got \[1, 0\]"):
        mlp({"in_cols": cols}, FEATURES)(x(), backend="reference")


def test_lists_without_numbers_are_checked_for_their_shape() -> None:
    """The one kind is on the device "meta", the other are those of a tracer."""
    cols = torch.tensor([1, 3], device="meta")
    assert descriptors._kept("in_cols", cols, FEATURES) == 2
    with pytest.raises(ValueError, match=r"got 1-D torch\.int32"):
        descriptors._kept("in_cols", cols.to(torch.int32), FEATURES)
    with FakeTensorMode() as fake:
        cols = fake.from_tensor(torch.tensor([3, 1]))
        assert descriptors._kept("in_cols", cols, FEATURES) == 2
        with pytest.raises(ValueError, match=r"got 2-D torch\.int64"):
            descriptors._kept("in_cols", cols[None], FEATURES)


@pytest.mark.parametrize("columns", [[3, 1], [1, 1], [-1, 2], [1, 99]])
def test_a_compiled_graph_refuses_wrong_columns_when_it_runs(columns: list[int]) -> None:
    call = mlp({"in_cols": torch.tensor(columns)})
    with pytest.raises(ValueError, match="in_cols: wanted ascending indices of the"):
        torch.compile(call, backend="aot_eager")(x())


def test_the_check_does_not_break_a_compiled_graph() -> None:
    call = mlp({"in_cols": torch.tensor([1, 3]), "out_cols": torch.tensor([0, 2])})
    compiled = torch.compile(lambda x: call(x, backend="reference"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x()), call(x(), backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", ["attention", "mlp"])
def test_the_same_weights_serve_streams_of_different_width(operator: str, backend: str) -> None:
    """Where a sublayer reads and writes some columns, its weights do not tell how wide the stream is."""
    columns = {"in_cols": torch.tensor([1, 3]), "out_cols": torch.tensor([0, 15])}
    call = OPERATORS[operator](columns)
    for features in (16, 24, 16):
        stream = x(features)
        truth = call(stream, backend="reference")
        assert truth.shape == stream.shape
        torch.testing.assert_close(call(stream, backend=backend), truth)
