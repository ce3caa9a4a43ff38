# SPDX-License-Identifier: Apache-2.0
"""Calls that reach every tile, form of input and way out of the GPU kernels, and how one is judged.

tests/gohsp_kernels/test_gpu_cases.py counts what they reach on a pretended H100, without computing them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import testing
from .chain import SublayerChain
from .testing import Call, Maker

Row = dict[str, Any]

ELEMENT = 12
"""An element may be off by so many times the limit of its precision, in units of its row's root mean square."""

error_of = partial(testing.error, floor=1.0)


@dataclass(frozen=True)
class Chain:
    """Sublayers one after another as one call, with what :class:`gohsp_kernels.testing.Call` has for one operator."""

    calls: tuple[Call, ...]
    x: Tensor
    num_queries: int | None = None

    def run(self, backend: str | None = None) -> Tensor:
        chain = SublayerChain([call.bound() for call in self.calls])
        return chain(self.x, num_queries=self.num_queries, backend=backend)

    def with_x(self, x: Tensor) -> Chain:
        return dataclasses.replace(self, x=x)

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Chain:
        calls = tuple(call.to(dtype, device) for call in self.calls)
        return dataclasses.replace(self, calls=calls, x=self.x.to(device, dtype))

    def truth(self) -> Tensor:
        return self.to(torch.float64).run("reference")


Draw = Callable[[Maker], Call | Chain]

RAGGED = [64, 24, 0, 40], [64, 40, 16, 8]
RAGGED_SMALL = [16, 8, 0, 12], [16, 12, 8, 8]


def _chain(
    m: Maker, batch: int, tokens: int, features: int, hidden: int, *keep: str, queries: int | None = None
) -> Chain:
    """Two blocks. What is not pruned leaves statistics for the next product; scattered columns leave none."""
    calls, widths = [], [min(64, features // 4)] * 4
    for _ in range(2):
        calls.append(m.attention_sublayer(0, 0, features, widths, widths, *keep, scale=0.125))
        calls.append(m.mlp_sublayer((0,), features, hidden, *keep))
    return Chain(tuple(calls), m.normal(batch, tokens, features), queries)


def explicit_cases(small: bool = False) -> dict[str, Draw]:
    """By name. At the size of real models; or where ``small`` at some of it, for kernels that are emulated."""
    found: dict[str, Draw] = {}

    def add(name: str, make: Callable[..., Call | Chain], *arguments: Any, **more: Any) -> None:
        found[name] = lambda m: make(m, *arguments, **more)

    tokens, features, hidden, slim = (19, 64, 96, 64) if small else (197, 384, 960, 192)
    ragged = RAGGED_SMALL if small else RAGGED
    for batch in (1,) if small else (1, 64, 8):
        for keep in (("all", "all"), ("chunks", "most"), ("single", "chunks"), ("chunks", "single")):
            name = f"{keep[0]} in, {keep[1]} out, batch {batch}"
            add(f"mlp, {name}", Maker.mlp_sublayer, (batch, tokens), features, hidden, *keep)
            add(f"attention, {name}", Maker.attention_sublayer, batch, tokens, features, *ragged, *keep, scale=0.125)
            add(f"chain, {name}", _chain, batch, tokens, features, hidden, *keep)
        add(f"mlp, {slim} features, batch {batch}", Maker.mlp_sublayer, (batch, tokens), slim, 2 * slim)
        add(f"chain for a class token, batch {batch}", _chain, batch, tokens, features, hidden, "all", "all", queries=1)
        add(f"chain of {slim + 8} features, batch {batch}", _chain, batch, tokens, slim + 8, hidden, "all", "all")
        for odd in (slim - 2, slim - 43):
            add(f"mlp, {odd} features, batch {batch}", Maker.mlp_sublayer, (batch, tokens), odd, hidden)
            keep = "single", "most"
            add(
                f"attention, {odd} features, batch {batch}",
                Maker.attention_sublayer,
                batch,
                tokens,
                odd,
                *ragged,
                *keep,
            )
    if not small:  # tiles between those of the batches above; many columns that are scattered
        add("linear, 5000 rows, 384 to 190, silu", Maker.linear, (5000,), 384, "all", 190, "all", "silu")
        add("mlp, batch 2", Maker.mlp_sublayer, (2, tokens), features, hidden)
        add("attention, batch 2", Maker.attention_sublayer, 2, tokens, features, *ragged, scale=0.125)
        add("chain of 768 features, single out, batch 64", _chain, 64, tokens, 768, hidden, "all", "single")
    _add_linear(add, small)
    _add_attention(add, small, tokens, features)
    return found


def _add_linear(add: Callable[..., None], small: bool) -> None:
    sizes = ((197, 384, 768), (16900, 416, 520), (2049, 149, 137), (1, 768, 1000), (65, 40, 65), (25216, 768, 2304))
    for rows, inputs, outputs in ((70, 72, 137), (1, 40, 65)) if small else sizes:
        for form, written, activation in (
            ("all", "all", "identity"),
            ("chunks", "most", "gelu"),
            ("single", "all", "silu"),
            ("all", "single", "gelu"),
            ("chunks", "single", "identity"),
        ):
            name = f"linear, {rows} rows, {inputs} to {outputs}, {form} in, {written} out, {activation}"
            add(name, Maker.linear, (rows,), inputs, form, outputs, written, activation)


def _add_attention(add: Callable[..., None], small: bool, tokens: int, features: int) -> None:
    for count in (1, 17, 40) if small else (1, 16, 63, 64, 65, 197, 577, 1025):
        for name, qk, v in (
            ("heads to 64", [64, 16, 40, 0], [64, 8, 24, 48]),
            ("heads to 128", [128, 72, 8], [96, 128, 8]),
            ("odd heads", [63, 3, 7], [5, 33, 64]),
            ("wide odd heads", [121, 3], [5, 127]),
        ):
            add(f"{name}, {count} tokens", Maker.attention, 2, count, qk, v, scale=0.125)
    for width in (64, 128, 63, 127):
        for batch in (1,) if small else (1, 64):
            add(
                f"norms on q and k, heads of {width}, batch {batch}",
                lambda m, batch, width: m.attention_sublayer(
                    batch, tokens, features, [width] * 3, [64, 24, 8], scale=0.125, **m.qk_norm(width)
                ),
                batch,
                width,
            )
            add(
                f"norms on q and k of a user's qkv, heads of {width}, batch {batch}",
                lambda m, batch, width: m.attention(
                    batch, tokens, [width] * 2, [64, 31], scale=0.125, **m.qk_norm(width)
                ),
                batch,
                width,
            )
    if not small:
        add("many images of wide heads", Maker.attention, 128, 65, [128] * 2, [128] * 2, scale=0.125)
        add("many images of wide odd heads", Maker.attention, 128, 65, [121] * 2, [127] * 2, scale=0.125)
        add("more blocks than 65535", Maker.attention, 9000, 17, [64] * 8, [64] * 8, scale=0.125)


LARGEST: Mapping[str, Draw] = {
    "a hidden layer beyond 2^31 elements": lambda m: m.mlp_sublayer(
        (1, 560_000), 64, 4096, activation="relu", layer_scale=None
    )
}
"""Alone on a GPU: its truth takes some 40 GB."""


@torch.no_grad()
def judge(call: Call | Chain, backend: str, limit: float) -> Row:
    """A call against the reference in float64, as a whole and element by element, once more, and with x transposed."""
    result, again = call.run(backend), call.run(backend)
    strided = call.with_x(call.x.transpose(-1, -2).contiguous().transpose(-1, -2)).run(backend)
    truth = call.truth()
    error, element = error_of(result, truth), testing.worst_element(result, truth)
    same = torch.equal(result, again) and torch.equal(result, strided)
    ok = error <= limit and element <= ELEMENT * limit and same
    return {"ok": ok, "error": error, "element": element, "same": same}
