# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: constants folded, weights packed into panels, and the calls of the native operators.

Packing happens on first use and again when a parameter has changed. Packed weights live in a cache beside the
parameters, never in a module: they are not saved, not copied, and go when the parameters go.

Exact algebra used here (LayerNorm statistics apart, every step is linear, so it is done once, in float64):
the affine part of LayerNorm folds into the next matrix; the softmax scale folds into q; the k bias adds the same
number to every score of a query and cancels in the softmax; the v bias passes through the softmax, whose rows sum to 1,
and folds into the bias of proj; layer scale folds into proj and fc2. With qk-norm q and k are renormalised after their
bias, so there the k bias and the q scale stay where they are.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import _native, reference
from ._cache import PackedCache
from ._packing import double, fold_layer_scale, fold_norm, qk_norm_table
from .activations import ACTIVATION_IDS
from .descriptors import NORMS, Attention, AttentionSublayer, Descriptor, Linear, MlpSublayer, Sublayer
from .registry import PackedChain, Request, register

_ATTENTION, _MLP = 0, 1  # kinds of sublayer in a layout
_RUNS_ON = (torch.float32, "cpu")


def capability() -> str:
    """Name of the instruction set that the native library picked: scalar, avx2, avx512, avx512vnni, amx
    or neon.

    Raises:
        RuntimeError: if the native library cannot be loaded.
    """
    return str(_ask_library("gohsp_cpu_capability", ctypes.c_char_p).decode())


def activation_levels() -> int:
    """Largest integer that an activation becomes where it meets int8 weights: 255, or 127 where the instruction set
    would saturate (AVX2, and AVX-512 without VNNI).

    Raises:
        RuntimeError: if the native library cannot be loaded.
    """
    return int(_ask_library("gohsp_cpu_activation_levels", ctypes.c_int64))


@functools.cache
def packing() -> int:
    """A number for the way in which this process arranges packed weights: by its instruction set, and by the version
    of the format. What was packed where the number is another one is refused by the native operators.

    Raises:
        RuntimeError: if the native library cannot be loaded.
    """
    return int(_ask_library("gohsp_cpu_packing", ctypes.c_int64))


def _ask_library(name: str, kind: Any) -> Any:
    native = _native.load()
    if not native:
        raise RuntimeError(native.reason)
    function = getattr(ctypes.CDLL(str(native.path)), name)
    function.restype = kind
    return function()


_cache = PackedCache()


def _check_weights(tensors: Sequence[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.dtype != torch.int64 and (tensor.dtype, tensor.device.type) != _RUNS_ON:
            raise ValueError(f"weights: wanted float32 on the cpu, as x; got {tensor.dtype} on {tensor.device}")


def _panels(weight: Tensor, bias: Tensor | None, weights: str = "float32") -> Tensor:
    constant = None if bias is None else bias.to(torch.float32).contiguous()
    if weights == "int8":
        return torch.ops.gohsp_kernels.cpu_pack_int8(*reference.quantise_weight(weight), constant)
    if weights == "bfloat16":
        return torch.ops.gohsp_kernels.cpu_pack_bf16(weight.to(torch.bfloat16).contiguous(), constant)
    return torch.ops.gohsp_kernels.cpu_pack(weight.to(torch.float32).contiguous(), constant)


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer ready for the CPU kernel."""

    panels: Tensor
    packing: int
    in_cols: Tensor | None
    out_cols: Tensor | None
    kept_outputs: int
    out_features: int
    activation: int

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.gohsp_kernels.cpu_linear(
            x,
            self.panels,
            self.packing,
            self.in_cols,
            self.out_cols,
            self.kept_outputs,
            self.out_features,
            self.activation,
        )


def pack_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """Pack a linear layer that reads and writes every column.

    Args:
        weight, bias: float32 on the CPU, [n, k] and [n]; they are not held.

    Raises:
        ValueError: for other weights.
    """
    _check_weights((weight, bias))
    panels = _panels(weight.detach(), None if bias is None else bias.detach())
    return PackedLinear(panels, packing(), None, None, weight.shape[0], weight.shape[0], ACTIVATION_IDS["identity"])


@dataclass(frozen=True)
class PackedEmbedding:
    """An embedding of patches that lie side by side, together with the tokens in front of them and their positions.

    Attributes:
        panels: the packed matrix [features, channels x height x width of a patch].
        packing: see :func:`packing`.
        base: float32 [tokens, features], what the patches' products are added to in its last rows.
        patch: height and width of a patch in pixels.
    """

    panels: Tensor
    packing: int
    base: Tensor
    patch: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Tokens [batch, tokens, features] of images [batch, channels, height, width], float32 on the CPU."""
        return torch.ops.gohsp_kernels.cpu_embed(images, self.panels, self.packing, self.base, self.patch)


def pack_embedding(weight: Tensor, bias: Tensor | None, base: Tensor) -> PackedEmbedding:
    """Pack the convolution of a patch embedding.

    Args:
        weight, bias: float32 on the CPU, [features, channels, height, width] and [features]; they are not held.
        base: see :class:`PackedEmbedding`.

    Raises:
        ValueError: for other weights.
    """
    _, _, height, width = weight.shape
    panels = pack_linear(weight.flatten(1), bias).panels
    return PackedEmbedding(panels, packing(), base.detach().contiguous(), (height, width))


@dataclass(frozen=True)
class PackedSublayer:
    """An attention or MLP sublayer ready for the CPU kernel.

    Attributes:
        panels: its packed matrices one behind the other, then the affine parts of the q and k norms; of the
            dtype of their weights, as bits.
        layout: int64, :func:`packing`, kind and sizes, then widths and kept columns; csrc/torch/cpu_ops.cpp reads it
            in this order.
        constants: eps, eps of the q and k norms, softmax scale.
    """

    panels: Tensor
    layout: Tensor
    constants: tuple[float, float, float]


def _columns(cols: Tensor | None) -> list[int]:
    """Kept columns behind their number, or -1 for all."""
    return [-1] if cols is None else [len(cols), *cols.tolist()]


def _widths(qk_widths: Sequence[int], v_widths: Sequence[int]) -> Tensor:
    return torch.tensor([list(qk_widths), list(v_widths)], dtype=torch.int64, device="cpu").reshape(2, len(qk_widths))


@dataclass(frozen=True)
class FoldedAttention:
    """The matrices of an attention sublayer, float64, with all constants folded in that can be.

    Attributes:
        qkv, qkv_bias, proj, proj_bias: They need no LayerNorm weights and no layer scale any more.
        scale: What is left of the softmax scale.
    """

    qkv: Tensor
    qkv_bias: Tensor
    proj: Tensor
    proj_bias: Tensor
    scale: float


def fold_attention(sublayer: AttentionSublayer) -> FoldedAttention:
    """Fold the constants of an attention sublayer."""
    n_qk, scale, has_norm = sum(sublayer.qk_widths), sublayer.scale, sublayer.q_norm_weight is not None
    qkv, constant = fold_norm(
        sublayer.qkv_weight, sublayer.qkv_bias, sublayer.norm_weight, sublayer.norm_bias, sublayer.in_cols
    )
    proj = double(sublayer.proj_weight)
    v_constant = constant[2 * n_qk :].clone()
    constant[2 * n_qk :] = 0
    proj_constant = proj @ v_constant
    if sublayer.proj_bias is not None:
        proj_constant = double(sublayer.proj_bias) + proj_constant
    if not has_norm:
        qkv[:n_qk] *= scale
        constant[:n_qk] *= scale
        constant[n_qk : 2 * n_qk] = 0
    if sublayer.layer_scale is not None:
        factors = double(sublayer.layer_scale)
        proj, proj_constant = proj * factors[:, None], proj_constant * factors
    return FoldedAttention(qkv, constant, proj, proj_constant, scale if has_norm else 1.0)


def pack_attention(sublayer: AttentionSublayer, weights: str = "float32") -> PackedSublayer:
    """Fold the constants of an attention sublayer and pack its two matrices, as one of ``dispatch.WEIGHTS``."""
    qk_widths, v_widths = sublayer.qk_widths, sublayer.v_widths
    qk_norm = qk_norm_table(*sublayer.norms) if qk_widths else None
    folded = fold_attention(sublayer)
    panels = [_panels(folded.qkv[rows], folded.qkv_bias[rows], weights) for rows in _qkv_rows(sum(qk_widths))]
    panels.append(_panels(folded.proj, folded.proj_bias, weights))
    if qk_norm is not None:
        panels.append(qk_norm.flatten().view(panels[0].dtype))
    layout = [packing(), _ATTENTION, len(qk_widths), int(qk_norm is not None)]
    layout += [*_columns(sublayer.in_cols), *_columns(sublayer.out_cols), *qk_widths, *v_widths]
    constants = (sublayer.eps, sublayer.qk_eps, folded.scale)
    return PackedSublayer(torch.cat(panels), torch.tensor(layout, device="cpu"), constants)


def _qkv_rows(n_qk: int) -> tuple[slice, slice, slice]:
    """Rows of q, k and v in a qkv matrix."""
    return slice(0, n_qk), slice(n_qk, 2 * n_qk), slice(2 * n_qk, None)


def fold_mlp(sublayer: MlpSublayer) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """fc1, its bias, fc2 and its bias, float64, with LayerNorm's affine part and layer scale folded in."""
    fc2_constant = None if sublayer.fc2_bias is None else double(sublayer.fc2_bias)
    return (
        *fold_norm(sublayer.fc1_weight, sublayer.fc1_bias, sublayer.norm_weight, sublayer.norm_bias, sublayer.in_cols),
        *fold_layer_scale(double(sublayer.fc2_weight), fc2_constant, sublayer.layer_scale),
    )


def pack_mlp(sublayer: MlpSublayer, weights: str = "float32") -> PackedSublayer:
    """Fold the constants of an MLP sublayer and pack its two matrices, as one of ``dispatch.WEIGHTS``."""
    fc1, fc1_constant, fc2, fc2_constant = fold_mlp(sublayer)
    layout = [packing(), _MLP, fc1.shape[0], ACTIVATION_IDS[sublayer.activation]]
    layout += [*_columns(sublayer.in_cols), *_columns(sublayer.out_cols)]
    panels = torch.cat([_panels(fc1, fc1_constant, weights), _panels(fc2, fc2_constant, weights)])
    return PackedSublayer(panels, torch.tensor(layout, device="cpu"), (sublayer.eps, 0.0, 1.0))


def pack_sublayer(sublayer: Sublayer, weights: str = "float32") -> PackedSublayer:
    """A packed form that no cache holds, with weights of one of ``dispatch.WEIGHTS``.

    Raises:
        ValueError: for weights that are not float32 on the CPU.
    """
    _check_weights(sublayer.tensors)
    if isinstance(sublayer, AttentionSublayer):
        return pack_attention(sublayer, weights)
    return pack_mlp(sublayer, weights)


def packed(sublayer: Sublayer) -> PackedSublayer:
    """The packed form in float32, from the cache or made now."""
    return _cache.get(sublayer.key, sublayer.tensors, sublayer.constants, lambda: pack_sublayer(sublayer))


def rounded_reference(
    sublayer: Sublayer,
    x: Tensor,
    linear: Callable[..., Tensor],
    attention: Callable[..., Tensor] = reference.ragged_attention,
) -> Tensor:
    """What :func:`pack_sublayer` with rounded weights computes, in plain PyTorch.

    Args:
        sublayer: whose constants are folded as packing folds them.
        x: [batch, tokens, features].
        linear: ``reference.int8_linear`` with its levels bound, or ``reference.bf16_linear``.
        attention: ``reference.bf16_attention`` for the latter.
    """
    plain: dict[str, Any] = {"norm_weight": None, "norm_bias": None, "layer_scale": None}
    if isinstance(sublayer, MlpSublayer):
        fc1, fc1_bias, fc2, fc2_bias = fold_mlp(sublayer)
        plain |= {"fc1_weight": fc1, "fc1_bias": fc1_bias, "fc2_weight": fc2, "fc2_bias": fc2_bias}
        return reference.mlp_sublayer(replace(sublayer, **plain), x, None, linear)
    folded = fold_attention(sublayer)
    plain |= {"qkv_weight": folded.qkv, "qkv_bias": folded.qkv_bias, "scale": folded.scale}
    plain |= {"proj_weight": folded.proj, "proj_bias": folded.proj_bias}
    norms = zip(NORMS, sublayer.norms, strict=True)
    plain |= {name: None if norm is None else norm.to(x.dtype) for name, norm in norms}
    return reference.attention_sublayer(replace(sublayer, **plain), x, x.shape[1], linear, attention)


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

    def pack() -> PackedLinear:
        weight, bias = linear.weight, linear.bias
        _check_weights((weight, bias))
        panels = _panels(weight.detach(), None if bias is None else bias.detach())
        gather, scatter = (None if cols is None else cols.contiguous() for cols in (linear.in_cols, linear.out_cols))
        kept, activation = weight.shape[0], ACTIVATION_IDS[linear.activation]
        return PackedLinear(panels, packing(), gather, scatter, kept, linear.out_features, activation)

    return _cache.get(linear.key, linear.tensors, linear.constants, pack)(x)


def ragged_attention(heads: Attention, qkv: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.ragged_attention`."""
    return torch.ops.gohsp_kernels.cpu_attention(
        qkv,
        _widths(heads.qk_widths, heads.v_widths),
        qk_norm_table(*heads.norms),
        heads.scale,
        heads.eps,
        sum(heads.v_widths),
        num_queries,
    )


def attention_sublayer(sublayer: AttentionSublayer, x: Tensor, num_queries: int) -> Tensor:
    """See :func:`gohsp_kernels.attention_sublayer`."""
    return run_packed(x, [packed(sublayer)], num_queries)


def mlp_sublayer(sublayer: MlpSublayer, x: Tensor, _: int | None = None) -> Tensor:
    """See :func:`gohsp_kernels.mlp_sublayer`."""
    # Rows are independent here, so the whole batch is one image of many tokens.
    rows = x.reshape(1, -1, x.shape[-1]) if x.numel() else x.new_empty(1, 0, x.shape[-1])
    return run_packed(rows, [packed(sublayer)], rows.shape[1]).view(x.shape)


_RUN: dict[str, Callable[..., Tensor]] = {
    "packed_linear": packed_linear,
    "ragged_attention": ragged_attention,
    "attention_sublayer": attention_sublayer,
    "mlp_sublayer": mlp_sublayer,
}


class CpuBackend:
    """The native kernels on CPU tensors in float32."""

    name = "cpu"

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
        if request.weights == "bfloat16" and capability() != "amx":
            return f"needs AMX for bfloat16 weights; runs on {capability()}"
        return ""

    def only_named(self, request: Request) -> str:
        return ""

    def priority(self, request: Request) -> int:
        return 30

    def run(self, operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
        return _RUN[operator.name](operator, x, num_queries)

    def chain(self, x: Tensor, sublayers: Sequence[Sublayer]) -> PackedChain:
        return PackedChain(x, sublayers, lambda sublayer, _: packed(sublayer), run_packed)


register(CpuBackend())
