# SPDX-License-Identifier: Apache-2.0
"""The CPU backend: constants folded, weights packed into panels, and the calls of the native operators.

Packing happens on first use and again when a parameter has changed. Packed weights live in a cache beside the
parameters, never in a module: they are not saved, not copied, and go when the parameters go.

Exact algebra used here (LayerNorm statistics apart, every step is linear, so it is done once, in float64):
the affine part of LayerNorm folds into the next matrix; the softmax scale folds into q; the k bias adds the same number
to every score of a query and cancels in the softmax; the v bias passes through the softmax, whose rows sum to 1, and
folds into the bias of proj; layer scale folds into proj and fc2. With qk-norm q and k are renormalised after their bias,
so there the k bias and the q scale stay where they are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _native
from ._cache import PackedCache

ACTIVATION_IDS = {"identity": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "silu": 4, "quick_gelu": 5}
"""Numbers of the activations; the same as in csrc/cpu/kernels.h."""


def capability() -> str:
    """Name of the instruction set that the native library picked: scalar, avx2, avx512 or neon.

    Raises:
        RuntimeError: if the native library cannot be loaded.
    """
    native = _native.load()
    if not native:
        raise RuntimeError(native.reason)
    name = ctypes.CDLL(str(native.path)).gohsp_cpu_capability
    name.restype = ctypes.c_char_p
    return str(name().decode())


_cache = PackedCache()


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float64)


def _panels(weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.gohsp_kernels.cpu_pack(
        weight.to(torch.float32).contiguous(), None if bias is None else bias.to(torch.float32).contiguous()
    )


def _fold_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, cols: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``weight`` and ``bias`` (float64) of a linear that is fed by a LayerNorm without its affine part."""
    folded = _double(weight)
    constant = folded.new_zeros(folded.shape[0]) if bias is None else _double(bias)
    if norm_bias is not None:
        shift = _double(norm_bias)
        constant = constant + folded @ (shift if cols is None else shift[cols])
    if norm_weight is not None:
        gain = _double(norm_weight)
        folded = folded * (gain if cols is None else gain[cols])
    return folded, constant


def _fold_layer_scale(weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if layer_scale is None:
        return weight, bias
    scale = _double(layer_scale)
    return weight * scale[:, None], None if bias is None else bias * scale


@dataclass(frozen=True)
class PackedLinear:
    """A linear layer ready for the CPU kernel."""

    panels: Tensor
    in_cols: Tensor | None
    out_cols: Tensor | None
    kept_outputs: int
    out_features: int
    activation: int

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.gohsp_kernels.cpu_linear(
            x, self.panels, self.in_cols, self.out_cols, self.kept_outputs, self.out_features, self.activation
        )


@dataclass(frozen=True)
class PackedAttention:
    """An attention sublayer ready for the CPU kernel."""

    qkv_panels: Tensor
    proj_panels: Tensor
    in_cols: Tensor | None
    out_cols: Tensor | None
    widths: Tensor
    qk_norm: Tensor | None
    scale: float
    eps: float
    qk_eps: float

    def __call__(self, x: Tensor, num_queries: int) -> Tensor:
        return torch.ops.gohsp_kernels.cpu_attention_sublayer(
            x,
            self.qkv_panels,
            self.proj_panels,
            self.in_cols,
            self.out_cols,
            self.widths,
            self.qk_norm,
            self.scale,
            self.eps,
            self.qk_eps,
            num_queries,
        )


@dataclass(frozen=True)
class PackedMlp:
    """An MLP sublayer ready for the CPU kernel."""

    fc1_panels: Tensor
    fc2_panels: Tensor
    in_cols: Tensor | None
    out_cols: Tensor | None
    hidden: int
    activation: int
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.gohsp_kernels.cpu_mlp_sublayer(
            x, self.fc1_panels, self.fc2_panels, self.in_cols, self.out_cols, self.hidden, self.activation, self.eps
        )


def _qk_norm_table(
    q_weight: Tensor | None, q_bias: Tensor | None, k_weight: Tensor | None, k_bias: Tensor | None
) -> Tensor | None:
    """Affine parts of the q and k norms as rows [4, head width], or None where the model has none."""
    if q_weight is None or k_weight is None:
        return None
    rows = [q_weight, torch.zeros_like(q_weight) if q_bias is None else q_bias]
    rows += [k_weight, torch.zeros_like(k_weight) if k_bias is None else k_bias]
    return torch.stack([row.detach() for row in rows]).to(torch.float32)


def _widths(qk_widths: Sequence[int], v_widths: Sequence[int]) -> Tensor:
    return torch.tensor([list(qk_widths), list(v_widths)], dtype=torch.int64).reshape(2, len(qk_widths))


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
) -> PackedAttention:
    """Fold the constants of an attention sublayer and pack its two matrices. Arguments as attention_sublayer."""
    n_qk = sum(qk_widths)
    qkv, constant = _fold_norm(qkv_weight, qkv_bias, norm_weight, norm_bias, in_cols)
    proj, proj_constant = _double(proj_weight), None if proj_bias is None else _double(proj_bias)
    v_constant = constant[2 * n_qk :].clone()
    constant[2 * n_qk :] = 0
    proj_constant = proj @ v_constant if proj_constant is None else proj_constant + proj @ v_constant
    qk_norm = _qk_norm_table(q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    if qk_norm is None:
        qkv[:n_qk] *= scale
        constant[:n_qk] *= scale
        constant[n_qk : 2 * n_qk] = 0
    proj, proj_constant = _fold_layer_scale(proj, proj_constant, layer_scale)
    parts = [
        _panels(qkv[rows], constant[rows])
        for rows in (slice(0, n_qk), slice(n_qk, 2 * n_qk), slice(2 * n_qk, None))
    ]
    return PackedAttention(
        torch.cat(parts),
        _panels(proj, proj_constant),
        in_cols,
        out_cols,
        _widths(qk_widths, v_widths),
        qk_norm,
        1.0 if qk_norm is None else scale,
        eps,
        qk_eps,
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
) -> PackedMlp:
    """Fold the constants of an MLP sublayer and pack its two matrices. Arguments as mlp_sublayer."""
    fc1, fc1_constant = _fold_norm(fc1_weight, fc1_bias, norm_weight, norm_bias, in_cols)
    fc2, fc2_constant = _fold_layer_scale(
        _double(fc2_weight), None if fc2_bias is None else _double(fc2_bias), layer_scale
    )
    return PackedMlp(
        _panels(fc1, fc1_constant),
        _panels(fc2, fc2_constant),
        in_cols,
        out_cols,
        fc1.shape[0],
        ACTIVATION_IDS[activation],
        eps,
    )


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
        panels = _panels(weight.detach(), None if bias is None else bias.detach())
        return PackedLinear(panels, in_cols, out_cols, weight.shape[0], out_features, ACTIVATION_IDS[activation])

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
    qk_norm = _qk_norm_table(q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    return torch.ops.gohsp_kernels.cpu_attention(
        qkv, _widths(qk_widths, v_widths), qk_norm, scale, eps, sum(v_widths), num_queries
    )


def attention_sublayer(x: Tensor, *arguments: Any) -> Tensor:
    """Arguments in the order of the schema: 13 tensors, then qk_widths, v_widths, scale, eps, qk_eps, num_queries."""
    tensors, constants, num_queries = arguments[:13], arguments[13:18], arguments[18]
    packed = _cache.get(tensors[2], tensors, constants, lambda: pack_attention(*arguments[:18]))
    return packed(x, num_queries)


def mlp_sublayer(x: Tensor, *arguments: Any) -> Tensor:
    """Arguments in the order of the schema: 9 tensors, then activation and eps."""
    tensors, constants = arguments[:9], arguments[9:]
    return _cache.get(tensors[2], tensors, constants, lambda: pack_mlp(*arguments))(x)
