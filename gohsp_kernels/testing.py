# SPDX-License-Identifier: Apache-2.0
"""What every check of the operators shares: calls, random and awkward ones, and how far a result may be from the truth.

The truth is the reference in float64 on the same rounded numbers. Used by the tests, by ``gohsp_kernels.gpu_check`` and
by the benchmarks; nothing else imports it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import ops
from .activations import ACTIVATIONS
from .descriptors import NORMS, OPERATORS, Descriptor, wrong


@dataclass(frozen=True)
class Call:
    """One call of a public operator.

    Attributes:
        operator: all arguments but the activations and the number of queries.
        x: the activations (qkv of ``ragged_attention``), shaped as the operator takes them.
        num_queries: of an operator that attends; None for all tokens.
    """

    operator: Descriptor
    x: Tensor
    num_queries: int | None = None

    @classmethod
    def of(cls, operator: str, x: Tensor, num_queries: int | None = None, **arguments: Any) -> Call:
        """The call of an operator by name, with its arguments by name."""
        return cls(OPERATORS[operator].of(arguments), x, num_queries)

    def bound(self) -> partial[Tensor]:
        """The public function with all but the activations and the number of queries: a member of a chain."""
        names = (*self.operator.tensor_names, *self.operator.constant_names)
        return partial(getattr(ops, self.operator.name), **{name: getattr(self.operator, name) for name in names})

    def run(self, backend: str | None = None) -> Tensor:
        """The result, through the public function and its checks."""
        queries = {"num_queries": self.num_queries} if self.operator.attends else {}
        return self.bound()(self.x, **queries, backend=backend)

    def with_x(self, x: Tensor) -> Call:
        """The same on other activations."""
        return dataclasses.replace(self, x=x)

    def but(self, **changes: Any) -> Call:
        """The same with other arguments in the operator's descriptor."""
        kind: Any = self.operator
        return dataclasses.replace(self, operator=dataclasses.replace(kind, **changes))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Call:
        """The same with ``change`` applied to each tensor, lists of columns included."""
        held = {name: getattr(self.operator, name) for name in self.operator.tensor_names}
        held = {name: None if tensor is None else change(tensor) for name, tensor in held.items()}
        return self.but(**held).with_x(change(self.x))

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> Call:
        """The same with floats in ``dtype``, on ``device`` or where it is."""
        return self.mapped(lambda tensor: tensor.to(device, dtype if tensor.is_floating_point() else None))

    def described(self) -> tuple[Any, Tensor, int | None]:
        """The descriptor, checked, the activations, and the number of queries, as backends are given them."""
        self.operator.check(self.x.shape[-1])
        queries = ops.check_queries(self.num_queries, self.x.shape[1]) if self.operator.attends else None
        return self.operator, self.x, queries

    def flat(self) -> tuple[Any, ...]:
        """The arguments in the order of the operator's schema."""
        operator, x, queries = self.described()
        return (x, *operator.flat(queries))

    def tensors(self) -> list[Tensor]:
        """All tensors of floats, the activations first."""
        return [t for t in (self.x, *self.operator.tensors) if t is not None and t.is_floating_point()]

    def truth(self) -> Tensor:
        """The result of the reference in float64, of the dtype float64."""
        return self.to(torch.float64).run("reference")


Kept = int | str | None
"""Which columns are kept: so many at random, one of the forms of :func:`columns`, or all."""


def columns(count: int, form: str) -> Tensor | None:
    """Lists that make each form of input and output (csrc/cuda/kernels.h) of ``count`` columns; None for all of them.

    Args:
        count: of columns.
        form: all; "chunks", of 8 columns whole; "single" ones, every third; "most", all chunks but with holes.
    """
    i = torch.arange(count)
    return {"all": None, "chunks": i[i // 8 % 3 != 1], "single": i[1::3], "most": i[i % 8 != 3]}[form]


def _count(features: int, cols: Tensor | None) -> int:
    return features if cols is None else len(cols)


class Maker:
    """Draws calls from a seeded generator: float32, on the CPU, weights scaled so that results stay near 1.

    Args:
        seed: of the generator.
        largest: number of features, tokens, neurons in :meth:`ragged`.
    """

    def __init__(self, seed: int, largest: int = 512) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.largest = largest

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers of mean 0 and variance 1."""
        return torch.randn(*shape, generator=self.generator)

    def weight(self, outputs: int, inputs: int) -> Tensor:
        """[outputs, inputs], whose product with normal rows has variance 1."""
        return self.normal(outputs, inputs) / max(inputs, 1) ** 0.5

    def columns(self, features: int, kept: Kept) -> Tensor | None:
        """Ascending columns, int64, or None for all."""
        if isinstance(kept, int):
            return torch.randperm(features, generator=self.generator)[:kept].sort().values
        return None if kept is None else columns(features, kept)

    def qk_norm(self, width: int) -> dict[str, Any]:
        """Norms on q and k of heads of ``width`` QK channels, as keyword arguments."""
        return {name: self.normal(width) for name in NORMS}

    def rope(self, tokens: int, qk_widths: list[int]) -> Tensor:
        """Rotary positions of so many tokens, others for each head and pair of channels."""
        angles = 3 * self.normal(tokens, sum(qk_widths) // 2)
        return torch.stack((angles.cos(), angles.sin()))

    def bias(self, heads: int, tokens: int, groups: int = 0) -> dict[str, Any]:
        """What is added to scores, as keyword arguments; with groups a mask for each, which leaves one's own score."""
        positions = 2 * tokens + 3
        index = torch.randint(positions, (tokens, tokens), generator=self.generator)
        found: dict[str, Any] = {"bias_table": self.normal(positions, heads), "bias_index": index}
        if groups:
            apart = torch.rand(groups, tokens, tokens, generator=self.generator) < 0.2
            found["bias_mask"] = -100.0 * (apart & ~torch.eye(tokens, dtype=torch.bool))
        return found

    def cosine(self, heads: int) -> dict[str, Any]:
        """What makes scores of cosines, as keyword arguments; one factor is beyond the largest."""
        return {"logit_scale": torch.linspace(6, 0, heads) + 0.1 * self.normal(heads)}

    def inner_norm(self, width: int, features: int, **more: Any) -> dict[str, Any]:
        """A norm over ``features`` in front of the last matrix, ``width`` of which are kept, as keyword arguments."""
        affine = {"inner_norm_weight": self.normal(width), "inner_norm_bias": self.normal(width)}
        return {**affine, "inner_features": features, "inner_eps": 0.1, **more}

    def gate(self, hidden: int, inputs: int) -> dict[str, Any]:
        """The gate of an MLP, as keyword arguments."""
        return {"gate_weight": self.weight(hidden, inputs), "gate_bias": self.normal(hidden)}

    def linear(
        self, leading: tuple[int, ...], features: int, kept_in: Kept, out: int, kept_out: Kept, activation: str
    ) -> Call:
        """``packed_linear`` on [*leading, features], with ``out`` features in its result."""
        in_cols, out_cols = self.columns(features, kept_in), self.columns(out, kept_out)
        inputs, outputs = _count(features, in_cols), _count(out, out_cols)
        return Call.of(
            "packed_linear",
            self.normal(*leading, features),
            weight=self.weight(outputs, inputs),
            bias=self.normal(outputs),
            in_cols=in_cols,
            out_cols=out_cols,
            out_features=out,
            activation=activation,
        )

    def attention(self, batch: int, tokens: int, qk: list[int], v: list[int], **more: Any) -> Call:
        """``ragged_attention`` of heads with these widths; ``more`` are further arguments by name."""
        qkv = self.normal(batch, tokens, 2 * sum(qk) + sum(v))
        return Call.of("ragged_attention", qkv, **{"qk_widths": qk, "v_widths": v, "scale": 0.25, **more})

    def attention_sublayer(
        self,
        batch: int,
        tokens: int,
        features: int,
        qk: list[int],
        v: list[int],
        kept_in: Kept = None,
        kept_out: Kept = None,
        **more: Any,
    ) -> Call:
        """``attention_sublayer`` with every part that it can have but qk-norm; ``more`` takes the place of some."""
        x, parts = self._sublayer((batch, tokens), features, kept_in, kept_out)
        channels = 2 * sum(qk) + sum(v)
        inputs, outputs = _count(features, parts["in_cols"]), _count(features, parts["out_cols"])
        parts |= {
            "qkv_weight": self.weight(channels, inputs),
            "qkv_bias": self.normal(channels),
            "proj_weight": self.weight(outputs, sum(v)),
            "proj_bias": self.normal(outputs),
        }
        return Call.of("attention_sublayer", x, **{**parts, "qk_widths": qk, "v_widths": v, "scale": 0.25, **more})

    def mlp_sublayer(
        self,
        leading: tuple[int, ...],
        features: int,
        hidden: int,
        kept_in: Kept = None,
        kept_out: Kept = None,
        **more: Any,
    ) -> Call:
        """``mlp_sublayer`` with every part that it can have; ``more`` takes the place of some."""
        x, parts = self._sublayer(leading, features, kept_in, kept_out)
        inputs, outputs = _count(features, parts["in_cols"]), _count(features, parts["out_cols"])
        parts |= {
            "fc1_weight": self.weight(hidden, inputs),
            "fc1_bias": self.normal(hidden),
            "fc2_weight": self.weight(outputs, hidden),
            "fc2_bias": self.normal(outputs),
        }
        return Call.of("mlp_sublayer", x, **{**parts, **more})

    def _sublayer(
        self, leading: tuple[int, ...], features: int, kept_in: Kept, kept_out: Kept
    ) -> tuple[Tensor, dict[str, Any]]:
        """The activations, and what both sublayers have around their layers."""
        in_cols, out_cols = self.columns(features, kept_in), self.columns(features, kept_out)
        return self.normal(*leading, features), {
            "norm_weight": self.normal(features),
            "norm_bias": self.normal(features),
            "layer_scale": self.normal(_count(features, out_cols)),
            "in_cols": in_cols,
            "out_cols": out_cols,
        }

    def coin(self) -> bool:
        """True half of the time."""
        return bool(torch.rand((), generator=self.generator) < 0.5)

    def number(self, low: int, high: int) -> int:
        """Anything from ``low`` to ``high``; half of the time a multiple of 8, as far as there is one."""
        number = int(torch.randint(low, high + 1, (), generator=self.generator))
        aligned = number // 8 * 8
        return aligned if self.coin() and aligned >= low else number

    def ragged(self, operator: str) -> Call:
        """A call of ``operator`` of random sizes up to ``largest``, any of which but the tokens may be zero."""
        batch, tokens, features = self.number(1, 3), self.number(1, self.largest), self.number(1, self.largest)
        activation = sorted(ACTIVATIONS)[self.number(0, len(ACTIVATIONS) - 1)]
        if operator == "packed_linear":
            out = self.number(1, self.largest)
            return self.linear((batch, tokens), features, self._some(features), out, self._some(out), activation)
        more: dict[str, Any] = {} if operator == "ragged_attention" or self.coin() else {"layer_scale": None}
        if operator == "mlp_sublayer":
            kept = self._some(features), self._some(features)
            hidden = self.number(0, self.largest)
            return self.mlp_sublayer((batch, tokens), features, hidden, *kept, activation=activation, **more)
        qk, v, norms = self._heads()
        more |= {**norms, "num_queries": None if self.coin() else self.number(0, tokens)}
        if operator == "ragged_attention":
            return self.attention(batch, tokens, qk, v, **more)
        kept = self._some(features), self._some(features)
        return self.attention_sublayer(batch, tokens, features, qk, v, *kept, **more)

    def _some(self, features: int) -> int | None:
        return None if self.coin() else self.number(0, features)

    def _heads(self) -> tuple[list[int], list[int], dict[str, Any]]:
        """QK widths, V widths, and norms on q and k where all heads have one QK width."""
        heads, widest = self.number(1, 5), min(128, self.largest)
        v = [self.number(0, widest) for _ in range(heads)]
        if self.coin():
            width = self.number(1, widest)
            return [width] * heads, v, self.qk_norm(width)
        return [self.number(0, widest) for _ in range(heads)], v, {}


def samples() -> dict[str, Call]:
    """One typical call of each operator, by its name."""
    maker = Maker(0)
    return {
        "packed_linear": maker.linear((2, 5), 24, 17, 32, 20, "gelu"),
        "ragged_attention": maker.attention(2, 9, [8, 0, 5], [8, 3, 16]),
        "attention_sublayer": maker.attention_sublayer(2, 9, 24, [8, 0, 5], [8, 3, 16], 17, 20),
        "mlp_sublayer": maker.mlp_sublayer((2, 9), 24, 40, 17, 20),
    }


def _weights_only(norms: Mapping[str, Any]) -> dict[str, Any]:
    return {name: norm for name, norm in norms.items() if name.endswith("weight")}


_NO_NORM_NO_SCALE = dict.fromkeys(("norm_weight", "norm_bias", "layer_scale"))
_BARE_ATTENTION = {**_NO_NORM_NO_SCALE, **dict.fromkeys(("qkv_bias", "proj_bias"))}
_BARE_MLP = {**_NO_NORM_NO_SCALE, **dict.fromkeys(("fc1_bias", "fc2_bias"))}

EDGES: Mapping[str, Callable[[Maker], Call]] = {
    "packed_linear, nothing in, nothing out": lambda m: m.linear((3,), 5, 0, 4, 0, "gelu"),
    "packed_linear, columns after whole vectors": lambda m: m.linear((2, 9), 61, 37, 31, 20, "gelu"),
    "packed_linear, all columns": lambda m: m.linear((9,), 72, "all", 40, "all", "identity"),
    "packed_linear, whole chunks of columns": lambda m: m.linear((9,), 72, "chunks", 40, "chunks", "relu"),
    "packed_linear, single columns": lambda m: m.linear((9,), 72, "single", 40, "single", "silu"),
    "packed_linear, most columns": lambda m: m.linear((9,), 72, "most", 40, "most", "quick_gelu"),
    "ragged_attention, heads of every padded width": lambda m: m.attention(1, 70, [3, 128, 40, 17], [128, 16, 33, 1]),
    "ragged_attention, every width padded to 8 only": lambda m: m.attention(1, 40, [8, 128, 40, 16], [120, 16, 32, 24]),
    "ragged_attention, norms on q and k": lambda m: m.attention(2, 20, [5, 5], [8, 3], eps=0.5, **m.qk_norm(5)),
    "ragged_attention, norms on q and k without bias": lambda m: m.attention(
        2, 20, [5, 5], [8, 3], eps=0.5, **_weights_only(m.qk_norm(5))
    ),
    "ragged_attention, norms without a head": lambda m: m.attention(1, 3, [], [], **m.qk_norm(4)),
    "ragged_attention, rotary positions": lambda m: m.attention(
        2, 131, [8, 0, 72, 34], [8, 3, 5, 16], rope=m.rope(131, [8, 0, 72, 34])
    ),
    "ragged_attention, rotary positions of neighbours behind norms": lambda m: m.attention(
        2, 21, [6, 6], [8, 3], rope=m.rope(21, [6, 6]), rope_pairs="neighbours", norm="rms", **m.qk_norm(6)
    ),
    "ragged_attention, rotary positions without a channel": lambda m: m.attention(1, 3, [0], [4], rope=m.rope(3, [0])),
    "ragged_attention, biased scores": lambda m: m.attention(
        2, 67, [8, 0, 7], [8, 3, 33], num_queries=41, **m.bias(3, 67)
    ),
    "ragged_attention, biases of images in turns": lambda m: m.attention(6, 49, [32, 5], [32, 16], **m.bias(2, 49, 3)),
    "ragged_attention, a mask alone": lambda m: m.attention(
        4, 17, [8, 0], [8, 3], bias_mask=m.bias(2, 17, 2)["bias_mask"]
    ),
    "ragged_attention, biased scores without a head": lambda m: m.attention(2, 3, [], [], **m.bias(0, 3, 2)),
    "attention_sublayer, biased scores": lambda m: m.attention_sublayer(
        3, 50, 16, [6, 0, 9], [8, 3, 0], 9, 11, num_queries=1, **m.bias(3, 50)
    ),
    "attention_sublayer, biases of images in turns": lambda m: m.attention_sublayer(
        4, 16, 16, [4, 4], [8, 3], qk_eps=0.5, **m.bias(2, 16, 2), **m.qk_norm(4)
    ),
    "attention_sublayer, biased scores of turned channels": lambda m: m.attention_sublayer(
        2, 17, 16, [6, 2], [8, 3], rope=m.rope(17, [6, 2]), **m.bias(2, 17, 2)
    ),
    "attention_sublayer, no token and biased scores": lambda m: m.attention_sublayer(
        2, 0, 16, [4], [4], **m.bias(1, 0)
    ),
    "ragged_attention, cosines": lambda m: m.attention(2, 67, [8, 0, 7], [8, 3, 33], num_queries=41, **m.cosine(3)),
    "ragged_attention, cosines without a head": lambda m: m.attention(2, 3, [], [], **m.cosine(0)),
    "attention_sublayer, cosines": lambda m: m.attention_sublayer(
        3, 50, 16, [6, 0, 9], [8, 3, 0], 9, 11, num_queries=1, **m.cosine(3), **m.bias(3, 50)
    ),
    "attention_sublayer, cosines of turned channels": lambda m: m.attention_sublayer(
        2, 17, 16, [6, 2], [8, 3], rope=m.rope(17, [6, 2]), **m.cosine(2)
    ),
    "attention_sublayer, cosines of nothing": lambda m: m.attention_sublayer(
        2, 17, 16, [5], [8], 0, None, **{**m.cosine(1), "qkv_bias": None}
    ),
    "attention_sublayer, a norm behind": lambda m: m.attention_sublayer(
        3, 20, 61, [5, 8], [7, 3], 37, None, post_norm=True, num_queries=7, **m.inner_norm(10, 24)
    ),
    "attention_sublayer, a norm behind cosines": lambda m: m.attention_sublayer(
        4, 16, 40, [4, 5], [8, 3], post_norm=True, layer_scale=None, **m.cosine(2), **m.bias(2, 16, 2)
    ),
    "attention_sublayer, a norm behind nothing": lambda m: m.attention_sublayer(
        2, 7, 16, [], [], post_norm=True, eps=0.5, norm="rms"
    ),
    "attention_sublayer, a norm behind without affine part": lambda m: m.attention_sublayer(
        2, 7, 16, [4, 4], [4, 4], post_norm=True, **_BARE_ATTENTION
    ),
    "attention_sublayer, no head": lambda m: m.attention_sublayer(2, 7, 16, [], []),
    "attention_sublayer, a head without QK channels": lambda m: m.attention_sublayer(2, 7, 16, [0, 4], [4, 4]),
    "attention_sublayer, a head without V channels": lambda m: m.attention_sublayer(2, 7, 16, [4, 4], [0, 4]),
    "attention_sublayer, no V channel at all": lambda m: m.attention_sublayer(2, 7, 16, [4, 4], [0, 0]),
    "attention_sublayer, no input column": lambda m: m.attention_sublayer(2, 7, 16, [4, 4], [4, 4], 0),
    "attention_sublayer, no output column": lambda m: m.attention_sublayer(2, 7, 16, [4, 4], [4, 4], None, 0),
    "attention_sublayer, columns after whole vectors": lambda m: m.attention_sublayer(2, 9, 61, [5, 8], [7, 3], 37, 29),
    "attention_sublayer, no query": lambda m: m.attention_sublayer(2, 7, 16, [4], [4], num_queries=0),
    "attention_sublayer, no image": lambda m: m.attention_sublayer(0, 7, 16, [4], [4]),
    "attention_sublayer, one token": lambda m: m.attention_sublayer(3, 1, 16, [4], [4]),
    "attention_sublayer, class token": lambda m: m.attention_sublayer(3, 70, 16, [4, 8], [8, 4], 12, 11, num_queries=1),
    "attention_sublayer, class and distillation token": lambda m: m.attention_sublayer(
        3, 70, 16, [4, 8], [8, 4], 12, 11, num_queries=2
    ),
    "attention_sublayer, norms on q and k": lambda m: m.attention_sublayer(
        2, 20, 16, [5, 5], [8, 3], qk_eps=0.5, **m.qk_norm(5)
    ),
    "attention_sublayer, norms on q and k without bias": lambda m: m.attention_sublayer(
        2, 20, 16, [5, 5], [8, 3], qk_eps=0.5, **_weights_only(m.qk_norm(5))
    ),
    "attention_sublayer, no bias, norm or scale": lambda m: m.attention_sublayer(
        2, 7, 16, [4, 4], [4, 4], **_BARE_ATTENTION
    ),
    "attention_sublayer, rotary positions, one for all heads": lambda m: m.attention_sublayer(
        2, 20, 16, [36, 36], [8, 3], rope=m.rope(20, [36]).repeat(1, 1, 2)
    ),
    "attention_sublayer, rotary positions of every head": lambda m: m.attention_sublayer(
        2, 20, 16, [6, 12, 2], [8, 3, 5], 9, 11, rope=m.rope(20, [6, 12, 2]), rope_pairs="neighbours", num_queries=3
    ),
    "attention_sublayer, rotary positions behind norms": lambda m: m.attention_sublayer(
        2, 20, 16, [6, 6], [8, 3], qk_eps=0.5, rope=m.rope(20, [6, 6]), rope_pairs="neighbours", **m.qk_norm(6)
    ),
    "attention_sublayer, no token and rotary positions": lambda m: m.attention_sublayer(
        2, 0, 16, [4], [4], rope=m.rope(0, [4])
    ),
    "attention_sublayer, an inner norm": lambda m: m.attention_sublayer(
        2, 20, 61, [5, 8], [7, 12], 37, 29, **m.inner_norm(19, 24)
    ),
    "attention_sublayer, an inner norm over what has no channel": lambda m: m.attention_sublayer(
        2, 7, 16, [4], [0], **m.inner_norm(0, 8)
    ),
    "attention_sublayer, RMSNorm everywhere": lambda m: m.attention_sublayer(
        2, 20, 16, [5, 5], [8, 3], 9, None, norm="rms", qk_eps=0.5, **m.qk_norm(5), **m.inner_norm(11, 16)
    ),
    "mlp_sublayer, one feature": lambda m: m.mlp_sublayer((2, 7), 1, 3),
    "mlp_sublayer, no hidden neuron": lambda m: m.mlp_sublayer((2, 7), 16, 0),
    "mlp_sublayer, no input column": lambda m: m.mlp_sublayer((2, 7), 16, 12, 0),
    "mlp_sublayer, no output column": lambda m: m.mlp_sublayer((2, 7), 16, 12, None, 0),
    "mlp_sublayer, columns after whole vectors": lambda m: m.mlp_sublayer((2, 9), 61, 33, 37, 29),
    "mlp_sublayer, all columns, which fill no whole vectors": lambda m: m.mlp_sublayer((2, 9), 61, 33),
    "mlp_sublayer, no row": lambda m: m.mlp_sublayer((0, 7), 16, 12),
    "mlp_sublayer, leading dimensions": lambda m: m.mlp_sublayer((2, 3, 2, 5), 16, 12),
    "mlp_sublayer, a single row": lambda m: m.mlp_sublayer((), 16, 12),
    "mlp_sublayer, an eps that matters": lambda m: m.mlp_sublayer((2, 7), 16, 12, eps=0.5),
    "mlp_sublayer, a gate": lambda m: m.mlp_sublayer((2, 9), 61, 33, 37, 29, activation="silu", **m.gate(33, 37)),
    "mlp_sublayer, a gate without biases": lambda m: m.mlp_sublayer(
        (2, 9), 16, 33, activation="silu", **{**m.gate(33, 16), "gate_bias": None, "fc1_bias": None}
    ),
    "mlp_sublayer, a gate and no hidden neuron": lambda m: m.mlp_sublayer((2, 7), 16, 0, **m.gate(0, 16)),
    "mlp_sublayer, an inner norm": lambda m: m.mlp_sublayer((2, 9), 61, 33, 37, 29, **m.inner_norm(33, 48)),
    "mlp_sublayer, an inner norm over pruned neurons alone": lambda m: m.mlp_sublayer(
        (2, 7), 16, 0, **m.inner_norm(0, 8)
    ),
    "mlp_sublayer, a gate and an inner norm without affine part": lambda m: m.mlp_sublayer(
        (2, 9), 16, 33, activation="silu", inner_features=33, **m.gate(33, 16)
    ),
    "mlp_sublayer, RMSNorm everywhere": lambda m: m.mlp_sublayer(
        (2, 9), 61, 33, 37, 29, norm="rms", norm_bias=None, **m.inner_norm(33, 40)
    ),
    "mlp_sublayer, a norm behind": lambda m: m.mlp_sublayer((2, 9), 61, 33, 37, None, post_norm=True, eps=0.1),
    "mlp_sublayer, a norm behind a gate": lambda m: m.mlp_sublayer(
        (2, 9), 16, 33, post_norm=True, norm="rms", activation="silu", **m.gate(33, 16), **m.inner_norm(33, 40)
    ),
    "mlp_sublayer, a norm behind no neuron": lambda m: m.mlp_sublayer((2, 7), 16, 0, post_norm=True),
    "mlp_sublayer, a norm behind without affine part": lambda m: m.mlp_sublayer(
        (2, 7), 16, 12, post_norm=True, **_BARE_MLP
    ),
    "mlp_sublayer, no bias, norm or scale": lambda m: m.mlp_sublayer((2, 7), 16, 12, **_BARE_MLP),
}
"""Awkward calls that every backend has to get right, by operator and name; a maker draws one when it is needed."""

PRECISIONS: Mapping[str, tuple[torch.dtype, float]] = {
    "float32": (torch.float32, 1e-5),
    "float32 as tf32": (torch.float32, 3e-3),
    "float16": (torch.float16, 5e-3),
    "bfloat16": (torch.bfloat16, 4e-2),
}
"""What a GPU computes in: dtype, and the largest :func:`error`, with a floor of 1, at the sizes of real models."""


TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""The largest :func:`error` of a call of some dozens of features and tokens, on any backend.

Sums have a few hundred terms; float16 rounds at 5e-4, bfloat16 at 4e-3.
"""


def error(result: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference relative to that of the truth; infinite where the result is not finite.

    Args:
        result: of any shape.
        truth: of the same shape.
        floor: relative to the norm of a tensor of this number where that is larger. 1 where the terms of a result are
            near 1, and so the rounding of each, however much they cancel.

    Raises:
        ValueError: the shapes differ.
    """
    if result.shape != truth.shape:
        raise wrong("result", f"shape {list(truth.shape)}", f"shape {list(result.shape)}")
    if not bool(torch.isfinite(result).all()):
        return float("inf")
    size = max(float(truth.double().norm()), floor * truth.numel() ** 0.5, 1e-30)
    return float((result.double() - truth.double()).norm()) / size


def worst_element(result: Tensor, truth: Tensor) -> float:
    """Largest difference of an element, in units of the root mean square of its row of the truth or of 1e-3."""
    if truth.numel() == 0:
        return 0.0
    size = truth.double().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-3)
    return float(((result.double() - truth.double()).abs() / size).max())


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, so that an element that nobody writes, or that is read too early, shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    flags: Any = torch.utils.deterministic
    filled, flags.fill_uninitialized_memory = flags.fill_uninitialized_memory, True
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        flags.fill_uninitialized_memory = filled
