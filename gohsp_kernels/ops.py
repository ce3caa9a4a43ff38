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

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _schemas, cpu, cuda, dispatch, reference
from ._autocast import autocast_dtype, run_in
from ._cache import PackedCache


def _on_triton(name: str) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        from .triton import operators  # imports Triton, which a machine without a GPU need not have

        result: Tensor = getattr(operators, name)(*arguments)
        return result

    return run


_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Tensor]]] = {
    name: {
        "reference": getattr(reference, name),
        "cpu": getattr(cpu, name),
        "cuda": getattr(cuda, name),
        "triton": _on_triton(name),
    }
    for name in _schemas.PUBLIC
}

_RESIDUAL = ("attention_sublayer", "mlp_sublayer")  # operators whose result is x and something added to it


def _widest_head(arguments: Iterable[Any]) -> int:
    """Most channels that a head has: the tuples among the arguments are widths of heads."""
    return max((width for a in arguments if isinstance(a, tuple) for width in a), default=0)


def _rows(x: Tensor) -> int:
    return x.numel() // max(x.shape[-1], 1)


def _on_reference(name: str, dtype: torch.dtype | None, x: Tensor, *rest: Any) -> Tensor:
    """The reference, where autocast reaches each operation; a head without scores has none that would cast it."""
    if dtype is not None and name not in _RESIDUAL:
        x = x.to(dtype)
    return _IMPLEMENTATIONS[name]["reference"](x, *rest)


def _run(name: str, arguments: tuple[Any, ...], backend: str | None) -> Tensor:
    x, *rest = arguments
    residual = name in _RESIDUAL
    needs_grad = dispatch.needs_grad(arguments)
    dtype = autocast_dtype(x)
    if torch.compiler.is_compiling():
        # No kernel for the CPU takes less than float32.
        if needs_grad or backend == "reference" or (dtype is not None and x.device.type == "cpu"):
            return _on_reference(name, dtype, x, *rest)
        # One node in the graph; the backend is chosen, and weights are packed, when it runs.
        return run_in(dtype, getattr(torch.ops.gohsp_kernels, name), x, *rest, residual=residual)
    if isinstance(x, FakeTensor) and not needs_grad:  # only shapes are wanted, and nothing can be packed
        return run_in(dtype, getattr(torch.ops.gohsp_kernels, name), x, *rest, residual=residual)
    chosen = dispatch.choose(backend, x.device, dtype or x.dtype, needs_grad, _widest_head(arguments), _rows(x))
    if chosen == "reference":
        return _on_reference(name, dtype, x, *rest)
    return run_in(dtype, _IMPLEMENTATIONS[name][chosen], x, *rest, residual=residual)


def _in_dtype_of(x: Tensor, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """``arguments`` with float32 parameters in the dtype of a 16-bit ``x``, as autocast leaves them to the node."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return arguments
    return tuple(a.to(x.dtype) if isinstance(a, Tensor) and a.dtype == torch.float32 else a for a in arguments)


def _graph_node(name: str) -> Callable[..., Tensor]:
    def run(*arguments: Any) -> Tensor:
        # Torch hands lists of ints over; the functions compare layouts as tuples.
        plain: Any = tuple(tuple(a) if isinstance(a, list) else a for a in arguments)
        x = plain[0]
        _check_traced(name, plain)
        chosen = dispatch.choose(None, x.device, x.dtype, False, _widest_head(plain), _rows(x))
        if chosen == "reference":
            plain = _in_dtype_of(x, plain)
        # Its result has the dtype of x: what autocast asks for was done when the call was traced.
        if autocast_dtype(x) is None:
            result = _IMPLEMENTATIONS[name][chosen](*plain)
        else:
            with torch.autocast(x.device.type, enabled=False):
                result = _IMPLEMENTATIONS[name][chosen](*plain)
        # A torch operator may not return one of its inputs, as an empty sublayer of the reference would.
        return result.clone() if result.data_ptr() == x.data_ptr() else result.contiguous()

    return run


_library = _schemas.register({name: _graph_node(name) for name in _schemas.PUBLIC})


def wrong(argument: str, wanted: str, got: object) -> ValueError:
    return ValueError(f"{argument}: wanted {wanted}; got {got}")


def _check_shape(argument: str, tensor: Tensor | None, *shape: int) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise wrong(argument, f"shape {list(shape)}", f"shape {list(tensor.shape)}")


_widths_needed = PackedCache(by_content=False)


def _width_needed(cols: Tensor) -> int:
    """Fewest features that have the columns ``cols``; -1 if these do not ascend from 0 on, without repeats."""
    columns = cols.tolist()
    ascend = all(before < after for before, after in pairwise([-1, *columns]))
    return max(columns, default=-1) + 1 if ascend else -1


def _shown(columns: Sequence[int]) -> str:
    """The list; of a long one only its ends, and the place where it first fails to ascend."""
    if len(columns) <= 16:
        return str(list(columns))
    ends = f"[{', '.join(map(str, columns[:4]))}, ..., {columns[-1]}]"
    falls = (i for i, (before, after) in enumerate(pairwise(columns)) if before >= after)
    return ends + next((f", where {columns[i + 1]} follows {columns[i]}" for i in falls), "")


def _columns(argument: str, cols: Tensor | None, features: int) -> int:
    """Number of kept columns."""
    if cols is None:
        return features
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


def _check_activation(activation: str) -> None:
    if activation not in reference.ACTIVATIONS:
        raise wrong("activation", f"one of {', '.join(reference.ACTIVATIONS)}", repr(activation))


def _check_widths(qk_widths: Sequence[int], v_widths: Sequence[int]) -> None:
    if len(qk_widths) != len(v_widths):
        raise wrong("v_widths", f"{len(qk_widths)} heads, as in qk_widths", f"{len(v_widths)}")
    if any(width < 0 for width in (*qk_widths, *v_widths)):
        raise wrong("qk_widths, v_widths", "no negative width", f"{list(qk_widths)}, {list(v_widths)}")


def _check_qk_norm(qk_widths: Sequence[int], norms: dict[str, Tensor | None]) -> None:
    width = qk_widths[0] if qk_widths else 0
    if norms["q_norm_weight"] is None and norms["k_norm_weight"] is None:
        return
    if len(set(qk_widths)) > 1:
        raise wrong("qk_widths", "one width for all heads, as the model has a q and k norm", list(qk_widths))
    for argument, tensor in norms.items():
        if tensor is None and argument.endswith("weight"):
            raise wrong(argument, "a weight for both the q and the k norm, or for neither", None)
        if qk_widths:
            _check_shape(argument, tensor, width)


def _named_norms(
    q_norm_weight: Tensor | None, q_norm_bias: Tensor | None, k_norm_weight: Tensor | None, k_norm_bias: Tensor | None
) -> dict[str, Tensor | None]:
    return {
        "q_norm_weight": q_norm_weight,
        "q_norm_bias": q_norm_bias,
        "k_norm_weight": k_norm_weight,
        "k_norm_bias": k_norm_bias,
    }


def check_attention(features: int, tensors: Sequence[Any], constants: tuple[Any, ...]) -> None:
    """Tensors and constants in the order of the schema."""
    norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, in_cols, out_cols = tensors[:9]
    qk_widths, v_widths = constants[:2]
    _check_widths(qk_widths, v_widths)
    channels = 2 * sum(qk_widths) + sum(v_widths)
    _check_shape("norm_weight", norm_weight, features)
    _check_shape("norm_bias", norm_bias, features)
    _check_shape("qkv_weight", qkv_weight, channels, _columns("in_cols", in_cols, features))
    _check_shape("qkv_bias", qkv_bias, channels)
    outputs = _columns("out_cols", out_cols, features)
    _check_shape("proj_weight", proj_weight, outputs, sum(v_widths))
    _check_shape("proj_bias", proj_bias, outputs)
    _check_shape("layer_scale", layer_scale, outputs)
    _check_qk_norm(qk_widths, _named_norms(*tensors[9:]))


def check_mlp(features: int, tensors: Sequence[Any], constants: tuple[Any, ...]) -> None:
    """Tensors and constants in the order of the schema."""
    norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, in_cols, out_cols = tensors
    _check_activation(constants[0])
    hidden = fc1_weight.shape[0]
    _check_shape("norm_weight", norm_weight, features)
    _check_shape("norm_bias", norm_bias, features)
    _check_shape("fc1_weight", fc1_weight, hidden, _columns("in_cols", in_cols, features))
    _check_shape("fc1_bias", fc1_bias, hidden)
    outputs = _columns("out_cols", out_cols, features)
    _check_shape("fc2_weight", fc2_weight, outputs, hidden)
    _check_shape("fc2_bias", fc2_bias, outputs)
    _check_shape("layer_scale", layer_scale, outputs)


def _check_traced(name: str, arguments: tuple[Any, ...]) -> None:
    """What could not be checked while a call was traced, when nothing was in its columns yet."""
    features = arguments[0].shape[-1]
    if name == "packed_linear":
        _columns("in_cols", arguments[3], features)
        _columns("out_cols", arguments[4], arguments[5])
    elif name == "attention_sublayer":
        check_attention(features, arguments[1:14], arguments[14:19])
    elif name == "mlp_sublayer":
        check_mlp(features, arguments[1:10], arguments[10:])


def check_queries(num_queries: int | None, tokens: int) -> int:
    if num_queries is None:
        return tokens
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
    if x.dim() == 0:
        raise wrong("x", "at least 1 dimension", "a scalar")
    _check_activation(activation)
    features = weight.shape[0] if out_features is None else out_features
    _check_shape("weight", weight, _columns("out_cols", out_cols, features), _columns("in_cols", in_cols, x.shape[-1]))
    _check_shape("bias", bias, weight.shape[0])
    return _run("packed_linear", (x, weight, bias, in_cols, out_cols, features, activation), backend)


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
    eps: float = 1e-6,
    num_queries: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention over heads whose QK and V widths differ.

    Args:
        qkv: [batch, tokens, 2 * sum(qk_widths) + sum(v_widths)]: q of all heads, k of all heads, v of all heads.
        qk_widths: QK channels of each head. A head with none has equal scores: it gives the mean of its values.
        v_widths: V channels of each head.
        scale: factor on the scores; for a pruned head that of its original width.
        q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias: [head width], LayerNorm on q and k of each head.
        eps: of those norms.
        num_queries: compute the first so many tokens only.
        backend: name of a backend; None for the selected one.

    Returns:
        [batch, num_queries, sum(v_widths)].

    Raises:
        ValueError: for arguments that do not fit together.
        RuntimeError: if the named backend cannot run the call.
    """
    if qkv.dim() != 3:
        raise wrong("qkv", "3 dimensions (batch, tokens, channels)", f"shape {list(qkv.shape)}")
    qk_widths, v_widths = tuple(qk_widths), tuple(v_widths)
    _check_widths(qk_widths, v_widths)
    _check_shape("qkv", qkv, qkv.shape[0], qkv.shape[1], 2 * sum(qk_widths) + sum(v_widths))
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    _check_qk_norm(qk_widths, _named_norms(*norms))
    queries = check_queries(num_queries, qkv.shape[1])
    return _run("ragged_attention", (qkv, *norms, qk_widths, v_widths, scale, eps, queries), backend)


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
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
    num_queries: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``x + layer_scale * proj(attention(qkv(LayerNorm(x))))`` with heads and columns left out.

    LayerNorm takes its statistics over all features of ``x``; ``in_cols`` is read after it. Residual columns outside
    ``out_cols`` pass unchanged.

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
        eps: of the LayerNorm on ``x``.
        num_queries: give the first so many tokens only; all tokens are still attended to.
        backend: name of a backend; None for the selected one.

    Returns:
        [batch, num_queries, features].

    Raises:
        ValueError: for arguments that do not fit together.
        RuntimeError: if the named backend cannot run the call.
    """
    if x.dim() != 3:
        raise wrong("x", "3 dimensions (batch, tokens, features)", f"shape {list(x.shape)}")
    qk_widths, v_widths = tuple(qk_widths), tuple(v_widths)
    norms = (q_norm_weight, q_norm_bias, k_norm_weight, k_norm_bias)
    tensors = (norm_weight, norm_bias, qkv_weight, qkv_bias, proj_weight, proj_bias, layer_scale, in_cols, out_cols)
    constants = (qk_widths, v_widths, scale, eps, qk_eps)
    check_attention(x.shape[2], (*tensors, *norms), constants)
    arguments = (x, *tensors, *norms, *constants, check_queries(num_queries, x.shape[1]))
    return _run("attention_sublayer", arguments, backend)


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
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """``x + layer_scale * fc2(activation(fc1(LayerNorm(x))))`` with neurons and columns left out.

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
        eps: of the LayerNorm.
        backend: name of a backend; None for the selected one.

    Returns:
        A tensor shaped like ``x``.

    Raises:
        ValueError: for arguments that do not fit together.
        RuntimeError: if the named backend cannot run the call.
    """
    if x.dim() == 0:
        raise wrong("x", "at least 1 dimension", "a scalar")
    tensors = (norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, layer_scale, in_cols, out_cols)
    check_mlp(x.shape[-1], tensors, (activation, eps))
    return _run("mlp_sublayer", (x, *tensors, activation, eps), backend)
