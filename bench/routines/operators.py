# SPDX-License-Identifier: Apache-2.0
"""The two primitive operators over shapes, awkward ones among them, against the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import gohsp_kernels as gk
from bench.harness.cases import SEED
from bench.harness.compare import BASELINE, Place, ReadyContender, compare
from bench.harness.environment import Settings, version_of
from gohsp_kernels import descriptors
from gohsp_kernels.testing import Call, Maker

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"identity": lambda x: x, "gelu": F.gelu}


@dataclass(frozen=True)
class Linear:
    """A call of packed_linear.

    Attributes:
        batch, tokens: Of x [batch, tokens, features].
        features, inputs: Columns of x, and how many of them are read.
        results, outputs: Columns of the result, and how many of them are written.
        activation: As the operator takes it.
    """

    batch: int
    tokens: int
    features: int
    inputs: int
    results: int
    outputs: int
    activation: str = "identity"

    part = "packed_linear"

    @property
    def label(self) -> str:
        read = f"{self.inputs}/{self.features}" if self.inputs < self.features else f"{self.features}"
        written = f"{self.outputs}/{self.results}" if self.outputs < self.results else f"{self.results}"
        return f"{read} to {written} {self.activation}"

    def call(self) -> Call:
        kept_in, kept_out = _kept(self.inputs, self.features), _kept(self.outputs, self.results)
        leading = (self.batch, self.tokens)
        return Maker(SEED).linear(leading, self.features, kept_in, self.results, kept_out, self.activation)

    def plain(self, call: Call) -> Tensor:
        x, linear = call.x, call.operator
        assert isinstance(linear, descriptors.Linear)
        if linear.in_cols is not None:
            x = x.index_select(-1, linear.in_cols)
        y = _ACTIVATIONS[self.activation](F.linear(x, linear.weight, linear.bias))
        if linear.out_cols is not None:
            y = y.new_zeros(*y.shape[:-1], self.results).index_copy_(-1, linear.out_cols, y)
        return y


@dataclass(frozen=True)
class Attention:
    """A call of ragged_attention.

    Attributes:
        batch, tokens: Of qkv [batch, tokens, channels].
        qk_widths, v_widths: Channels of each head.
        num_queries: Tokens that are computed; None for all.
    """

    batch: int
    tokens: int
    qk_widths: tuple[int, ...]
    v_widths: tuple[int, ...]
    num_queries: int | None = None

    part = "ragged_attention"
    scale = 0.125

    @property
    def label(self) -> str:
        queries = "" if self.num_queries is None else f" {self.num_queries} queries"
        return f"qk {_widths(self.qk_widths)} v {_widths(self.v_widths)}{queries}"

    def call(self) -> Call:
        widths = list(self.qk_widths), list(self.v_widths)
        more = {"scale": self.scale, "num_queries": self.num_queries}
        return Maker(SEED).attention(self.batch, self.tokens, *widths, **more)

    def plain(self, call: Call) -> Tensor:
        widths = (*self.qk_widths, *self.qk_widths, *self.v_widths)
        # SDPA's fast path on the CPU wants four dimensions.
        parts = call.x[:, None].split(widths, dim=-1)
        heads = len(self.qk_widths)
        outputs = [self._head(*parts[head::heads]) for head in range(heads)]
        return torch.cat(outputs, dim=-1)[:, 0]

    def _head(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[-1] == 0:
            q = k = v.new_zeros(*v.shape[:-1], 1)
        return F.scaled_dot_product_attention(q[:, :, : self.num_queries], k, v, scale=self.scale)


CASES: tuple[Linear | Attention, ...] = (
    Linear(1, 197, 384, 384, 768, 768),
    Linear(1, 197, 384, 384, 960, 960, "gelu"),
    Linear(1, 197, 960, 960, 384, 384),
    Linear(8, 197, 384, 384, 960, 960, "gelu"),
    Linear(8, 197, 960, 960, 384, 384),
    Linear(1, 197, 384, 250, 700, 700),
    Linear(1, 197, 700, 700, 384, 250),
    Linear(8, 197, 384, 250, 700, 700, "gelu"),
    Linear(1, 1, 384, 384, 1000, 1000),
    Linear(1, 50, 192, 192, 3, 3),
    Linear(1, 197, 383, 383, 961, 961, "gelu"),
    Linear(1, 1025, 768, 500, 1920, 1919),
    Attention(1, 197, (64,) * 4, (64,) * 4),
    Attention(8, 197, (64,) * 4, (64,) * 4),
    Attention(1, 197, (50, 38, 17, 53), (33, 64, 21, 45)),
    Attention(8, 197, (50, 38, 17, 53), (33, 64, 21, 45)),
    Attention(1, 197, (64,) * 4, (64,) * 4, num_queries=1),
    Attention(1, 49, (0, 1, 64), (7, 64, 1)),
    Attention(1, 1025, (64,) * 3, (48,) * 3),
)


def run(settings: Settings) -> list[str]:
    """Compare gohsp's operators with plain PyTorch on all shapes.

    Returns:
        Names of the contenders that were refused for a wrong result.
    """
    support = gk.can_run("cpu")
    if not support:
        settings.report_left_out(BASELINE, support.reason)
    refused: list[str] = []
    for case in CASES:
        place = Place("kernels", case.label, case.part, case.batch, case.tokens)
        heading = f"{case.part} {case.label}, {case.batch} x {case.tokens} tokens"
        refused += compare(place, contenders(case, bool(support)), settings, heading).refused
    return refused


def contenders(case: Linear | Attention, native: bool) -> list[ReadyContender]:
    """Return plain PyTorch and gohsp's backends on one case."""
    call = case.call()
    expected = case.plain(call.to(torch.float64))
    own_version = version_of("gohsp")

    def on(backend: str) -> Callable[[], Tensor]:
        return lambda: call.run(backend)

    result = [
        ReadyContender("torch", lambda: case.plain(call), expected, torch.__version__),
        ReadyContender("gohsp-reference", on("reference"), expected, own_version),
    ]
    return [*result, ReadyContender(BASELINE, on("cpu"), expected, own_version)] if native else result


def _kept(kept: int, size: int) -> int | None:
    """So many columns at random; None where all are kept."""
    return None if kept == size else kept


def _widths(widths: tuple[int, ...]) -> str:
    return f"{len(widths)}x{widths[0]}" if len({*widths}) == 1 else "+".join(map(str, widths))
