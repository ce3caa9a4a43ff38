# SPDX-License-Identifier: Apache-2.0
"""What timm's families of transformers have in common: MLPs and norms, opened, refused, and plain again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import GELU, GELUTanh, GluMlp, LayerNorm, LayerScale, QuickGELU, RmsNorm, SwiGLU
from timm.layers import Mlp as TimmMlp
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from gohsp.layers import (
    CompactLayerScale,
    PlaceColumns,
    PrunedBlock,
    PrunedMlp,
    SelectColumns,
    norm_kind,
    plain_linear,
)
from gohsp.models.base import Attention, BlockGeometry, Mlp, Projection
from gohsp.models.refusals import why_altered, why_linear

# name in gohsp_kernels -> plain module that computes it
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "identity": nn.Identity,
}

_NAMES: dict[type[nn.Module], str] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    nn.ReLU: "relu",
    nn.SiLU: "silu",
    nn.Identity: "identity",
}


def activation_name(module: nn.Module) -> str | None:
    """Return the name by which gohsp_kernels knows an activation module, or None if it does not know it."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _NAMES.get(type(module))


_MLPS = {TimmMlp: "", GluMlp: "packed", SwiGLU: "apart", GeGluMlp: "normed"}

# kind -> names of the layers that it reads with, and of that which it writes with
_LAYERS = {
    "": ("fc1", "fc2"),
    "packed": ("fc1", "fc2"),
    "apart": ("fc1_g", "fc1_x", "fc2"),
    "normed": ("w0", "w1", "w2"),
}


def is_gated(mlp: nn.Module) -> bool:
    """Return whether an MLP of timm's has a gate for each neuron."""
    return bool(_MLPS[type(mlp)])


def softmax_scale(attn: Any, width: int) -> float:
    """Return what an attention of timm's multiplies q k by before the softmax.

    Its fused path takes that from the width of the heads, whatever ``attn.scale`` says; models that other tools made
    narrower have an old value there.
    """
    return width**-0.5 if getattr(attn, "fused_attn", False) else float(attn.scale)


def open_attention(
    block: Any,
    read: Projection,
    write: Projection,
    scale: nn.Module,
    size: BlockGeometry,
    factor: float | None = None,
    **more: Any,
) -> Attention:
    """Return the attention half of a block of timm's.

    Args:
        block: It has ``norm1``, ``attn`` and ``drop_path1``.
        read, write, scale: See :class:`gohsp.models.base.Sublayer`.
        size: Sizes of the block.
        factor: On the scores, where it is not the usual one.
        more: What else the half has; see :class:`gohsp.models.base.Attention`.
    """
    attn = block.attn
    norms = {name: _norm_of(attn, own) for name, own in _NORMS_OF_ATTENTION.items()}
    return Attention(
        norm=block.norm1,
        body=attn,
        read=read,
        write=write,
        scale=scale,
        drop_path=block.drop_path1,
        geometry=size,
        softmax_scale=softmax_scale(attn, size.head_dim) if factor is None else factor,
        drop=getattr(attn, "attn_drop", nn.Dropout(0.0)),
        write_drop=getattr(attn, "proj_drop", nn.Identity()),
        **norms,
        **more,
    )


def _norm_of(module: Any, name: str) -> Any:
    """Return a norm that a module of timm's has under a name, or ``nn.Identity``."""
    norm = getattr(module, name, None)
    return nn.Identity() if norm is None else norm


_NORMS_OF_ATTENTION = {"q_norm": "q_norm", "k_norm": "k_norm", "inner_norm": "norm"}


def open_mlp(block: Any, scale: nn.Module, size: BlockGeometry) -> Mlp:
    """Return the MLP half of a block of timm's, which :func:`why_mlp` has nothing against.

    Args:
        block: It has ``norm2``, ``mlp`` and ``drop_path2``.
        scale: Layer scale of the half.
        size: Sizes of the block.
    """
    mlp = block.mlp
    kind = _MLPS[type(mlp)]
    *read, write = (getattr(mlp, name) for name in _LAYERS[kind])
    norm = "own_norm" if kind == "normed" else "inner_norm"
    return Mlp(
        norm=block.norm2,
        body=mlp,
        read=Projection(*read),
        write=Projection(write),
        scale=scale,
        drop_path=block.drop_path2,
        geometry=size,
        activation=activation_name(mlp.act) or "",
        drop=mlp.drop1,
        write_drop=mlp.drop2,
        gate="" if not kind else "last" if kind == "packed" and mlp.gate_last else "first",
        **{norm: mlp.norm},
    )


def why_norms(block: Any, *also: type[nn.Module]) -> str | None:
    """Return why the norms of a block are not those of the kernels, or None if they are.

    Args:
        block: It has ``norm1``, ``attn``, ``norm2`` and ``mlp``.
        also: Other classes of norms that the caller knows what to do with.
    """
    attn = block.attn
    q_norm, k_norm, inner = (_norm_of(attn, name) for name in ("q_norm", "k_norm", "norm"))
    halves = (
        {"norm1": block.norm1, "attn.q_norm": q_norm, "attn.k_norm": k_norm, "attn.norm": inner},
        {"norm2": block.norm2, "mlp.norm": _norm_of(block.mlp, "norm")},
    )
    for norms in halves:
        there = {name: norm for name, norm in norms.items() if not isinstance(norm, nn.Identity)}
        for name, norm in there.items():
            if type(norm) not in (nn.LayerNorm, LayerNorm, nn.RMSNorm, RmsNorm, *also):
                return f"{name} is {type(norm).__name__}; wanted LayerNorm or RMSNorm"
            if norm.weight is None or norm.eps is None:
                return f"{name} has no learned scale or no eps"
        if len({norm_kind(norm) for norm in there.values()}) > 1:
            return f"{', '.join(there)} are norms of different kinds"
    if isinstance(q_norm, nn.Identity) != isinstance(k_norm, nn.Identity):
        return "a norm on q or on k alone"
    if getattr(q_norm, "eps", None) != getattr(k_norm, "eps", None):
        return f"q and k norms of different eps ({q_norm.eps} and {k_norm.eps})"
    return None


def hidden_width(mlp: Any) -> int:
    """Return how many neurons an MLP of timm's has."""
    return int(getattr(mlp, _LAYERS[_MLPS[type(mlp)]][-1]).in_features)


def why_mlp(mlp: Any, dim: int, normed: bool = False) -> str | None:
    """Return why an MLP is not what the kernels compute into a residual stream of ``dim``, or None if it is.

    Args:
        mlp: The MLP.
        dim: Features of the stream.
        normed: Whether one that begins with a norm will do, GeGluMlp.
    """
    kind = _MLPS.get(type(mlp))
    if kind is None or (kind == "normed" and not normed):
        return f"mlp is {type(mlp).__name__}; wanted timm's Mlp, GluMlp{', GeGluMlp' if normed else ''} or SwiGLU"
    names = _LAYERS[kind]
    if reason := next(filter(None, (why_linear(f"mlp.{name}", getattr(mlp, name)) for name in names)), None):
        return reason
    outputs = getattr(mlp, names[-1]).out_features
    if outputs != dim:
        return f"MLP writes {outputs} features into a residual stream of {dim}"
    if activation_name(mlp.act) is None:
        return f"activation {type(mlp.act).__name__}; known are {', '.join(ACTIVATIONS)}"
    return None


def why_half_blocks(block: Any) -> str | None:
    """Return why the two halves of a block cannot be pruned exactly, whatever its attention does between its matrices.

    Args:
        block: It has ``norm1``, ``attn`` with ``qkv`` and ``proj``, ``norm2`` and ``mlp``.
    """
    return (
        why_altered(block)
        or why_norms(block)
        or why_linear("attn.qkv", block.attn.qkv)
        or why_linear("attn.proj", block.attn.proj)
        or why_mlp(block.mlp, block.norm2.normalized_shape[0])
    )


def check_blocks(model: Any, why: Callable[[Any], str | None]) -> None:
    """Refuse a model without blocks, or with one that ``why`` has a reason against.

    Raises:
        ValueError: It is such a model; the message names the block and the reason.
    """
    if not len(model.blocks):
        raise ValueError("model: it has no transformer blocks")
    for index, block in enumerate(model.blocks):
        if reason := why(block):
            raise ValueError(f"model: cannot prune blocks.{index}: {reason}")


def tokens_read(model: Any, prefix: int) -> int | None:
    """Return how many leading tokens are enough for the head of a compressed model, or None if all are needed.

    Args:
        model: Its head reads ``prefix`` tokens where it does not pool the patches.
        prefix: Two where a distillation token is read whatever the pooling, else one.
    """
    if model.training or model.grad_checkpointing or len(model.blocks) == 0:
        return None
    if getattr(model, "attn_pool", None) is not None:
        return None
    # A hook may look at tokens that the head does not read.
    if any(m._forward_hooks or m._forward_pre_hooks for m in (model.blocks, model.norm)):
        return None
    if model.blocks[-1]._forward_hooks or not isinstance(model.norm, nn.LayerNorm | RmsNorm | nn.Identity):
        return None
    return prefix if prefix == 2 or model.global_pool == "token" else None


def unfilled(kind: Any, **sizes: Any) -> Any:
    """Return a module whose parameters are about to be given to it: none is drawn, by whatever generator."""
    with torch.device("meta"):
        return kind(**sizes)


def then_select(norm: nn.Module, cols: Tensor | None) -> nn.Module:
    """Return a norm that gives the features that are read, of which there are all where ``cols`` is None."""
    return norm if cols is None else nn.Sequential(norm, SelectColumns(cols))


def selecting(layer: nn.Module, cols: Tensor | None) -> nn.Module:
    """Return a linear layer that reads these features alone, of which there are all where ``cols`` is None."""
    return layer if cols is None else nn.Sequential(SelectColumns(cols), layer)


def let_read(attn: Any, mlp: Any, block: PrunedBlock) -> None:
    """Let plain halves of a block, whose norms are behind them, read the features that the compact ones read."""
    attn.qkv = selecting(attn.qkv, block.attn.in_cols)
    for name in ("fc1", "fc1_g", "fc1_x"):
        if hasattr(mlp, name):
            setattr(mlp, name, selecting(getattr(mlp, name), block.mlp.in_cols))


def plain_norm(norm: Any, width: int) -> nn.Module:
    """Return a norm of ``width`` features as timm has it, if nothing of it is gone."""
    if isinstance(norm, nn.Identity) or norm.features != width:
        return norm
    plain = unfilled(RmsNorm if norm.kind == "rms" else LayerNorm, **{_FIRST[norm.kind]: norm.features})
    plain.weight, plain.eps = norm.weight, norm.eps
    if norm.kind == "layer":
        plain.bias = norm.bias
    return cast(nn.Module, plain)


_FIRST = {"rms": "channels", "layer": "num_channels"}


def plain_mlp(mlp: PrunedMlp) -> nn.Module:
    """Return timm's MLP with the parameters of a compact one.

    One that begins with a norm selects the features that it reads behind that; others read what they are given.
    """
    if not isinstance(mlp.norm, nn.Identity):
        return _plain_normed(mlp)
    if mlp.gate is None:
        plain = unfilled(TimmMlp, in_features=2)
        plain.fc1 = plain_linear(mlp.fc1)
    else:
        plain = unfilled(SwiGLU, in_features=2)
        plain.fc1_g, plain.fc1_x = plain_linear(mlp.gate), plain_linear(mlp.fc1)
    plain.act = ACTIVATIONS[mlp.activation]()
    plain.norm = plain_norm(mlp.inner_norm, mlp.fc1.weight.shape[0])
    plain.fc2 = plain_linear(mlp.fc2)
    plain.drop1, plain.drop2 = mlp.drop1, mlp.drop2
    return cast(nn.Module, plain)


def _plain_normed(mlp: PrunedMlp) -> nn.Module:
    plain = unfilled(GeGluMlp, in_features=2, hidden_features=2)
    plain.norm = then_select(mlp.norm, mlp.in_cols)
    gate: Any = mlp.gate  # timm has none such without
    plain.w0, plain.w1, plain.w2 = plain_linear(gate), plain_linear(mlp.fc1), plain_linear(mlp.fc2)
    plain.act = ACTIVATIONS[mlp.activation]()
    plain.drop1, plain.drop2 = mlp.drop1, mlp.drop2
    return cast(nn.Module, plain)


class HeadByHead(Projection):
    """A first matrix that gives q, k and v of one head, then those of the next; seen as all q, all k, all v.

    Args:
        layer: The linear layer. It is what is read and written.
        num_heads: H.
    """

    def __init__(self, layer: nn.Linear, num_heads: int) -> None:
        super().__init__(layer)
        rows = torch.arange(layer.out_features, device="cpu")
        self._order = rows.view(num_heads, 3, -1).transpose(0, 1).flatten()

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.layers[0].weight
        return weight.index_select(0, self._order.to(weight.device))

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.layers[0].bias
        return None if bias is None else bias.index_select(0, self._order.to(bias.device))

    def __call__(self, x: Tensor) -> Tensor:
        return self.layers[0](x).index_select(-1, self._order.to(x.device))

    @torch.no_grad()
    def write_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        inverse = self._order.argsort().to(weight.device)
        super().write_(weight.index_select(0, inverse), None if bias is None else bias.index_select(0, inverse))

    @torch.no_grad()
    def clear_(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        super().clear_(None if rows is None else rows[self._order.argsort().to(rows.device)], columns)

    def rows_by_head(self, weight: Tensor, num_heads: int) -> Tensor:
        return weight.view(num_heads, 3, -1, weight.shape[1])


class SplitBiases(Projection):
    """The q, k and v of an attention of timm's that is one matrix, with biases for q and for v apart from it.

    Args:
        attn: The attention. Its parameters are what is read and written.
    """

    def __init__(self, attn: Any) -> None:
        super().__init__(attn.qkv)
        self._q_bias, self._k_bias, self._v_bias = attn.q_bias, attn.k_bias, attn.v_bias

    @property
    def bias(self) -> Tensor | None:
        return torch.cat((self._q_bias, self._k_bias, self._v_bias))

    @property
    def has_bias(self) -> bool:
        return False

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    @torch.no_grad()
    def write_(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().write_(weight)
        if bias is not None:
            q, _, v = bias.chunk(3)
            self._q_bias.copy_(q)
            self._v_bias.copy_(v)

    @torch.no_grad()
    def clear_(self, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
        super().clear_(rows, columns)
        if rows is not None:
            q, _, v = rows.to(self._q_bias.device).chunk(3)
            self._q_bias[q] = 0
            self._v_bias[v] = 0


class _Gamma(nn.Module):
    """Layer scale that a block of timm's keeps as a parameter of its own, as a module."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def layer_scale(gamma: nn.Parameter | None) -> nn.Module:
    """Return the layer scale of a block that keeps it as a parameter, as a module."""
    return nn.Identity() if gamma is None else _Gamma(gamma)


def placed(linear: Any, cols: Tensor | None, features: int) -> nn.Module:
    """Return a plain linear layer with the parameters of a compact one, whose outputs go where they belong."""
    plain = plain_linear(linear)
    return plain if cols is None else nn.Sequential(plain, PlaceColumns(cols, features))


def whole_gamma(scale: nn.Module) -> nn.Parameter | None:
    """Return a factor for each residual feature, as timm's blocks keep them; None without layer scale."""
    if not isinstance(scale, CompactLayerScale):
        return None
    if scale.out_cols is None:
        return scale.gamma
    whole = scale.gamma.detach().new_ones(scale.dim).index_copy(0, scale.out_cols, scale.gamma.detach())
    return nn.Parameter(whole, requires_grad=scale.gamma.requires_grad)


def plain_scale(scale: nn.Module) -> nn.Module:
    """Return a layer scale as timm's blocks have it that keep it as a module."""
    gamma = whole_gamma(scale)
    if gamma is None:
        return nn.Identity()
    plain = unfilled(LayerScale, dim=2)
    plain.gamma = gamma
    return cast(nn.Module, plain)
