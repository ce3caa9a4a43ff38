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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _native, reference
from ._cache import PackedCache, up_to_date
from ._packing import double, fold_layer_scale, fold_norm, qk_norm_table
from ._stamp import Stamp

ACTIVATION_IDS = {"identity": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4, "quick_gelu": 5}
"""Numbers of the activations; the same as in csrc/cpu/kernels.h."""

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


def missing(device: torch.device, dtype: torch.dtype, needs_grad: bool = False, weights: str = "float32") -> str:
    """Why the backend cannot run a call, or the empty string if it can.

    Args:
        device: where the tensors are.
        dtype: of the activations.
        needs_grad: whether the result must be differentiable.
        weights: one of ``dispatch.WEIGHTS``.
    """
    native = _native.load()
    if not native:
        return native.reason
    if device.type != "cpu":
        return f"runs on CPU tensors; got a tensor on {device.type}"
    if dtype != torch.float32:
        return f"runs in float32; got {dtype}"
    if needs_grad:
        return "has no backward; call under torch.no_grad() or use the backend 'reference'"
    if weights == "bfloat16" and capability() != "amx":
        return f"needs AMX for bfloat16 weights; runs on {capability()}"
    return ""


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


def fold_attention(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    layer_scale: Tensor | None,
    in_cols: Tensor | None,
    n_qk: int,
    scale: float,
    has_qk_norm: bool,
) -> FoldedAttention:
    """Fold the constants of an attention sublayer; ``n_qk`` is the sum of its QK widths."""
    qkv, constant = fold_norm(qkv_weight, qkv_bias, norm_weight, norm_bias, in_cols)
    proj, proj_constant = double(proj_weight), None if proj_bias is None else double(proj_bias)
    v_constant = constant[2 * n_qk :].clone()
    constant[2 * n_qk :] = 0
    proj_constant = proj @ v_constant if proj_constant is None else proj_constant + proj @ v_constant
    if not has_qk_norm:
        qkv[:n_qk] *= scale
        constant[:n_qk] *= scale
        constant[n_qk : 2 * n_qk] = 0
    if layer_scale is not None:
        proj, proj_constant = proj * double(layer_scale)[:, None], proj_constant * double(layer_scale)
    return FoldedAttention(qkv, constant, proj, proj_constant, scale if has_qk_norm else 1.0)


def pack_attention(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    layer_scale: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    qk_widths: Sequence[int],
    v_widths: Sequence[int],
    scale: float,
    eps: float,
    qk_eps: float,
    weights: str = "float32",
) -> PackedSublayer:
    """Fold the constants of an attention sublayer and pack its two matrices. Arguments as attention_sublayer, then one
    of ``dispatch.WEIGHTS``."""
    n_qk = sum(qk_widths)
    qk_norm = qk_norm_table(q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias) if qk_widths else None
    folded = fold_attention(
        norm_weight,
        norm_bias,
        qkv_weight,
        qkv_bias,
        proj_weight,
        proj_bias,
        layer_scale,
        in_cols,
        n_qk,
        scale,
        qk_norm is not None,
    )
    panels = [_panels(folded.qkv[rows], folded.qkv_bias[rows], weights) for rows in _qkv_rows(n_qk)]
    panels.append(_panels(folded.proj, folded.proj_bias, weights))
    if qk_norm is not None:
        panels.append(qk_norm.flatten().view(panels[0].dtype))
    layout = [packing(), _ATTENTION, len(qk_widths), int(qk_norm is not None), *_columns(in_cols), *_columns(out_cols)]
    constants = (eps, qk_eps, folded.scale)
    return PackedSublayer(torch.cat(panels), torch.tensor([*layout, *qk_widths, *v_widths], device="cpu"), constants)


def _qkv_rows(n_qk: int) -> tuple[slice, slice, slice]:
    """Rows of q, k and v in a qkv matrix."""
    return slice(0, n_qk), slice(n_qk, 2 * n_qk), slice(2 * n_qk, None)


def fold_mlp(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    in_cols: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """fc1, its bias, fc2 and its bias, float64, with LayerNorm's affine part and layer scale folded in."""
    fc2_constant = None if fc2_bias is None else double(fc2_bias)
    return (
        *fold_norm(fc1_weight, fc1_bias, norm_weight, norm_bias, in_cols),
        *fold_layer_scale(double(fc2_weight), fc2_constant, layer_scale),
    )


def pack_mlp(
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    activation: str,
    eps: float,
    weights: str = "float32",
) -> PackedSublayer:
    """Fold the constants of an MLP sublayer and pack its two matrices. Arguments as mlp_sublayer, then one of
    ``dispatch.WEIGHTS``."""
    fc1, fc1_constant, fc2, fc2_constant = fold_mlp(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, in_cols
    )
    layout = [packing(), _MLP, fc1.shape[0], ACTIVATION_IDS[activation], *_columns(in_cols), *_columns(out_cols)]
    panels = torch.cat([_panels(fc1, fc1_constant, weights), _panels(fc2, fc2_constant, weights)])
    return PackedSublayer(panels, torch.tensor(layout, device="cpu"), (eps, 0.0, 1.0))


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_cols: Tensor | None,
    out_cols: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    def pack() -> PackedLinear:
        _check_weights((weight, bias))
        panels = _panels(weight.detach(), None if bias is None else bias.detach())
        gather, scatter = (None if cols is None else cols.contiguous() for cols in (in_cols, out_cols))
        kept, act = weight.shape[0], ACTIVATION_IDS[activation]
        return PackedLinear(panels, packing(), gather, scatter, kept, out_features, act)

    return _cache.get(weight, (weight, bias, in_cols, out_cols), (out_features, activation), pack)(x)


def ragged_attention(
    qkv: Tensor,
    q_norm_weight: Tensor | None,
    q_norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    k_norm_bias: Tensor | None,
    qk_widths: Sequence[int],
    v_widths: Sequence[int],
    scale: float,
    eps: float,
    num_queries: int,
) -> Tensor:
    qk_norm = qk_norm_table(q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    return torch.ops.gohsp_kernels.cpu_attention(
        qkv, _widths(qk_widths, v_widths), qk_norm, scale, eps, sum(v_widths), num_queries
    )


def run_packed(x: Tensor, sublayers: Sequence[PackedSublayer], num_queries: int) -> Tensor:
    """The native operator on packed sublayers, one after another."""
    return torch.ops.gohsp_kernels.cpu_sublayers(
        x,
        [s.panels for s in sublayers],
        [s.layout for s in sublayers],
        [c for s in sublayers for c in s.constants],
        num_queries,
    )


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of a chain before it is packed.

    Attributes:
        name: "attention_sublayer" or "mlp_sublayer".
        tensors: the tensor arguments of that operator but for x, in the order of its schema.
        constants: its other arguments in that order, but for num_queries.
        check: raises for arguments that do not fit together; called before they are packed.
    """

    name: str
    tensors: Sequence[Any]
    constants: tuple[Any, ...]
    check: Callable[[], None]

    def packed(self) -> PackedSublayer:
        """The packed form in float32, from the cache or made now."""
        # The key is qkv_weight or fc1_weight: of all the tensors the one that is never None.
        return _cache.get(self.tensors[2], self.tensors, self.constants, self.pack)

    def pack(self, weights: str = "float32") -> PackedSublayer:
        """A packed form that no cache holds, with weights of one of ``dispatch.WEIGHTS``."""
        self.check()
        _check_weights(self.tensors)
        return _PACK[self.name](*self.tensors, *self.constants, weights)

    def rounded_reference(
        self, x: Tensor, linear: Callable[..., Tensor], attention: Callable[..., Tensor] = reference.ragged_attention
    ) -> Tensor:
        """What :meth:`pack` with rounded weights computes, in plain PyTorch.

        Args:
            x: [batch, tokens, features].
            linear: ``reference.int8_linear`` with its levels bound, or ``reference.bf16_linear``.
            attention: ``reference.bf16_attention`` for the latter.
        """
        tensors, constants = self.tensors, self.constants
        columns, arguments = tuple(tensors[7:9]), tuple(tensors[:8])
        if self.name == "mlp_sublayer":
            arguments = (x, None, None, *fold_mlp(*arguments), None, *columns, *constants, linear)
            return reference.mlp_sublayer(*arguments)
        qk_widths, v_widths, scale, eps, qk_eps = constants
        norms = [None if t is None else t.to(x.dtype) for t in tensors[9:13]]
        arguments = (*arguments, sum(qk_widths), scale, norms[0] is not None)
        folded = fold_attention(*arguments)
        matrices = (folded.qkv, folded.qkv_bias, folded.proj, folded.proj_bias)
        layout = (qk_widths, v_widths, folded.scale, eps, qk_eps, x.shape[1])
        arguments = (x, None, None, *matrices, None, *columns, *norms, *layout, linear, attention)
        return reference.attention_sublayer(*arguments)


_PACK: dict[str, Callable[..., PackedSublayer]] = {"attention_sublayer": pack_attention, "mlp_sublayer": pack_mlp}


def _already_checked() -> None:
    """The public operators check their arguments before they come here."""


def attention_sublayer(x: Tensor, *arguments: Any) -> Tensor:
    """Arguments in the order of the schema: 13 tensors, then qk_widths, v_widths, scale, eps, qk_eps, num_queries."""
    sublayer = Sublayer("attention_sublayer", arguments[:13], arguments[13:18], _already_checked)
    return run_packed(x, [sublayer.packed()], arguments[18])


def mlp_sublayer(x: Tensor, *arguments: Any) -> Tensor:
    """Arguments in the order of the schema: 9 tensors, then activation and eps."""
    sublayer = Sublayer("mlp_sublayer", arguments[:9], arguments[9:], _already_checked)
    # Rows are independent here, so the whole batch is one image of many tokens.
    rows = x.reshape(1, -1, x.shape[-1]) if x.numel() else x.new_empty(1, 0, x.shape[-1])
    return run_packed(rows, [sublayer.packed()], rows.shape[1]).view(x.shape)


class PackedChain:
    """Packed sublayers of a chain, packed again when one of their tensors has changed.

    Args:
        features: of the x that it will be called with.
        sublayers: in their order.
    """

    def __init__(self, features: int, sublayers: Sequence[Sublayer]) -> None:
        self.features = features
        self._sublayers = sublayers
        self._tensors = [t for s in sublayers for t in s.tensors if t is not None]
        self._entry: tuple[Stamp, list[PackedSublayer]] | None = None

    def __call__(self, x: Tensor, num_queries: int) -> Tensor:
        return run_packed(x, self.current(), num_queries)

    def current(self) -> list[PackedSublayer]:
        """The packed sublayers as their tensors are now."""
        entry = self._entry = up_to_date(self._entry, self._tensors, (), self._pack)
        return entry[1]

    def _pack(self) -> list[PackedSublayer]:
        return [sublayer.packed() for sublayer in self._sublayers]
