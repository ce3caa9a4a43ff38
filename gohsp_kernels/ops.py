# SPDX-License-Identifier: Apache-2.0
"""The public operators: tensors in, tensors out, the backend chosen call by call.

Column lists (``in_cols``, ``out_cols``) are int64, ascending and free of repeats; None stands for all columns. Weights
are *compact*: pruned rows and columns are gone from them. Any of the sizes may be zero.

Under ``torch.autocast`` a call computes in the dtype that autocast has for the device of ``x``, unless ``x`` is
float64, and the backend is chosen by that dtype. :func:`packed_linear` and :func:`ragged_attention` give that dtype, as
PyTorch's linear layer and attention do; a sublayer gives the dtype of its residual sum, which for a float32 ``x`` is
float32. On the reference every operation inside follows autocast's own list, so that the residual of a float32 ``x`` is
exact. A kernel reads ``x`` rounded to the dtype of autocast, the residual included, once a sublayer (once in all in a
:class:`~gohsp_kernels.SublayerChain`); statistics of norms, softmax and sums are float32 inside. Parameters stay
float32 and receive float32 gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _schemas, dispatch
from ._autocast import autocast_dtype, run_in
from .descriptors import (
    OPERATORS,
    Attention,
    AttentionSublayer,
    Descriptor,
    Linear,
    MlpSublayer,
    check_devices,
    check_number,
    check_tensor,
    wrong,
)
from .registry import BACKENDS, needs_grad


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _chosen(operator: Descriptor, backend: str | None, x: Tensor, dtype: torch.dtype, differentiable: bool) -> str:
    heads, rows = operator.widest_head, _rows(x)
    return dispatch.choose(backend, x.device, dtype, differentiable, heads, rows, operator.name, operator.parts)


def _on_reference(dtype: torch.dtype | None, operator: Descriptor, x: Tensor, num_queries: int | None) -> Tensor:
    """The reference, where autocast reaches each operation; a head without scores has none that would cast it."""
    if dtype is not None and not operator.residual:
        x = x.to(dtype)
    return BACKENDS["reference"].run(operator, x, num_queries)


def run(operator: Descriptor, x: Tensor, backend: str | None, num_queries: int | None = None) -> Tensor:
    """Compute a call whose arguments have been checked, on the named backend or the one that is chosen."""
    tensors = operator.tensors
    check_devices(x, tensors)
    differentiable = needs_grad((x, *tensors))
    dtype = autocast_dtype(x)

    def node(x: Tensor, *flat: Any) -> Tensor:
        return getattr(torch.ops.gohsp_kernels, operator.name)(x, *flat)

    if torch.compiler.is_compiling():
        # No kernel for the CPU takes less than float32.
        if differentiable or backend == "reference" or (dtype is not None and x.device.type == "cpu"):
            return _on_reference(dtype, operator, x, num_queries)
        # One node in the graph; the backend is chosen, and weights are packed, when it runs.
        return run_in(dtype, node, x, *operator.flat(num_queries), residual=operator.residual)
    if isinstance(x, FakeTensor) and not differentiable:  # only shapes are wanted, and nothing can be packed
        return run_in(dtype, node, x, *operator.flat(num_queries), residual=operator.residual)
    chosen = _chosen(operator, backend, x, dtype or x.dtype, differentiable)
    if chosen == "reference":
        return _on_reference(dtype, operator, x, num_queries)

    def compute(x: Tensor) -> Tensor:
        return BACKENDS[chosen].run(operator, x, num_queries)

    return run_in(dtype, compute, x, residual=operator.residual)


def _in_dtype_of(x: Tensor, arguments: Sequence[Any]) -> Sequence[Any]:
    """``arguments`` with float32 parameters in the dtype of a 16-bit ``x``, as autocast leaves them to the node."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return arguments
    return tuple(a.to(x.dtype) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in arguments)


def _graph_node(kind: type[Descriptor]) -> Callable[..., Tensor]:
    def node(x: Tensor, *flat: Any) -> Tensor:
        operator, num_queries = kind.from_flat(flat)
        check_tensor(kind.activations, x)
        if x.dim() != 3 if kind.attends else x.dim() == 0:
            raise wrong(kind.activations, "3 dimensions" if kind.attends else "at least 1", f"shape {list(x.shape)}")
        if kind.attends:
            check_queries(num_queries, x.shape[1])
            operator.check_images(x.shape[0], x.shape[1])
        # Not all could be checked while the call was traced, when nothing was in its columns yet.
        operator.check(x.shape[-1])
        check_devices(x, operator.tensors)
        chosen = _chosen(operator, None, x, x.dtype, False)
        if chosen == "reference":
            operator, _ = kind.from_flat(_in_dtype_of(x, flat))
        # Its result has the dtype of x: what autocast asks for was done when the call was traced.
        if autocast_dtype(x) is None:
            result = BACKENDS[chosen].run(operator, x, num_queries)
        else:
            with torch.autocast(x.device.type, enabled=False):
                result = BACKENDS[chosen].run(operator, x, num_queries)
        # A torch operator may not return one of its inputs, as an empty sublayer of the reference would.
        return result.clone() if result.data_ptr() == x.data_ptr() else result.contiguous()

    return node


_library = _schemas.register({name: _graph_node(kind) for name, kind in OPERATORS.items()})


def call(name: str, arguments: Sequence[Any], backend: str | None = None) -> Tensor:
    """Run an operator by name, past the checks of its function.

    Args:
        name: one of ``descriptors.OPERATORS``.
        arguments: in the order of its schema, the activations first.
        backend: name of a backend; None for the selected one.
    """
    x, *flat = arguments
    operator, num_queries = OPERATORS[name].from_flat(flat)
    return run(operator, x, backend, num_queries)


def check_queries(num_queries: int | None, tokens: int) -> int:
    if num_queries is None:
        return tokens
    check_number("num_queries", num_queries)
    if not 0 <= num_queries <= tokens:
        raise wrong("num_queries", f"0 to {tokens} (the number of tokens)", num_queries)
    return num_queries


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    in_cols: Tensor | None = None,
    out_cols: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "identity",
    backend: str | None = None,
) -> Tensor:
    """Linear layer with its pruned columns left out: gather, matrix product, bias, activation, scatter.

    Args:
        x: [..., features], float.
        weight: [outputs, inputs], the kept part; inputs is the length of ``in_cols``, or features.
        bias: [outputs].
        in_cols: columns of ``x`` that are read.
        out_cols: columns of the result that are written; the others are zero.
        out_features: width of the result; needed with ``out_cols``.
        activation: name of a function applied before the scatter: identity, gelu, gelu_tanh, relu, silu, quick_gelu.
        backend: name of a backend; None for the selected one.

    Returns:
        [..., out_features], of the dtype of ``x``.

    Raises:
        ValueError: for arguments that do not fit together.
        RuntimeError: if the named backend cannot run the call.
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise wrong("x", "at least 1 dimension", "a scalar")
    if out_features is None:
        check_tensor("weight", weight)
        out_features = weight.shape[0] if weight.dim() else 0
    linear = Linear(
        weight=weight,
        bias=bias,
        in_cols=in_cols,
        out_cols=out_cols,
        out_features=out_features,
        activation=activation,
    )
    linear.check(x.shape[-1])
    return run(linear, x, backend)


def ragged_attention(
    qkv: Tensor,
    qk_widths: Sequence[int],
    v_widths: Sequence[int],
    scale: float,
    *,
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    rope: Tensor | None = None,
    rope_pairs: str = "halves",
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    bias_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    num_queries: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over heads whose QK and V widths differ.

    Args:
        qkv: [batch, tokens, 2 * sum(qk_widths) + sum(v_widths)]: q of all heads, k of all heads, v of all heads.
        qk_widths: QK channels of each head. A head with none has equal scores: it gives the mean of its values, if
            nothing is added to them.
        v_widths: V channels of each head.
        scale: factor on the scores; for a pruned head that of its original width.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: [head width], LayerNorm on q and k of each head.
        rope: [2, tokens, sum(qk_widths) // 2], rotary positions: cosine and sine of the angle by which each pair of
            channels of q, and of k, is turned behind its norm; the pairs of a head stand side by side, heads in their
            order. Tokens without a position have cosine 1 and sine 0. All QK widths are even.
        rope_pairs: "halves", where channels c and c + w / 2 of a head of w are a pair, or "neighbours", where 2 c and
            2 c + 1 are.
        bias_table, bias_index: [positions, heads] and int64 [tokens, tokens], relative positions: row
            ``bias_index[query, key]`` of the table is added to the scaled scores, to each head's its own. A head
            without QK channels has these scores alone.
        bias_mask: [groups, tokens, tokens], added to the scores of all heads. Image i of the batch takes group
            i % groups, as windows of an image do that lie in the batch; the batch is a multiple of these.
        logit_scale: [heads], of cosine attention (Swin Transformer V2): q and k are divided by their lengths, and their
            products multiplied by exp(min(logit_scale, ln 100)) as well as by ``scale``. Not beside norms on q and k.
        norm: "layer", or "rms" where the norms on q and k are RMSNorms.
        eps: of those norms.
        num_queries: compute the first so many tokens only.
        backend: name of a backend; None for the selected one.

    Returns:
        [batch, num_queries, sum(v_widths)].

    Raises:
        ValueError: for arguments that do not fit together.
        RuntimeError: if the named backend cannot run the call.
    """
    check_tensor("qkv", qkv)
    if qkv.dim() != 3:
        raise wrong("qkv", "3 dimensions (batch, tokens, channels)", f"shape {list(qkv.shape)}")
    heads = Attention(
        q_norm_weight=q_norm_weight,
        q_norm_bias=q_norm_bias,
        k_norm_weight=k_norm_weight,
        k_norm_bias=k_norm_bias,
        rope=rope,
        bias_table=bias_table,
        bias_index=bias_index,
        bias_mask=bias_mask,
        logit_scale=logit_scale,
        qk_widths=tuple(qk_widths),
        v_widths=tuple(v_widths),
        rope_pairs=rope_pairs,
        norm=norm,
        scale=scale,
        eps=eps,
    )
    heads.check_input(qkv)
    heads.check_images(qkv.shape[0], qkv.shape[1])
    return run(heads, qkv, backend, check_queries(num_queries, qkv.shape[1]))


def attention_sublayer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    *,
    qk_widths: Sequence[int],
    v_widths: Sequence[int],
    scale: float,
    layer_scale: Tensor | None = None,
    in_cols: Tensor | None = None,
    out_cols: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    q_norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    k_norm_bias: Tensor | None = None,
    rope: Tensor | None = None,
    rope_pairs: str = "halves",
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    bias_mask: Tensor | None = None,
    logit_scale: Tensor | None = None,
    norm: str = "layer",
    inner_norm_weight: Tensor | None = None,
    inner_norm_bias: Tensor | None = None,
    inner_features: int = 0,
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
    inner_eps: float = 1e-6,
    post_norm: bool = False,
    num_queries: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x + layer_scale * proj(attention(qkv(LayerNorm(x))))`` with heads and columns left out.

    LayerNorm takes its statistics over all features of ``x``; ``in_cols`` is read after it. Residual columns outside
    ``out_cols`` pass unchanged. With ``post_norm`` it is ``x + layer_scale * LayerNorm(proj(attention(qkv(x))))``.

    Args:
        x: [batch, tokens, features], float.
        norm_weight, norm_bias: [features], LayerNorm's affine part, or None.
        qkv_weight: [2 * sum(qk_widths) + sum(v_widths), inputs]: rows of q, then k, then v, each head after head.
        qkv_bias: [2 * sum(qk_widths) + sum(v_widths)] or None.
        proj_weight: [outputs, sum(v_widths)].
        proj_bias: [outputs] or None.
        qk_widths, v_widths, scale: as in :func:`ragged_attention`.
        layer_scale: [outputs] or None.
        in_cols, out_cols: features that are read, and that are written.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: [head width], norms on q and k, with ``qk_eps``.
        rope, rope_pairs, bias_table, bias_index, bias_mask, logit_scale: as in :func:`ragged_attention`.
        norm: "layer", or "rms" where all norms here are RMSNorms, which take no mean.
        inner_norm_weight, inner_norm_bias: [sum(v_widths)], affine part of a norm on the outputs of all heads in front
            of proj, with ``inner_eps``.
        inner_features: what that norm divides by: the channels of all heads of the dense layer, as those that were
            pruned are zeros in it; 0 for no such norm.
        eps: of the norm on ``x``, or of that behind proj.
        post_norm: whether the norm stands behind proj instead. All columns are written then.
        num_queries: give the first so many tokens only; all tokens are still attended to.
        backend: name of a backend; None for the selected one.

    Returns:
        [batch, num_queries, features].

    Raises:
        ValueError: for arguments that do not fit together.
        RuntimeError: if the named backend cannot run the call.
    """
    check_tensor("x", x)
    if x.dim() != 3:
        raise wrong("x", "3 dimensions (batch, tokens, features)", f"shape {list(x.shape)}")
    sublayer = AttentionSublayer(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        qkv_weight=qkv_weight,
        qkv_bias=qkv_bias,
        proj_weight=proj_weight,
        proj_bias=proj_bias,
        layer_scale=layer_scale,
        in_cols=in_cols,
        out_cols=out_cols,
        q_norm_weight=q_norm_weight,
        q_norm_bias=q_norm_bias,
        k_norm_weight=k_norm_weight,
        k_norm_bias=k_norm_bias,
        inner_norm_weight=inner_norm_weight,
        inner_norm_bias=inner_norm_bias,
        rope=rope,
        bias_table=bias_table,
        bias_index=bias_index,
        bias_mask=bias_mask,
        logit_scale=logit_scale,
        qk_widths=tuple(qk_widths),
        v_widths=tuple(v_widths),
        rope_pairs=rope_pairs,
        norm=norm,
        scale=scale,
        eps=eps,
        qk_eps=qk_eps,
        inner_features=inner_features,
        inner_eps=inner_eps,
        post_norm=post_norm,
    )
    sublayer.check(x.shape[2])
    sublayer.check_images(x.shape[0], x.shape[1])
    return run(sublayer, x, backend, check_queries(num_queries, x.shape[1]))


def mlp_sublayer(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
    layer_scale: Tensor | None = None,
    in_cols: Tensor | None = None,
    out_cols: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    norm: str = "layer",
    inner_norm_weight: Tensor | None = None,
    inner_norm_bias: Tensor | None = None,
    inner_features: int = 0,
    eps: float = 1e-6,
    inner_eps: float = 1e-6,
    post_norm: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``x + layer_scale * fc2(activation(fc1(LayerNorm(x))))`` with neurons and columns left out.

    A gated MLP multiplies neuron by neuron: ``activation(gate(...)) * fc1(...)``. With ``post_norm`` it is
    ``x + layer_scale * LayerNorm(fc2(activation(fc1(x))))``.

    Args:
        x: [..., features], float.
        norm_weight, norm_bias: [features], LayerNorm's affine part, or None.
        fc1_weight: [hidden, inputs].
        fc1_bias: [hidden] or None.
        fc2_weight: [outputs, hidden].
        fc2_bias: [outputs] or None.
        activation: identity, gelu (exact), gelu_tanh, relu, silu or quick_gelu.
        layer_scale: [outputs] or None.
        in_cols, out_cols: features that are read after the norm, and that are written.
        gate_weight, gate_bias: [hidden, inputs] and [hidden], of a gated MLP (with silu, SwiGLU), or None.
        norm: "layer", or "rms" where all norms here are RMSNorms, which take no mean.
        inner_norm_weight, inner_norm_bias: [hidden], affine part of a norm on the hidden neurons, with ``inner_eps``.
        inner_features: what that norm divides by: the hidden neurons of the dense layer, as those that were pruned are
            zeros in it; 0 for no such norm.
        eps: of the norm on ``x``, or of that behind fc2.
        post_norm: whether the norm stands behind fc2 instead. All columns are written then.
        backend: name of a backend; None for the selected one.

    Returns:
        A tensor shaped like ``x``.

    Raises:
        ValueError: for arguments that do not fit together.
        RuntimeError: if the named backend cannot run the call.
    """
    check_tensor("x", x)
    if x.dim() == 0:
        raise wrong("x", "at least 1 dimension", "a scalar")
    sublayer = MlpSublayer(
        norm_weight=norm_weight,
        norm_bias=norm_bias,
        fc1_weight=fc1_weight,
        fc1_bias=fc1_bias,
        fc2_weight=fc2_weight,
        fc2_bias=fc2_bias,
        layer_scale=layer_scale,
        in_cols=in_cols,
        out_cols=out_cols,
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        inner_norm_weight=inner_norm_weight,
        inner_norm_bias=inner_norm_bias,
        activation=activation,
        norm=norm,
        eps=eps,
        inner_features=inner_features,
        inner_eps=inner_eps,
        post_norm=post_norm,
    )
    sublayer.check(x.shape[-1])
    return run(sublayer, x, backend)
