# SPDX-License-Identifier: Apache-2.0
"""The kernels touch nothing but the elements of their tensors.

Two ways. Every address that the interpreter reads or writes is looked up among those of the launch's arguments, so that
an element too many shows even where its value has no effect. And each tensor lies in memory full of NaN, which may
neither get in nor go.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from gohsp_kernels.testing import Maker
from gohsp_kernels.triton import config
from gohsp_kernels.triton.attention import HeadLayout, attention
from gohsp_kernels.triton.attention_backward import attention_gradient
from gohsp_kernels.triton.linear import PackedLinear
from gohsp_kernels.triton.linear_backward import epilogue_gradient, norm_gradient, weight_gradient
from gohsp_kernels.triton.mlp import PackedMlp
from gohsp_kernels.triton.packing import column_order

pytestmark = pytest.mark.interpreter

CPU = torch.device("cpu")
ROWS, FEATURES, INPUTS, OUTPUTS = 37, 45, 33, 29


def addresses(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Address of every element."""
    found = torch.tensor(tensor.data_ptr())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        found = found[..., None] + torch.arange(size) * stride * tensor.element_size()
    return found.flatten().numpy()


class Watch:
    """Stands before the interpreter's memory and refuses what does not belong to an argument of the launch."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.allowed = np.zeros(1, np.int64)  # ascending
        self.accesses = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.memory, name)

    def look(self, pointers: Any, mask: Any) -> None:
        touched = pointers[mask].astype(np.int64)
        self.accesses += touched.size
        at = np.searchsorted(self.allowed, touched).clip(max=self.allowed.size - 1)
        strange = self.allowed[at] != touched
        assert not strange.any(), f"{strange.sum()} of {touched.size} addresses belong to no argument"

    def load(self, pointers: Any, mask: Any, *rest: Any) -> Any:
        self.look(pointers, mask)
        return self.memory.load(pointers, mask, *rest)

    def store(self, pointers: Any, value: Any, mask: Any) -> Any:
        self.look(pointers, mask)
        return self.memory.store(pointers, value, mask)


@pytest.fixture(autouse=True)
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    watch = Watch(interpreter._interpreter)
    monkeypatch.setattr(interpreter, "_interpreter", watch)
    start = interpreter.GridExecutor.__call__

    def launch(self: Any, *arguments: Any, **keywords: Any) -> None:
        watch.allowed = np.unique(np.concatenate([addresses(a) for a in arguments if isinstance(a, Tensor)]))
        start(self, *arguments, **keywords)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    yield watch


class Guard:
    """Memory full of NaN around every tensor that it hands out."""

    def __init__(self) -> None:
        self.memories: list[tuple[Tensor, Tensor]] = []

    def around(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` [..., n] whose rows of n are 16 numbers apart, with 64 numbers before and after."""
        *leading, n = tensor.shape
        rows = tensor.numel() // max(n, 1)
        stride = n + 16 if len(leading) else n
        memory = torch.full((64 + rows * stride + 64,), float("nan"), dtype=tensor.dtype)
        inside = memory[64 : 64 + rows * stride].view(rows, stride)[:, :n]
        inside.copy_(tensor.reshape(rows, n))
        outside = torch.ones_like(memory, dtype=torch.bool)
        outside[64 : 64 + rows * stride].view(rows, stride)[:, :n] = False
        self.memories.append((memory, outside))
        return inside.view(n) if not leading else inside.unflatten(0, leading) if len(leading) > 1 else inside

    def check(self, *results: Tensor) -> None:
        assert all(torch.isfinite(result).all() for result in results)
        assert all(memory[outside].isnan().all() for memory, outside in self.memories)


def order(features: int, kept: int) -> Tensor:
    result = column_order(Maker(1).columns(features, kept), features)
    assert result is not None
    return result


@pytest.mark.parametrize("tile", [config.Tile(64, 64, 64, 4, 1), config.Tile(16, 16, 16, 4, 1)])
@pytest.mark.parametrize(("norm", "scatter"), [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("gather", [False, True])
def test_linear(gather: bool, norm: bool, scatter: bool, tile: config.Tile) -> None:
    guard, maker = Guard(), Maker(2)
    inputs, written = INPUTS if gather else FEATURES, 50 if scatter else OUTPUTS
    vectors = {name: guard.around(maker.normal(OUTPUTS)) for name in ("bias", "scale")}
    linear = PackedLinear(
        guard.around(maker.weight(OUTPUTS, inputs)),
        written,
        row_sum=guard.around(maker.normal(OUTPUTS)) if norm else None,
        in_cols=order(FEATURES, INPUTS) if gather else None,
        out_cols=order(50, OUTPUTS) if scatter else None,
        eps=1e-6,
        activation="gelu",
        **vectors,
    )
    x, residual, out = (guard.around(maker.normal(ROWS, n)) for n in (FEATURES, written, written))
    statistics = guard.around(maker.normal(2 * ROWS)).view(ROWS, 2)
    pre_activation = guard.around(maker.normal(ROWS * OUTPUTS)).view(ROWS, OUTPUTS)
    linear(x, residual, out=out, pre_activation=pre_activation, statistics=statistics if norm else None, tile=tile)
    guard.check(out, pre_activation, statistics)


def test_rows_that_are_loaded_again_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits, in a tile that has more rows than there are."""
    monkeypatch.setattr(config.Target, "of", lambda device: config.Target("cuda", 90, 1))
    guard, maker = Guard(), Maker(8)
    weight = guard.around(maker.weight(OUTPUTS, FEATURES).half())
    linear = PackedLinear(weight, OUTPUTS, row_sum=guard.around(maker.normal(OUTPUTS)), eps=1e-6)
    x, residual, out = (guard.around(maker.normal(ROWS, n).half()) for n in (FEATURES, OUTPUTS, OUTPUTS))
    linear(x, residual, out=out, tile=config.Tile(64, 64, 64, 4, 1))
    guard.check(out)


def test_linear_without_outputs() -> None:
    """Every column is one that nothing is added to."""
    guard, maker = Guard(), Maker(7)
    linear = PackedLinear(guard.around(maker.weight(0, FEATURES)), 50, out_cols=order(50, 0))
    residual, out = (guard.around(maker.normal(ROWS, 50)) for _ in range(2))
    linear(guard.around(maker.normal(ROWS, FEATURES)), residual, out=out, tile=config.Tile(16, 16, 16, 4, 1))
    guard.check(out)
    assert torch.equal(out, residual)


LAYOUTS = [((5, 16, 0, 40), (7, 16, 33, 1)), ((8, 16, 24), (16, 8, 40))]


@pytest.mark.parametrize("tile", [config.AttentionTile(16, 32, 4, 1), config.AttentionTile(64, 16, 4, 1)])
@pytest.mark.parametrize(("widths", "queries"), list(product(LAYOUTS, (21, 2))))
def test_attention(widths: tuple[tuple[int, ...], tuple[int, ...]], queries: int, tile: config.AttentionTile) -> None:
    guard, maker, layout = Guard(), Maker(3), HeadLayout.of(*widths, CPU)
    qkv = guard.around(maker.normal(2, 21, layout.qkv_channels))
    out = guard.around(maker.normal(2, queries, layout.out_channels))
    heads = layout.table.shape[0]
    log_sums = guard.around(maker.normal(2 * heads * queries)).view(2, heads, queries)
    attention(qkv, layout, 0.3, queries, out=out, log_sums=log_sums, tile=tile)
    guard.check(out, log_sums)


@pytest.mark.slow
@pytest.mark.parametrize(("widths", "queries"), list(product(LAYOUTS, (40, 2))))
def test_attention_gradient(widths: tuple[tuple[int, ...], tuple[int, ...]], queries: int) -> None:
    guard, maker, layout = Guard(), Maker(4), HeadLayout.of(*widths, CPU)
    channels, heads = layout.qkv_channels, layout.table.shape[0]
    qkv = guard.around(maker.normal(2 * 40 * channels)).view(2, 40, channels)
    out, grad_out = (guard.around(maker.normal(2, queries, layout.out_channels)) for _ in range(2))
    log_sums = guard.around(maker.normal(2 * heads * queries).abs() + 9).view(2, heads, queries)
    guard.check(attention_gradient(grad_out, qkv, out, log_sums, layout, 0.3))


@pytest.mark.parametrize("ragged", [False, True])
def test_mlp_in_one_launch(ragged: bool) -> None:
    guard, maker, features, hidden = Guard(), Maker(5), 150, 45
    inputs, outputs = (140, 130) if ragged else (features, features)
    mlp = PackedMlp(
        PackedLinear(
            guard.around(maker.weight(hidden, inputs)),
            hidden,
            bias=guard.around(maker.normal(hidden)),
            in_cols=order(features, inputs) if ragged else None,
            eps=1e-6,
            activation="silu",
        ),
        PackedLinear(
            guard.around(maker.weight(outputs, hidden)),
            features,
            bias=guard.around(maker.normal(outputs)),
            scale=guard.around(maker.normal(outputs)),
            out_cols=order(features, outputs) if ragged else None,
        ),
    )
    x = guard.around(maker.normal(ROWS, features))
    guard.check(mlp.in_one(x, config.MlpTile(128, 32, 32, 32, 4, 1)))


@pytest.mark.parametrize("gather", [False, True])
def test_linear_gradients(gather: bool) -> None:
    guard, maker = Guard(), Maker(6)
    inputs, in_cols = (INPUTS, order(FEATURES, INPUTS)) if gather else (FEATURES, None)
    grad, x = guard.around(maker.normal(ROWS, OUTPUTS)), guard.around(maker.normal(ROWS, FEATURES))
    statistics = guard.around(maker.normal(2 * ROWS)).view(ROWS, 2)
    weight_grad, bias_grad = weight_gradient(grad, x, inputs, in_cols, statistics)
    guard.check(weight_grad, bias_grad)
    guard.check(norm_gradient(guard.around(maker.normal(ROWS, inputs)), x, statistics, in_cols))
    pre_activation = guard.around(maker.normal(ROWS * inputs)).view(ROWS, inputs)
    guard.check(epilogue_gradient(x, pre_activation, in_cols, inputs, "gelu_tanh"))


def test_numbers_of_a_layout_are_multiples_of_what_it_says() -> None:
    """A false promise would make a GPU read at addresses that it cannot read from; the interpreter does not care."""
    for qk, v in [*LAYOUTS, ((8, 8), (8, 4)), ((8, 4), (8, 8)), ((64,), (64,)), ((), ())]:
        layout = HeadLayout.of(qk, v, CPU)
        assert bool((layout.table % layout.align == 0).all())
        assert layout.qkv_channels % layout.align == 0 and layout.out_channels % layout.align == 0
    assert [HeadLayout.of(*widths, CPU).align for widths in LAYOUTS] == [1, 8]


def test_the_watch_counts_and_objects(watch: Watch) -> None:
    maker = Maker(0)
    linear, x, memory = PackedLinear(maker.weight(4, 8), 4), maker.normal(3, 8), torch.empty(3, 4)
    linear(x, out=memory)
    assert watch.accesses == 3 * 8 + 4 * 8 + 3 * 4
    with pytest.raises(interpreter.InterpreterError, match="3 of 12 addresses belong to no argument"):
        linear(x, out=memory[:, :3])
