# SPDX-License-Identifier: Apache-2.0
"""The operators as objects: what a call has beside its activations, each argument once, with all that follows from it.

A descriptor holds tensors and constants, not copies, and never changes. Its fields in their order are the operator's
schema, what a cache compares, and what every backend is given. A public function builds one; a chain holds many.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ._cache import PackedCache
from .activations import ACTIVATIONS

_SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "tuple[int, ...]": "int[]",
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
}


class Descriptor:
    """What all operators have. Subclasses are dataclasses, registered by :func:`_operator`.

    Attributes:
        name: of the operator.
        activations: their name in its schema.
        residual: whether the result is the activations and something added to them.
        attends: whether the call says how many queries it wants.
        tensor_names, constant_names: of the fields, in the order of the schema: tensors first.
        key_name: of the first tensor that is never None.
        needed_names: of the fields without a default.
        added_names: of the fields that came after programs had been exported; they stand last in the schema, with their
            defaults.
    """

    name: ClassVar[str]
    activations: ClassVar[str]
    residual: ClassVar[bool]
    attends: ClassVar[bool]
    tensor_names: ClassVar[tuple[str, ...]]
    constant_names: ClassVar[tuple[str, ...]]
    key_name: ClassVar[str]
    needed_names: ClassVar[frozenset[str]]
    added_names: ClassVar[tuple[str, ...]]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, in the order of the schema."""
        return tuple([getattr(self, name) for name in self.tensor_names])

    @property
    def constants(self) -> tuple[Any, ...]:
        """Everything else, in the order of the schema, but for the number of queries."""
        return tuple([getattr(self, name) for name in self.constant_names])

    @property
    def key(self) -> Tensor:
        """A tensor that is never None: what packed forms are kept beside. Attention alone has none."""
        key: Tensor = getattr(self, self.key_name)
        return key

    @property
    def widest_head(self) -> int:
        """Most channels that a head has; 0 without heads."""
        return 0

    @property
    def parts(self) -> frozenset[str]:
        """What the call has beyond what every backend knows, some of :data:`PARTS`."""
        return frozenset()

    def check(self, features: int) -> None:
        """Compare all arguments with each other, columns included.

        Args:
            features: of the activations.

        Raises:
            ValueError: they do not fit together; the message names one, what was wanted and what came.
        """
        raise NotImplementedError

    def _check_factors(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if type(value) is not float and not isinstance(value, numbers.Real | torch.SymFloat | torch.SymInt):
                raise TypeError(f"{name}: wanted a number; got {type(value).__name__}")

    def check_images(self, batch: int, tokens: int) -> None:
        """Compare what belongs to single images and tokens with how many there are.

        Raises:
            ValueError: they differ.
        """

    def shape_of_result(self, shape: Sequence[int], num_queries: int | None) -> tuple[int, ...]:
        """The shape that activations of a shape become."""
        raise NotImplementedError

    def flat(self, num_queries: int | None = None) -> tuple[Any, ...]:
        """All arguments behind the activations, in the order of the schema."""
        values = {name: getattr(self, name) for name in (*self.tensor_names, *self.constant_names)}
        return tuple([values.get(name, num_queries) for name in self.flat_names()])

    @classmethod
    def flat_names(cls) -> tuple[str, ...]:
        """Names of what :meth:`flat` gives."""
        first = [name for name in (*cls.tensor_names, *cls.constant_names) if name not in cls.added_names]
        return (*first, *(("num_queries",) if cls.attends else ()), *cls.added_names)

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Any:
        """The descriptor of arguments by name; widths may be any sequences."""
        return cls(**{k: tuple(v) if k in ("qk_widths", "v_widths") else v for k, v in arguments.items()})

    @classmethod
    def from_flat(cls, flat: Sequence[Any]) -> tuple[Any, int | None]:
        """The descriptor, and the number of queries, of what :meth:`flat` gives."""
        arguments = dict(zip(cls.flat_names(), flat, strict=False))  # torch leaves out defaults at the end
        num_queries = arguments.pop("num_queries", None)
        return cls.of(arguments), num_queries

    @classmethod
    def schema(cls) -> str:
        """The operator's schema as torch wants it."""
        types = _types(cls)
        arguments = [f"Tensor {cls.activations}"]
        for name in cls.flat_names():
            default = f"={_in_schema(cls, name)}" if name in cls.added_names else ""
            arguments.append(f"{_SCHEMA_TYPES[types.get(name, 'int')]} {name}{default}")
        return f"({', '.join(arguments)}) -> Tensor"


def _in_schema(kind: Any, name: str) -> str:
    """The default of a field as a schema has it."""
    default = getattr(kind, name)
    return f'"{default}"' if isinstance(default, str) else str(default)


def _types(kind: Any) -> dict[str, str]:
    """The annotations of a descriptor's fields, by name."""
    return {field.name: str(field.type) for field in dataclasses.fields(kind)}


ROTARY, BIASED, GATED = "rotary positions", "biased scores", "a gated MLP"
INNER_NORM, RMS_NORM = "an inner norm", "RMSNorm"
COSINE, POST_NORM = "cosine attention", "a norm behind the sublayer"
PARTS = frozenset((ROTARY, BIASED, GATED, INNER_NORM, RMS_NORM, COSINE, POST_NORM))
"""What a sublayer may have that a backend need not know; see :attr:`Descriptor.parts`."""

OPERATORS: dict[str, type[Descriptor]] = {}
"""The kinds of descriptor by the name of the operator."""

Kind = TypeVar("Kind", bound=type[Descriptor])


def _operator(
    name: str, *, activations: str = "x", residual: bool, attends: bool, added: tuple[str, ...] = ()
) -> Callable[[Kind], Kind]:
    """Complete a descriptor by what follows from its fields, and enter it in the list."""

    def complete(kind: Kind) -> Kind:
        types = _types(kind)
        kind.name, kind.activations, kind.residual, kind.attends = name, activations, residual, attends
        kind.tensor_names = tuple(n for n, t in types.items() if t.startswith("Tensor"))
        kind.constant_names = tuple(n for n in types if n not in kind.tensor_names)
        kind.key_name = next((n for n, t in types.items() if t == "Tensor"), "")
        fields = dataclasses.fields(kind)  # type: ignore[arg-type]
        kind.added_names = added
        kind.needed_names = frozenset(field.name for field in fields if field.default is dataclasses.MISSING)
        OPERATORS[name] = kind
        return kind

    return complete


@_operator("packed_linear", residual=False, attends=False)
@dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Descriptor):
    """See :func:`gohsp_kernels.packed_linear`."""

    weight: Tensor
    bias: Tensor | None = None
    in_cols: Tensor | None = None
    out_cols: Tensor | None = None
    out_features: int
    activation: str = "identity"

    def check(self, features: int) -> None:
        _check_activation(self.activation)
        check_number("out_features", self.out_features)
        if self.out_features < 0:
            raise wrong("out_features", "0 or more", self.out_features)
        outputs = _kept("out_cols", self.out_cols, self.out_features)
        _check_weight("weight", self.weight, outputs, _kept("in_cols", self.in_cols, features))
        _check_shape("bias", self.bias, self.weight.shape[0])

    def shape_of_result(self, shape: Sequence[int], num_queries: int | None) -> tuple[int, ...]:
        return (*shape[:-1], self.out_features)


@dataclass(frozen=True, eq=False, kw_only=True)
class _Heads(Descriptor):
    """What attention and the sublayer around it ask of their heads."""

    rope: Tensor | None = None
    bias_table: Tensor | None = None
    bias_index: Tensor | None = None
    bias_mask: Tensor | None = None
    logit_scale: Tensor | None = None
    qk_widths: tuple[int, ...]
    v_widths: tuple[int, ...]
    rope_pairs: str = "halves"
    norm: str = "layer"

    @property
    def parts(self) -> frozenset[str]:
        return _named(self._parts_of_heads())

    def _parts_of_heads(self) -> dict[str, bool]:
        return {
            ROTARY: self.rope is not None,
            BIASED: self.has_bias,
            COSINE: self.logit_scale is not None,
            RMS_NORM: self.norm == "rms",
        }

    def check_images(self, batch: int, tokens: int) -> None:
        if self.rope is not None and self.rope.shape[1] != tokens:
            raise wrong("rope", f"angles for {tokens} tokens, as x has", f"shape {list(self.rope.shape)}")
        for name in ("bias_index", "bias_mask"):
            of_tokens = getattr(self, name)
            if of_tokens is not None and of_tokens.shape[-1] != tokens:
                raise wrong(name, f"those of {tokens} tokens, as x has", f"shape {list(of_tokens.shape)}")
        if self.bias_mask is not None and batch % self.bias_mask.shape[0]:
            wanted = f"a number of groups that divides the {batch} images"
            raise wrong("bias_mask", wanted, f"shape {list(self.bias_mask.shape)}")

    @property
    def has_bias(self) -> bool:
        """Whether something is added to the scores."""
        return self.bias_table is not None or self.bias_mask is not None

    @property
    def channels(self) -> int:
        """Channels of q, k and v together."""
        return 2 * sum(self.qk_widths) + sum(self.v_widths)

    @property
    def widest_head(self) -> int:
        return max((*self.qk_widths, *self.v_widths), default=0)

    @property
    def norms(self) -> tuple[Tensor | None, ...]:
        """Weight and bias of the norm on q, then on k."""
        return tuple([getattr(self, name) for name in NORMS])

    def _check_heads(self) -> None:
        qk_widths, v_widths = self.qk_widths, self.v_widths
        for width in (*qk_widths, *v_widths):
            if type(width) is not int:
                check_number("qk_widths, v_widths", width)
        if len(qk_widths) != len(v_widths):
            raise wrong("v_widths", f"{len(qk_widths)} heads, as in qk_widths", f"{len(v_widths)}")
        if any(width < 0 for width in (*qk_widths, *v_widths)):
            raise wrong("qk_widths, v_widths", "no negative width", f"{list(qk_widths)}, {list(v_widths)}")

        _check_one_of("norm", self.norm, NORM_KINDS)
        _check_one_of("rope_pairs", self.rope_pairs, ROPE_PAIRS)
        self._check_bias()
        _check_shape("logit_scale", self.logit_scale, len(qk_widths))
        if self.rope is None:
            return
        if any(width % 2 for width in qk_widths):
            raise wrong("qk_widths", "even widths, as rope turns pairs of channels", list(qk_widths))
        check_tensor("rope", self.rope)
        tokens = self.rope.shape[1] if self.rope.dim() > 1 else 0
        _check_weight("rope", self.rope, 2, tokens, sum(qk_widths) // 2)

    def _check_bias(self) -> None:
        table, index, mask = self.bias_table, self.bias_index, self.bias_mask
        if (table is None) != (index is None):
            absent, there = ("bias_table", "bias_index") if table is None else ("bias_index", "bias_table")
            raise wrong(absent, f"a tensor beside {there}", None)
        if table is not None and index is not None:
            check_tensor("bias_table", table)
            _check_weight("bias_table", table, len(table) if table.dim() else 0, len(self.qk_widths))
            _check_places("bias_index", index, len(table))
        if mask is None:
            return
        check_tensor("bias_mask", mask)
        groups, tokens = (mask.shape[0], mask.shape[-1]) if mask.dim() == 3 else (1, 0)
        _check_weight("bias_mask", mask, max(groups, 1), tokens, tokens)
        if index is not None and index.shape[0] != tokens:
            raise wrong("bias_mask", f"as many tokens as bias_index has, {index.shape[0]}", tokens)

    def _check_norms(self) -> None:
        q_weight, q_bias, k_weight, k_bias = norms = self.norms
        if q_weight is None and q_bias is None and k_weight is None and k_bias is None:
            return
        if self.logit_scale is not None:
            raise wrong(
                "logit_scale", "None beside norms on q and k, which are divided by their lengths for it", "both"
            )
        if len(set(self.qk_widths)) > 1:
            raise wrong("qk_widths", "one width for all heads, as the model has a q and k norm", list(self.qk_widths))
        for argument, tensor in zip(NORMS, norms, strict=True):
            if tensor is None and argument.endswith("weight"):
                raise wrong(argument, "a weight for both the q and the k norm, or for neither", None)
            if self.qk_widths:
                _check_shape(argument, tensor, self.qk_widths[0])


INNER_NORM_ARGUMENTS = ("inner_norm_weight", "inner_norm_bias", "inner_features", "inner_eps")
"""Names of what makes a norm in front of a sublayer's last matrix."""

BIASES = ("bias_table", "bias_index", "bias_mask")
"""Names of what is added to scores."""

HIGHEST_LOGIT_SCALE = math.log(100)
"""Of cosine attention; a larger one counts as this, as in Swin Transformer V2."""

NORM_KINDS = ("layer", "rms")
"""Norms: LayerNorm, or RMSNorm, which takes no mean."""

ROPE_PAIRS = ("halves", "neighbours")
"""Which channels of a head of width w are turned together: c and c + w / 2, or 2 c and 2 c + 1."""

NORMS = ("q_norm_weight", "q_norm_bias", "k_norm_weight", "k_norm_bias")
"""Names of the norms on q and k, which all heads share."""


@_operator(
    "ragged_attention",
    activations="qkv",
    residual=False,
    attends=True,
    added=("rope", "rope_pairs", "norm", *BIASES, "logit_scale"),
)
@dataclass(frozen=True, eq=False, kw_only=True)
class Attention(_Heads):
    """See :func:`gohsp_kernels.ragged_attention`; ``eps`` and ``norm`` are those of the norms on q and k."""

    q_norm_weight: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_weight: Tensor | None = None
    k_norm_bias: Tensor | None = None
    scale: float
    eps: float = 1e-6

    def check(self, features: int) -> None:
        """``features`` are the channels of qkv."""
        self._check_heads()
        self._check_factors("scale", "eps")
        if features != self.channels:
            raise wrong("qkv", f"{self.channels} channels", features)
        self._check_norms()

    def check_input(self, qkv: Tensor) -> None:
        """:meth:`check`, with a message that shows the shape."""
        self._check_heads()
        self._check_factors("scale", "eps")
        _check_weight("qkv", qkv, qkv.shape[0], qkv.shape[1], self.channels)
        self._check_norms()

    def shape_of_result(self, shape: Sequence[int], num_queries: int | None) -> tuple[int, ...]:
        assert num_queries is not None
        return (shape[0], num_queries, sum(self.v_widths))


@_operator(
    "attention_sublayer",
    residual=True,
    attends=True,
    added=("rope", "rope_pairs", "norm", *INNER_NORM_ARGUMENTS, *BIASES, "logit_scale", "post_norm"),
)
@dataclass(frozen=True, eq=False, kw_only=True)
class AttentionSublayer(_Heads):
    """See :func:`gohsp_kernels.attention_sublayer`."""

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    qkv_weight: Tensor
    qkv_bias: Tensor | None = None
    proj_weight: Tensor
    proj_bias: Tensor | None = None
    layer_scale: Tensor | None = None
    in_cols: Tensor | None = None
    out_cols: Tensor | None = None
    q_norm_weight: Tensor | None = None
    q_norm_bias: Tensor | None = None
    k_norm_weight: Tensor | None = None
    k_norm_bias: Tensor | None = None
    inner_norm_weight: Tensor | None = None
    inner_norm_bias: Tensor | None = None
    scale: float
    eps: float = 1e-6
    qk_eps: float = 1e-6
    inner_features: int = 0
    inner_eps: float = 1e-6
    post_norm: bool = False

    @property
    def attention(self) -> Attention:
        """The attention inside."""
        same = ("rope", "qk_widths", "v_widths", "rope_pairs", "norm", "scale", "logit_scale", *NORMS, *BIASES)
        return Attention(eps=self.qk_eps, **{name: getattr(self, name) for name in same})

    @property
    def parts(self) -> frozenset[str]:
        own = {INNER_NORM: self.inner_features > 0, POST_NORM: self.post_norm}
        return _named({**self._parts_of_heads(), **own})

    def check(self, features: int) -> None:
        self._check_heads()
        self._check_factors("scale", "eps", "qk_eps", "inner_eps")
        _check_inner_norm(self, sum(self.v_widths))
        _check_shape("norm_weight", self.norm_weight, features)
        _check_shape("norm_bias", self.norm_bias, features)
        _check_weight("qkv_weight", self.qkv_weight, self.channels, _kept("in_cols", self.in_cols, features))
        _check_shape("qkv_bias", self.qkv_bias, self.channels)
        _check_post_norm(self)
        outputs = _kept("out_cols", self.out_cols, features)
        _check_weight("proj_weight", self.proj_weight, outputs, sum(self.v_widths))
        _check_shape("proj_bias", self.proj_bias, outputs)
        _check_shape("layer_scale", self.layer_scale, outputs)
        self._check_norms()

    def shape_of_result(self, shape: Sequence[int], num_queries: int | None) -> tuple[int, ...]:
        assert num_queries is not None
        return (shape[0], num_queries, shape[2])


@_operator(
    "mlp_sublayer",
    residual=True,
    attends=False,
    added=("gate_weight", "gate_bias", "norm", *INNER_NORM_ARGUMENTS, "post_norm"),
)
@dataclass(frozen=True, eq=False, kw_only=True)
class MlpSublayer(Descriptor):
    """See :func:`gohsp_kernels.mlp_sublayer`."""

    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    fc1_weight: Tensor
    fc1_bias: Tensor | None = None
    fc2_weight: Tensor
    fc2_bias: Tensor | None = None
    layer_scale: Tensor | None = None
    in_cols: Tensor | None = None
    out_cols: Tensor | None = None
    gate_weight: Tensor | None = None
    gate_bias: Tensor | None = None
    inner_norm_weight: Tensor | None = None
    inner_norm_bias: Tensor | None = None
    activation: str = "gelu"
    norm: str = "layer"
    eps: float = 1e-6
    inner_features: int = 0
    inner_eps: float = 1e-6
    post_norm: bool = False

    @property
    def parts(self) -> frozenset[str]:
        found = {POST_NORM: self.post_norm, GATED: self.gate_weight is not None, INNER_NORM: self.inner_features > 0}
        return _named({**found, RMS_NORM: self.norm == "rms"})

    def check(self, features: int) -> None:
        _check_activation(self.activation)
        _check_one_of("norm", self.norm, NORM_KINDS)
        self._check_factors("eps", "inner_eps")
        check_tensor("fc1_weight", self.fc1_weight)
        hidden = self.fc1_weight.shape[0] if self.fc1_weight.dim() else 0
        _check_shape("norm_weight", self.norm_weight, features)
        _check_shape("norm_bias", self.norm_bias, features)
        _check_weight("fc1_weight", self.fc1_weight, hidden, _kept("in_cols", self.in_cols, features))
        _check_shape("fc1_bias", self.fc1_bias, hidden)
        if self.gate_weight is None and self.gate_bias is not None:
            raise wrong("gate_weight", "a weight beside gate_bias", None)
        _check_shape("gate_weight", self.gate_weight, *self.fc1_weight.shape)
        _check_shape("gate_bias", self.gate_bias, hidden)
        _check_inner_norm(self, hidden)
        _check_post_norm(self)
        outputs = _kept("out_cols", self.out_cols, features)
        _check_weight("fc2_weight", self.fc2_weight, outputs, hidden)
        _check_shape("fc2_bias", self.fc2_bias, outputs)
        _check_shape("layer_scale", self.layer_scale, outputs)

    def shape_of_result(self, shape: Sequence[int], num_queries: int | None) -> tuple[int, ...]:
        return tuple(shape)


Sublayer = AttentionSublayer | MlpSublayer
"""What a chain is made of."""


def wrong(argument: str, wanted: str, got: object) -> ValueError:
    """The error for an argument that does not fit."""
    return ValueError(f"{argument}: wanted {wanted}; got {got}")


def check_tensor(argument: str, value: object) -> None:
    """Refuse what is no tensor of floats, None included.

    Raises:
        TypeError: it is something else.
        ValueError: its numbers are no floats.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument}: wanted a tensor; got {type(value).__name__}")
    if not value.is_floating_point():
        raise wrong(argument, "a tensor of floats", value.dtype)


def check_devices(x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """Refuse tensors beside ``x`` that are elsewhere: with one on "meta" torch gives memory that nobody wrote.

    Raises:
        ValueError: there is one.
    """
    device = x.device
    for tensor in tensors:
        if tensor is not None and tensor.device != device:
            raise wrong("tensors", f"all on {device}, as x", f"one on {tensor.device}")


def check_number(argument: str, value: object) -> None:
    """Refuse what is no whole number.

    Raises:
        TypeError: it is something else.
    """
    if type(value) is not int and not isinstance(value, numbers.Integral | torch.SymInt):
        raise TypeError(f"{argument}: wanted a whole number; got {type(value).__name__}")


def _check_shape(argument: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None:
        _check_weight(argument, tensor, *shape)


def _check_weight(argument: str, tensor: Tensor, *shape: int) -> None:
    """The same of a tensor that has to be there."""
    if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
        check_tensor(argument, tensor)
    if tensor.shape != shape:
        raise wrong(argument, f"shape {list(shape)}", f"shape {list(tensor.shape)}")


def _named(found: Mapping[str, bool]) -> frozenset[str]:
    return frozenset(name for name, is_there in found.items() if is_there)


def _check_inner_norm(sublayer: AttentionSublayer | MlpSublayer, width: int) -> None:
    """Compare the norm before the last matrix with the ``width`` features that are left of it."""
    check_number("inner_features", sublayer.inner_features)
    affine = {name: getattr(sublayer, name) for name in ("inner_norm_weight", "inner_norm_bias")}
    if sublayer.inner_features == 0:
        for name, tensor in affine.items():
            if tensor is not None:
                raise wrong("inner_features", f"the features that the norm of {name} is over", 0)
        return
    if sublayer.inner_features < width:
        raise wrong("inner_features", f"0 for no norm, or at least {width}", sublayer.inner_features)
    for name, tensor in affine.items():
        _check_shape(name, tensor, width)


def _check_post_norm(sublayer: AttentionSublayer | MlpSublayer) -> None:
    """A norm behind a sublayer is over all features: one that is not written would get something from it."""
    if type(sublayer.post_norm) is not bool:
        raise TypeError(f"post_norm: wanted True or False; got {type(sublayer.post_norm).__name__}")
    if sublayer.post_norm and sublayer.out_cols is not None:
        raise wrong("out_cols", "None beside post_norm, which writes every feature", "columns")


def _check_one_of(argument: str, value: str, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise wrong(argument, f"one of {', '.join(choices)}", repr(value))


def _check_activation(activation: str) -> None:
    _check_one_of("activation", activation, ACTIVATIONS)


_widths_needed = PackedCache(by_content=False)
_places_needed = PackedCache(by_content=False)


def _width_needed(cols: Tensor) -> int:
    """Fewest features that have the columns ``cols``; -1 if these do not ascend from 0 on, without repeats."""
    columns = cols.tolist()
    ascend = all(before < after for before, after in pairwise([-1, *columns]))
    return max(columns, default=-1) + 1 if ascend else -1


def _rows_needed(index: Tensor) -> int:
    """Fewest rows that a table has which ``index`` refers to; -1 where one of its numbers is negative."""
    if index.numel() == 0:
        return 0
    return int(index.max()) + 1 if int(index.min()) >= 0 else -1


def _check_places(argument: str, index: Tensor, rows: int) -> None:
    """Refuse an index [tokens, tokens] that does not stay within a table of so many rows."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{argument}: wanted an int64 tensor; got {type(index).__name__}")
    if index.dim() != 2 or index.dtype != torch.int64 or index.shape[0] != index.shape[1]:
        raise wrong(argument, "int64 [tokens, tokens]", f"{index.dtype} {list(index.shape)}")
    if torch.compiler.is_compiling() or index.is_meta or isinstance(index, FakeTensor):
        return  # such tensors hold no numbers
    needed = _places_needed.get(index, (index,), (), lambda: _rows_needed(index))
    if not 0 <= needed <= rows:
        raise wrong(argument, f"rows of a bias_table of {rows}", f"{int(index.min())} to {int(index.max())}")


def _shown(columns: Sequence[int]) -> str:
    """The list; of a long one only its ends, and the place where it first fails to ascend."""
    if len(columns) <= 16:
        return str(list(columns))
    ends = f"[{', '.join(map(str, columns[:4]))}, ..., {columns[-1]}]"
    falls = (i for i, (before, after) in enumerate(pairwise(columns)) if before >= after)
    return ends + next((f", where {columns[i + 1]} follows {columns[i]}" for i in falls), "")


def _kept(argument: str, cols: Tensor | None, features: int) -> int:
    """Number of kept columns."""
    if cols is None:
        return features
    if not isinstance(cols, Tensor):
        raise TypeError(f"{argument}: wanted a 1-D int64 tensor; got {type(cols).__name__}")
    if cols.dim() != 1 or cols.dtype != torch.int64:
        raise wrong(argument, "a 1-D int64 tensor", f"{cols.dim()}-D {cols.dtype}")
    # Such tensors hold no numbers.
    if torch.compiler.is_compiling() or cols.is_meta or isinstance(cols, FakeTensor):
        return cols.shape[0]
    # Read once a list, not once a call: on a GPU reading waits for all that was launched before.
    needed = _widths_needed.get(cols, (cols,), (), lambda: _width_needed(cols))
    if not 0 <= needed <= features:
        wanted = f"ascending indices of the {features} features, without repeats"
        raise wrong(argument, wanted, _shown(cols.tolist()))
    return cols.shape[0]
