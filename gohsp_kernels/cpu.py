# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: constants folded, weights packed into panels, and the calls of the native operators.

Packing happens on first use and again when a parameter has changed. Packed weights live in a cache beside the
parameters, never in a module: they are not saved, not copied, and go when the parameters go.

Exact algebra used here (LayerNorm statistics apart, every step is linear, so it is done once, in float64):
the affine part of LayerNorm folds into the next matrix; the softmax scale folds into q; the k bias adds the same
number to every score of a query and cancels in the softmax; the v bias passes through the softmax, whose rows sum to 1,
and folds into the bias of proj; layer scale folds into proj and fc2. With qk-norm q and k are renormalised after their
bias, so there the k bias and the q scale stay where they are. Rotary positions turn the k bias with its token, so it
stays; a norm in front of proj keeps the v bias, and its own affine part folds into proj, as that of one in front of fc2
does into fc2. Cosine attention keeps k bias and q scale as qk-norm does. A norm behind a sublayer leaves the first
matrix as it is; layer scale folds into its affine part, which the kernels apply.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _native, reference
from ._cache import PackedCache
from ._packing import fold_attention, fold_mlp, post_norm_table, qk_norm_table
from .descriptors import PARTS, Attention, AttentionSublayer, Descriptor, Linear, MlpSublayer, Sublayer
from .formats import FORMATS
from .registry import PackedChain, Request, register

_RUNS_ON = (torch.float32, "cpu")


@functools.cache
def capability() -> str:
    """Name of the instruction set that the native library picked, one of csrc/cpu/isa/isa.def.

    Raises:
        RuntimeError: if the native library cannot be loaded.
    """
    return str(_native.function("gohsp_cpu_capability", ctypes.c_char_p)().decode())


@functools.cache
def activation_levels() -> int:
    """Largest integer that an activation becomes where it meets int8 weights: 255, or 127 where the instruction set
    would saturate (AVX2, and AVX-512 without VNNI).

    Raises:
        RuntimeError: if the native library cannot be loaded.
    """
    return int(_native.function("gohsp_cpu_activation_levels", ctypes.c_int64)())


@functools.cache
def reference_attention(weights: str) -> Callable[..., Tensor]:
    """What the kernels compute of attention beside such weights, in plain PyTorch.

    Queries, keys, values and what the softmax makes of scores are rounded to bfloat16 beside bfloat16 weights on every
    CPU, beside int8 ones where it multiplies bfloat16 numbers.

    Args:
        weights: name of a format.

    Raises:
        RuntimeError: if the native library cannot be loaded.
    """
    number = ctypes.c_int64(_native.numbers("formats")[weights])
    in_pairs = _native.function("gohsp_cpu_attends_in_pairs", ctypes.c_bool)(number)
    return reference.bf16_attention if in_pairs else reference.ragged_attention


@functools.cache
def packing(weights: str) -> int:
    """A number for the way in which this process arranges packed weights: by its instruction set, by their format and
    by the version of both. What was packed where the number is another one is refused by the native operators.

    Args:
        weights: name of a format.

    Raises:
        RuntimeError: if the native library cannot be loaded.
    """
    number = ctypes.c_int64(_native.numbers("formats")[weights])
    return int(_native.function("gohsp_cpu_packing", ctypes.c_int64)(number))


_cache = PackedCache()


def _check_weights(tensors: Sequence[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.int64 and (tensor.dtype, tensor.device.type) != _RUNS_ON:
            raise ValueError(f"weights: wanted float32 on the cpu, as x; got {tensor.dtype} on {tensor.device}")


def _panels(weight: Tensor, bias: Tensor | None, weights: str = "float32") -> Tensor:
    constant = None if bias is None else bias.detach().to(torch.float32).contiguous()
    numbers, scales = FORMATS[weights].numbers(weight.detach())
    return torch.ops.gohsp_kernels.cpu_pack(numbers.contiguous(), scales, constant, _native.numbers("formats")[weights])


def _layout(weights: str, *numbers: int | Tensor) -> Tensor:
    """int64: the packing of these weights, then numbers and lists of them."""
    parts = [packing(weights), *numbers]
    return torch.cat([p if isinstance(p, Tensor) else torch.tensor([p], device="cpu") for p in parts])


def _plan(columns: Tensor | None, features: int, scatter: bool = False) -> int | Tensor:
    """Kept columns as a layout has them: -1 for all, or their number and how the kernels move them."""
    return -1 if columns is None else torch.ops.gohsp_kernels.cpu_plan(columns.contiguous(), features, scatter)


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer ready for the CPU kernel.

    Attributes:
        panels, layout: see :class:`PackedSublayer`.
        out_features: columns of the result.
    """

    panels: Tensor
    layout: Tensor
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.gohsp_kernels.cpu_linear(x, self.panels, self.layout, self.out_features)


def _pack_linear(linear: Linear, features: int) -> PackedLinear:
    _check_weights((linear.weight, linear.bias))
    layout = _layout(
        "float32",
        linear.weight.shape[0],
        _native.numbers("activations")[linear.activation],
        _plan(linear.in_cols, features),
        _plan(linear.out_cols, linear.out_features, scatter=True),
    )
    return PackedLinear(_panels(linear.weight, linear.bias), layout, linear.out_features)


def pack_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Pack a linear layer that reads and writes every column.

    Args:
        weight, bias: float32 on the CPU, [n, k] and [n]; they are not held.

    Raises:
        ValueError: for other weights.
    """
    return _pack_linear(Linear(weight=weight, bias=bias, out_features=weight.shape[0]), weight.shape[1])


@dataclass(frozen=True)
class PackedEmbedding:
    """An embedding of patches that lie side by side, together with the tokens in front of them and their positions.

    Attributes:
        panels, layout: see :class:`PackedSublayer`; of the matrix [features, channels x height x width of a patch].
        base: float32 [tokens, features], what the patches' products are added to in its last rows.
        patch: height and width of a patch in pixels.
    """

    panels: Tensor
    layout: Tensor
    base: Tensor
    patch: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Tokens [batch, tokens, features] of images [batch, channels, height, width], float32 on the CPU."""
        return torch.ops.gohsp_kernels.cpu_embed(images, self.panels, self.layout, self.base, self.patch)


def pack_embedding(weight: Tensor, bias: Tensor | None, base: Tensor, weights: str = "float32") -> PackedEmbedding:
    """Pack the convolution of a patch embedding.

    Args:
        weight, bias: float32 on the CPU, [features, channels, height, width] and [features]; they are not held.
        base: see :class:`PackedEmbedding`.
        weights: name of the format; pixels are rounded as other inputs of its products are.

    Raises:
        ValueError: for other weights.
    """
    _check_weights((weight, bias))
    _, _, height, width = weight.shape
    panels = _panels(weight.flatten(1), bias, weights)
    return PackedEmbedding(panels, _layout(weights), base.detach().contiguous(), (height, width))


@dataclass(frozen=True)
class PackedSublayer:
    """An attention or MLP sublayer ready for the CPU kernel.

    Attributes:
        panels: int32, words of its packed matrices one behind the other, then of the affine parts of the q and k
            norms, of rotary positions, of biases, of factors of cosines, and of the affine part of a norm behind it.
        layout: int64, :func:`packing`, kind and sizes, then widths and plans of kept columns;
            csrc/torch/cpu_ops.cpp reads it in this order.
        constants: eps, eps of the q and k norms, softmax scale, eps of the inner norm.
    """

    panels: Tensor
    layout: Tensor
    constants: tuple[float, float, float, float]


def _widths(qk_widths: Sequence[int], v_widths: Sequence[int]) -> Tensor:
    return torch.tensor([list(qk_widths), list(v_widths)], dtype=torch.int64, device="cpu").reshape(2, len(qk_widths))


def _norm_kind(norm: str) -> int:
    return int(norm == "rms")


def _halves_first(widths: Sequence[int]) -> Tensor:
    """The q or k channels of heads whose pairs are neighbours, in the order in which they are halves of their head."""
    starts = [sum(widths[:i]) for i in range(len(widths))]
    order = [start + c for start, width in zip(starts, widths, strict=True) for c in _halves(width)]
    return torch.tensor(order, dtype=torch.int64, device="cpu")


def _halves(width: int) -> list[int]:
    return [*range(0, width, 2), *range(1, width, 2)]


def _angles(heads: Attention) -> Tensor:
    """The table of rotary positions as the kernels read it: float32 [2, tokens, pairs] of one head if all are alike."""
    assert heads.rope is not None
    table = heads.rope.detach().to(torch.float32)
    if len(set(heads.qk_widths)) != 1:
        return table.contiguous()
    by_head = table.unflatten(-1, (len(heads.qk_widths), -1))
    alike = bool((by_head == by_head[:, :, :1]).all())
    return (by_head[:, :, 0] if alike else table).contiguous()


_BIAS_ROW = 16  # rows of biases begin on a multiple of so many, as in csrc/cpu/kernels.h


def _attention_words(heads: Attention) -> tuple[list[Tensor], list[int]]:
    """What attention itself adds to panels and layout: norms of q and k, rotary positions, biases of scores, factors of
    cosines."""
    qk_norm = qk_norm_table(*heads.norms) if heads.qk_widths else None
    panels, tokens, pairs = [], 0, 0
    if qk_norm is not None:
        if heads.rope is not None and heads.rope_pairs == "neighbours":
            qk_norm = qk_norm[:, _halves(qk_norm.shape[1])]
        panels.append(_words(qk_norm))
    if heads.rope is not None and sum(heads.qk_widths) > 0:
        angles = _angles(heads)
        _, tokens, pairs = angles.shape
        panels.append(_words(angles))
    numbers = [int(qk_norm is not None), _norm_kind(heads.norm), tokens, pairs, 0, 0, 0]
    if heads.has_bias and heads.qk_widths:
        bias = _biases(heads)
        panels.append(_words(F.pad(bias, (0, -bias.shape[-1] % _BIAS_ROW))))
        numbers[4:6] = len(bias), bias.shape[-1]
    if heads.logit_scale is not None and heads.qk_widths:
        panels.append(_words(reference.logit_factors(heads.logit_scale.detach().double())))
        numbers[6] = 1
    return panels, numbers


def _words(numbers: Tensor) -> Tensor:
    """Numbers as the words of float32 that panels hold."""
    return numbers.to(torch.float32).flatten().view(torch.int32)


def _behind(sublayer: Sublayer, features: int) -> tuple[int, list[Tensor]]:
    """Whether the norm stands behind a sublayer, as its layout has it, and what panels hold of it."""
    table = post_norm_table(sublayer, features)
    return int(table is not None), [] if table is None else [_words(table)]


def _biases(heads: Attention) -> Tensor:
    """What is added to scores: float32 [groups, heads, tokens, tokens]."""
    bias = torch.zeros((), device="cpu")
    if heads.bias_table is not None and heads.bias_index is not None:
        bias = heads.bias_table.detach().to(torch.float32)[heads.bias_index].movedim(-1, 0)[None]
    if heads.bias_mask is None:
        return bias
    mask = heads.bias_mask.detach().to(torch.float32)[:, None]
    return bias + mask.expand(-1, len(heads.qk_widths), -1, -1)


def pack_attention(sublayer: AttentionSublayer, features: int, weights: str = "float32") -> PackedSublayer:
    """Fold the constants of an attention sublayer and pack its matrices in the format of a name."""
    qk_widths, v_widths = sublayer.qk_widths, sublayer.v_widths
    folded = fold_attention(sublayer)
    qkv, bias = folded.qkv, folded.qkv_bias
    if sublayer.rope is not None and sublayer.rope_pairs == "neighbours":
        order, n_qk = _halves_first(qk_widths), sum(qk_widths)
        rows = torch.cat([order, order + n_qk, torch.arange(2 * n_qk, len(qkv), device="cpu")])
        qkv, bias = qkv[rows], bias[rows]
    panels = [_panels(qkv[rows], bias[rows], weights) for rows in _qkv_rows(sum(qk_widths))]
    panels.append(_panels(folded.proj, folded.proj_bias, weights))
    more, numbers = _attention_words(sublayer.attention)
    is_behind, norm_behind = _behind(sublayer, features)
    layout = _layout(
        weights,
        _native.numbers("sublayers")["attention"],
        features,
        len(qk_widths),
        *numbers,
        sublayer.inner_features,
        is_behind,
        _plan(sublayer.in_cols, features),
        _plan(sublayer.out_cols, features, scatter=True),
        _widths(qk_widths, v_widths).flatten(),
    )
    constants = sublayer.eps, sublayer.qk_eps, folded.scale, sublayer.inner_eps
    return PackedSublayer(torch.cat([*panels, *more, *norm_behind]), layout, constants)


def _qkv_rows(n_qk: int) -> tuple[slice, slice, slice]:
    """Rows of q, k and v in a qkv matrix."""
    return slice(0, n_qk), slice(n_qk, 2 * n_qk), slice(2 * n_qk, None)


def pack_mlp(sublayer: MlpSublayer, features: int, weights: str = "float32") -> PackedSublayer:
    """Fold the constants of an MLP sublayer and pack its matrices in the format of a name."""
    mlp = fold_mlp(sublayer)
    is_behind, norm_behind = _behind(sublayer, features)
    layout = _layout(
        weights,
        _native.numbers("sublayers")["mlp"],
        features,
        mlp.fc1.shape[0],
        _native.numbers("activations")[sublayer.activation],
        int(mlp.gate is not None),
        _norm_kind(sublayer.norm),
        sublayer.inner_features,
        is_behind,
        _plan(sublayer.in_cols, features),
        _plan(sublayer.out_cols, features, scatter=True),
    )
    panels = [_panels(mlp.fc1, mlp.fc1_bias, weights), _panels(mlp.fc2, mlp.fc2_bias, weights)]
    if mlp.gate is not None:
        panels.append(_panels(mlp.gate, mlp.gate_bias, weights))
    return PackedSublayer(torch.cat([*panels, *norm_behind]), layout, (sublayer.eps, 0.0, 1.0, sublayer.inner_eps))


def pack_sublayer(sublayer: Sublayer, features: int, weights: str = "float32") -> PackedSublayer:
    """A packed form that no cache holds.

    Args:
        sublayer: whose weights are float32 on the CPU.
        features: width of the residual stream.
        weights: name of a format, see :data:`gohsp_kernels.formats.FORMATS`.

    Raises:
        ValueError: for weights of another dtype or device.
    """
    _check_weights(sublayer.tensors)
    if isinstance(sublayer, AttentionSublayer):
        return pack_attention(sublayer, features, weights)
    return pack_mlp(sublayer, features, weights)


def packed(sublayer: Sublayer, features: int) -> PackedSublayer:
    """The packed form in float32, from the cache or made now."""
    constants = (features, *sublayer.constants)
    return _cache.get(sublayer.key, sublayer.tensors, constants, lambda: pack_sublayer(sublayer, features))


def run_packed(x: Tensor, sublayers: Sequence[PackedSublayer], num_queries: int) -> Tensor:
    """The native operator on packed sublayers, one after another."""
    return torch.ops.gohsp_kernels.cpu_sublayers(
        x,
        [s.panels for s in sublayers],
        [s.layout for s in sublayers],
        [c for s in sublayers for c in s.constants],
        num_queries,
    )


def packed_linear(linear: Linear, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.packed_linear`."""
    features = x.shape[-1]
    constants = (features, *linear.constants)
    return _cache.get(linear.key, linear.tensors, constants, lambda: _pack_linear(linear, features))(x)


def ragged_attention(heads: Attention, qkv: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.ragged_attention`."""
    if heads.rope is not None and heads.rope_pairs == "neighbours":
        order, n_qk = _halves_first(heads.qk_widths), sum(heads.qk_widths)
        columns = torch.cat([order, order + n_qk, torch.arange(2 * n_qk, qkv.shape[-1], device="cpu")])
        qkv = qkv.index_select(-1, columns)
    words, numbers = _attention_words(heads)
    nothing = torch.empty(0, dtype=torch.int32, device="cpu")
    return torch.ops.gohsp_kernels.cpu_attention(
        qkv,
        _widths(heads.qk_widths, heads.v_widths),
        torch.cat([nothing, *words]),
        numbers,
        heads.scale,
        heads.eps,
        sum(heads.v_widths),
        num_queries,
    )


def attention_sublayer(sublayer: AttentionSublayer, x: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.attention_sublayer`."""
    return run_packed(x, [packed(sublayer, x.shape[-1])], num_queries)


def mlp_sublayer(sublayer: MlpSublayer, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.mlp_sublayer`."""
    # Rows are independent here, so the whole batch is one image of many tokens.
    rows = x.reshape(1, -1, x.shape[-1]) if x.numel() else x.new_empty(1, 0, x.shape[-1])
    return run_packed(rows, [packed(sublayer, x.shape[-1])], rows.shape[1]).view(x.shape)


_RUN: dict[str, Callable[..., Tensor]] = {
    "packed_linear": packed_linear,
    "ragged_attention": ragged_attention,
    "attention_sublayer": attention_sublayer,
    "mlp_sublayer": mlp_sublayer,
}


class CpuBackend:
    """The native kernels on CPU tensors in float32."""

    name = "cpu"
    operators = _RUN.keys()
    parts = PARTS

    def missing(self, request: Request) -> str:
        native = _native.load()
        if not native:
            return native.reason
        if request.device.type != "cpu":
            return f"runs on CPU tensors; got a tensor on {request.device.type}"
        if request.dtype != torch.float32:
            return f"runs in float32; got {request.dtype}"
        if request.needs_grad:
            return "has no backward; call under torch.no_grad() or use the backend 'reference'"
        return FORMATS[request.weights].missing(capability())

    def only_named(self, request: Request) -> str:
        return ""

    def priority(self, request: Request) -> int:
        return 30

    def run(self, operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
        return _RUN[operator.name](operator, x, num_queries)

    def chain(self, x: Tensor, sublayers: Sequence[Sublayer]) -> PackedChain:
        return PackedChain(x, sublayers, lambda sublayer, like: packed(sublayer, like.shape[-1]), run_packed)


register(CpuBackend())
