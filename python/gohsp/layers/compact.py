# SPDX-License-Identifier: Apache-2.0
"""Drop-in replacements for the attention, the MLP and the block of a vision transformer that hold compact parameters.

State dicts carry timm's names with the pruned rows and columns gone. The index lists that tell which columns of the
residual stream a matrix reads and writes are not in the state dict: they come from the mask.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm, RmsNorm
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

import gohsp_kernels as gk
from gohsp.layers.attention import attend, head_angles, head_masks
from gohsp.layers.norms import CompactNorm, norm_kind
from gohsp.layers.position_bias import PositionBias
from gohsp.masks.layout import BlockLayout
from gohsp.masks.mask import BlockMask
from gohsp.models.base import Attention, CompactBlock, Mlp, OpenBlock, Projection
from gohsp_kernels.reference import gather_columns, scatter_columns

# Hooks before a forward pass that compute the weight it uses.
_WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


class CompactLinear(nn.Module):
    """Weight and bias of a linear layer whose pruned rows and columns are gone.

    Not an ``nn.Linear``, so that tools which swap linear layers (quantisers, adapters) leave it alone: the modules here
    read its parameters, and call it only where a hook hangs on it or another module was put in its place.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the product [..., rows] for kept columns [..., columns]."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, bias={self.bias is not None}"


class CompactLayerScale(nn.Module):
    """Layer scale that holds one factor for each residual feature that its sublayer writes."""

    out_cols: Tensor | None

    def __init__(self, scale: Any, out_cols: Tensor | None) -> None:
        super().__init__()
        self.dim: int = scale.gamma.numel()
        self.gamma = _cut(scale.gamma, out_cols)
        _register_columns(self, "out_cols", out_cols, self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        """Return x [..., D] times the factors; features that are not written are zero in x and stay so."""
        if self.out_cols is None:
            return x * self.gamma
        return x * self.gamma.new_zeros(self.dim).index_copy(0, self.out_cols, self.gamma)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()} of {self.dim}"


class PrunedAttention(nn.Module):
    """Multi-head self-attention whose heads differ in width, called like :class:`timm.layers.Attention`.

    Args:
        attn: The dense half block to cut. It is not changed.
        layout: What to keep of it.
    """

    in_cols: Tensor | None
    out_cols: Tensor | None
    rope: Tensor | None

    def __init__(self, attn: Attention, layout: BlockLayout) -> None:
        super().__init__()
        self.dim: int = attn.write.out_features
        self.num_heads: int = attn.geometry.num_heads  # of the dense one: what an attention mask may be shaped for
        self.scale = attn.softmax_scale  # of the original head width, which the scores of a cut head still need
        self.heads = layout.heads
        self.qk_widths = layout.qk_widths
        self.v_widths = layout.v_widths
        self.qkv = _cut_linear(attn.read, layout.qkv_rows, layout.attn_in)
        self.q_norm = copy.deepcopy(attn.q_norm)
        self.k_norm = copy.deepcopy(attn.k_norm)
        self.inner_norm = _cut_norm(attn.inner_norm, layout.proj_cols)
        self.rope_pairs = attn.rope_pairs
        self.position_bias = None if attn.bias is None else PositionBias(attn.bias, layout.heads)
        heads = torch.tensor(layout.heads, dtype=torch.int64, device="cpu")
        self.logit_scale = None if attn.logit_scale is None else _cut(attn.logit_scale, heads)
        self.attn_drop = copy.deepcopy(attn.drop)
        self.proj = _cut_linear(attn.write, layout.attn_out, layout.proj_cols)
        self.proj_drop = copy.deepcopy(attn.write_drop)
        _register_columns(self, "in_cols", layout.attn_in, self.qkv.weight)
        _register_columns(self, "out_cols", layout.attn_out, self.qkv.weight)
        _register_columns(self, "rope", None if attn.rope is None else self.angles(attn.rope.detach()), self.qkv.weight)

    def angles(self, rope: Tensor) -> Tensor:
        """Return rotary positions as the kernels take them, for the heads that are left.

        Args:
            rope: [2, H or 1, N, d / 2], see :class:`gohsp.models.base.Attention`.

        Returns:
            [2, N, sum of d / 2 of the heads that are left].
        """
        return head_angles(rope, self.num_heads, self.heads)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the attention output, zero in the features that are not written.

        Args:
            x: [B, N, D].
            attn_mask: Bool (True = may attend) or additive in the dtype of x, broadcastable to [B, H, N, N] for the H
                heads of the dense module.
            is_causal: Attend to earlier tokens only; not together with a mask.

        Raises:
            ValueError: The mask has the wrong shape or dtype, or comes together with ``is_causal``.
        """
        return self.attend(x, attn_mask, is_causal)

    def attend(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, rope: Tensor | None = None
    ) -> Tensor:
        """Do the work of :meth:`forward`, on request with rotary positions other than its own.

        Args:
            x, attn_mask, is_causal: See :meth:`forward`.
            rope: As :meth:`angles` gives them.
        """
        qkv = _product(self.qkv, x, in_cols=self.in_cols)
        rope = self.rope if rope is None else rope
        dropout = self.attn_drop.p if self.training else 0.0
        fused = all(_is_as_made(norm) and not _is_hooked(norm) for norm in (self.q_norm, self.k_norm))
        if fused and attn_mask is None and not is_causal and dropout == 0.0:
            more: dict[str, Any] = {"rope": rope, "rope_pairs": self.rope_pairs, **self.qk_norm_arguments()}
            more |= self.score_arguments()
            heads = gk.ragged_attention(qkv, self.qk_widths, self.v_widths, self.scale, **more)
        else:
            masks = head_masks(attn_mask, is_causal, self.heads, (x.shape[0], self.num_heads, x.shape[1]), x.dtype)
            heads = attend(self, qkv, masks, is_causal, dropout, rope)
        return self.proj_drop(
            _product(self.proj, self.inner_norm(heads), out_cols=self.out_cols, out_features=self.dim)
        )

    def qk_norm_arguments(self) -> dict[str, Any]:
        """Return the q and k norms as :func:`gohsp_kernels.ragged_attention` takes them; empty without qk-norm."""
        q, k = self.q_norm, self.k_norm
        if isinstance(q, nn.Identity):
            return {}
        return {
            "q_norm_weight": q.weight,
            "q_norm_bias": getattr(q, "bias", None),
            "k_norm_weight": k.weight,
            "k_norm_bias": getattr(k, "bias", None),
            "norm": norm_kind(q),
            "eps": q.eps,
        }

    def score_arguments(self) -> dict[str, Any]:
        """Return what makes scores of cosines, and what is added to them, as :func:`gohsp_kernels.ragged_attention`
        takes it; empty without."""
        bias = self.position_bias
        found: dict[str, Any] = {} if self.logit_scale is None else {"logit_scale": self.logit_scale}
        if bias is not None:
            found |= {"bias_table": bias.table, "bias_index": bias.index, "bias_mask": bias.mask}
        return found

    def extra_repr(self) -> str:
        return f"heads={self.heads}, qk={self.qk_widths}, v={self.v_widths}, scale={self.scale:.6g}"


class PrunedMlp(nn.Module):
    """MLP without its pruned neurons and columns, called like :class:`timm.layers.Mlp`.

    Args:
        mlp: The dense half block to cut. It is not changed.
        layout: What to keep of it.
    """

    in_cols: Tensor | None
    out_cols: Tensor | None

    def __init__(self, mlp: Mlp, layout: BlockLayout) -> None:
        super().__init__()
        self.dim: int = mlp.write.out_features
        self.norm = copy.deepcopy(mlp.own_norm)
        self.activation: str = mlp.activation
        neurons, gates = layout.hidden, None
        if mlp.gate:
            halves = layout.hidden, layout.hidden + mlp.geometry.hidden
            neurons, gates = halves if mlp.gate == "last" else halves[::-1]
        self.fc1 = _cut_linear(mlp.read, neurons, layout.mlp_in)
        self.gate = None if gates is None else _cut_linear(mlp.read, gates, layout.mlp_in)
        self.drop1 = copy.deepcopy(mlp.drop)
        self.inner_norm = _cut_norm(mlp.inner_norm, layout.hidden)
        self.fc2 = _cut_linear(mlp.write, layout.mlp_out, layout.hidden)
        self.drop2 = copy.deepcopy(mlp.write_drop)
        _register_columns(self, "in_cols", layout.mlp_in, self.fc1.weight)
        _register_columns(self, "out_cols", layout.mlp_out, self.fc1.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output [..., D] for x [..., D], zero in the features that are not written."""
        x = self.norm(x)
        if self.gate is None:
            hidden = _product(self.fc1, x, in_cols=self.in_cols, activation=self.activation)
        else:
            gates = _product(self.gate, x, in_cols=self.in_cols, activation=self.activation)
            hidden = gates * _product(self.fc1, x, in_cols=self.in_cols)
        hidden = self.inner_norm(self.drop1(hidden))
        return self.drop2(_product(self.fc2, hidden, out_cols=self.out_cols, out_features=self.dim))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"


class PrunedBlock(CompactBlock):
    """Transformer block with compact parameters, called like timm's Block; its norms are in front of both halves, or
    behind them.

    Each half runs as one fused sublayer, so the modules inside are not called one by one. They are where the fused form
    does not apply: dropout or drop path in training, an attention mask, a hook on any of them, or another module in
    the place of qkv, proj, fc1 or fc2, such as an adapter.

    Args:
        block: The dense block to cut. It is not changed.
        mask: What to keep of it; copied.
    """

    def __init__(self, block: OpenBlock, mask: BlockMask) -> None:
        super().__init__()
        self.mask, self.geometry = mask.clone(), block.geometry
        layout, attention, mlp = mask.layout(), block.attention, block.mlp
        self.norm1 = copy.deepcopy(attention.norm)
        self.attn = PrunedAttention(attention, layout)
        self.ls1 = _cut_layer_scale(attention.scale, layout.attn_out)
        self.drop_path1 = copy.deepcopy(attention.drop_path)
        self.norm2 = copy.deepcopy(mlp.norm)
        self.mlp = PrunedMlp(mlp, layout)
        self.ls2 = _cut_layer_scale(mlp.scale, layout.mlp_out)
        self.drop_path2 = copy.deepcopy(mlp.drop_path)
        self.train(block.module.training)

    @property
    def post_norm(self) -> bool:
        """Whether the norms are behind what they belong to."""
        return self.geometry.post_norm

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, num_queries: int | None = None
    ) -> Tensor:
        """Return the block's output.

        Args:
            x: [B, N, D].
            attn_mask, is_causal: See :class:`PrunedAttention`.
            num_queries: Give the first so many tokens only; they still attend to all N.

        Returns:
            [B, num_queries or N, D].

        Raises:
            ValueError: See :class:`PrunedAttention`, or ``num_queries`` is not one of 0 to N.
        """
        return self.run(x, attn_mask, is_causal, num_queries)

    def run(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        num_queries: int | None = None,
        rope: Tensor | None = None,
    ) -> Tensor:
        """Do the work of :meth:`forward`, on request with rotary positions other than its own.

        Args:
            x, attn_mask, is_causal, num_queries: See :meth:`forward`.
            rope: As :meth:`PrunedAttention.angles` gives them.
        """
        if attn_mask is not None or is_causal or self.must_call_modules():
            y = self._by_modules(x, attn_mask, is_causal, rope)
            return y if num_queries is None else y[:, :num_queries]
        if self.is_one_chain():
            return gk.SublayerChain(self.sublayers(rope))(x, num_queries=num_queries)
        attention, mlp = self.sublayers(rope)
        return behind_norm(
            self.norm2, gk.SublayerChain([mlp]), gk.SublayerChain([attention])(x, num_queries=num_queries)
        )

    def is_one_chain(self) -> bool:
        """Return whether both halves run as one chain: an MLP that begins with a norm stands behind two."""
        return isinstance(self.mlp.norm, nn.Identity)

    def halves(self) -> tuple[tuple[nn.Module, ...], tuple[nn.Module, ...]]:
        return (self.norm1, self.attn, self.ls1), (self.norm2, self.mlp, self.ls2)

    def must_call_modules(self) -> bool:
        """Return whether the fused sublayers would leave something out: a hook, an adapter, or dropout in training."""
        if not self.is_as_made() or any(map(_is_hooked, self._inside())):
            return True
        return self.training and any(map(_drops, self._drop_modules()))

    def is_as_made(self) -> bool:
        """Return whether the modules inside run the code of the classes that the fused sublayers stand for."""
        return all(map(_is_as_made, self._inside()))

    def what_was_added(self) -> str | None:
        """Return what hangs on the block beside its weights, hooks or other modules, or None if nothing does."""
        inside = set(self._inside())
        for name, module in self.named_modules():
            if module is not self and module not in inside:
                continue
            if self.is_hooked() if module is self else _is_hooked(module):
                return f"a hook hangs on {name or 'the block'}"
            if module is not self and not _is_as_made(module):
                kind = type(module)
                return f"{name} is {kind.__module__}.{kind.__qualname__}, with code of its own"
        return None

    def is_hooked(self) -> bool:
        """Return whether a hook hangs on the block itself."""
        return any(hook_tables(self))

    def _holders(self) -> tuple[Any, ...]:
        gate = () if self.mlp.gate is None else (self.mlp.gate,)
        return self.attn.qkv, self.attn.proj, self.mlp.fc1, *gate, self.mlp.fc2

    def _inside(self) -> tuple[nn.Module, ...]:
        attn = self.attn
        norms = self.norm1, attn.q_norm, attn.k_norm, attn.inner_norm, self.norm2, self.mlp.norm, self.mlp.inner_norm
        bias = () if attn.position_bias is None else (attn.position_bias,)
        return attn, self.mlp, *norms, *bias, *self._holders(), self.ls1, self.ls2, *self._drop_modules()

    def _drop_modules(self) -> tuple[nn.Module, ...]:
        attn, mlp = self.attn, self.mlp
        return attn.attn_drop, attn.proj_drop, self.drop_path1, mlp.drop1, mlp.drop2, self.drop_path2

    def _by_modules(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, rope: Tensor | None) -> Tensor:
        def attend(seen: Tensor) -> Tensor:
            if rope is None:
                return self.attn(seen, attn_mask=attn_mask, is_causal=is_causal)
            return self.attn.attend(seen, attn_mask, is_causal, rope)

        x = x + self.drop_path1(self.ls1(self.normed(self.norm1, attend, x)))
        return x + self.drop_path2(self.ls2(self.normed(self.norm2, self.mlp, x)))

    def normed(self, norm: nn.Module, half: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return what a half of the block gives, with its norm where that belongs, [B, N, D] for x [B, N, D]."""
        return norm(half(x)) if self.post_norm else half(norm(x))

    def sublayers(self, rope: Tensor | None = None) -> tuple[partial[Tensor], partial[Tensor]]:
        """Return the two halves of the block as members of a :class:`gohsp_kernels.SublayerChain`.

        Where they are not one chain, the second is for what ``norm2`` gives; see :func:`behind_norm`.

        Args:
            rope: See :meth:`run`.
        """
        for holder in self._holders():
            _compute_weight(holder)
        return self._attention_sublayer(rope), self._mlp_sublayer()

    def _attention_sublayer(self, rope: Tensor | None) -> partial[Tensor]:
        norm, attn, scale = self.norm1, self.attn, self.ls1
        qkv, proj = attn.qkv, attn.proj
        qk_norm = attn.qk_norm_arguments()
        qk_norm.pop("norm", None)  # all norms of a sublayer are of one kind
        return partial(
            gk.attention_sublayer,
            norm_weight=norm.weight,
            norm_bias=getattr(norm, "bias", None),
            qkv_weight=qkv.weight,
            qkv_bias=qkv.bias,
            proj_weight=proj.weight,
            proj_bias=proj.bias,
            qk_widths=attn.qk_widths,
            v_widths=attn.v_widths,
            scale=attn.scale,
            layer_scale=getattr(scale, "gamma", None),
            in_cols=attn.in_cols,
            out_cols=attn.out_cols,
            eps=norm.eps,
            qk_eps=qk_norm.pop("eps", norm.eps),
            norm=norm_kind(norm),
            rope=attn.rope if rope is None else rope,
            rope_pairs=attn.rope_pairs,
            post_norm=self.post_norm,
            **_inner_norm_arguments(attn.inner_norm),
            **attn.score_arguments(),
            **qk_norm,
        )

    def _mlp_sublayer(self) -> partial[Tensor]:
        mlp, scale = self.mlp, self.ls2
        norm = self.norm2 if self.is_one_chain() else mlp.norm
        fc1, fc2 = mlp.fc1, mlp.fc2
        return partial(
            gk.mlp_sublayer,
            norm_weight=norm.weight,
            norm_bias=getattr(norm, "bias", None),
            fc1_weight=fc1.weight,
            fc1_bias=fc1.bias,
            gate_weight=None if mlp.gate is None else mlp.gate.weight,
            gate_bias=None if mlp.gate is None else mlp.gate.bias,
            fc2_weight=fc2.weight,
            fc2_bias=fc2.bias,
            activation=mlp.activation,
            layer_scale=getattr(scale, "gamma", None),
            in_cols=mlp.in_cols,
            out_cols=mlp.out_cols,
            eps=norm.eps,
            norm=norm_kind(norm),
            post_norm=self.post_norm,
            **_inner_norm_arguments(mlp.inner_norm),
        )


def behind_norm(norm: Any, sublayer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return the residual stream [B, N, D] behind a sublayer that reads what a norm gives.

    A sublayer adds what it computes to what it reads, and that is not the stream here: it is taken off again.
    """
    seen = norm(x)
    return x + (sublayer(seen) - seen)


def _inner_norm_arguments(norm: Any) -> dict[str, Any]:
    """A norm in front of the last matrix as :func:`gohsp_kernels.attention_sublayer` takes it; empty without one."""
    if isinstance(norm, nn.Identity):
        return {}
    return {
        "inner_norm_weight": norm.weight,
        "inner_norm_bias": norm.bias,
        "inner_features": norm.features,
        "inner_eps": norm.eps,
    }


def _product(
    holder: Any,
    x: Tensor,
    in_cols: Tensor | None = None,
    out_cols: Tensor | None = None,
    out_features: int | None = None,
    activation: str = "identity",
) -> Tensor:
    """What the kernels compute with the weights of a linear layer, or what its call gives where it must be called."""
    if _is_as_made(holder) and not _is_hooked(holder):
        _compute_weight(holder)
        return gk.packed_linear(
            x,
            holder.weight,
            holder.bias,
            in_cols=in_cols,
            out_cols=out_cols,
            out_features=out_features,
            activation=activation,
        )
    y = gk.ACTIVATIONS[activation](holder(gather_columns(x, in_cols)))
    return y if out_features is None else scatter_columns(y, out_cols, out_features)


def _compute_weight(holder: nn.Module) -> None:
    """Let ``torch.nn.utils.prune``, ``weight_norm`` and ``spectral_norm`` set the weight that they compute.

    They do so in a hook before the forward pass of the module that they hang on, and a parameter holder is not called
    as a rule. Newer parametrizations need nothing: they compute the weight when it is read.
    """
    for hook in holder._forward_pre_hooks.values():
        if isinstance(hook, _WEIGHT_HOOKS):
            hook(holder, ())


# Of the classes that a block is made with. Subclasses without a forward of their own, as FSDP and parametrizations make
# them, run the same code.
_CODE = {
    kind.forward
    for kind in (
        *(CompactLinear, CompactLayerScale, CompactNorm, PositionBias, PrunedAttention, PrunedMlp),
        *(nn.LayerNorm, LayerNorm, nn.RMSNorm, RmsNorm, nn.Identity, nn.Dropout, DropPath),
    )
}


def _is_as_made(module: nn.Module) -> bool:
    return type(module).forward in _CODE and "forward" not in vars(module)


def is_computed(module: nn.Module) -> bool:
    """Return whether the module reads a tensor that is not a parameter or buffer, but made of others."""
    return is_parametrized(module) or any(isinstance(value, Tensor) for value in vars(module).values())


def _is_hooked(module: nn.Module) -> bool:
    """Whether a hook hangs on the module, other than those that :func:`_compute_weight` calls."""
    if type(module).forward is not CompactLinear.forward:
        return any(hook_tables(module))
    return any(not isinstance(hook, _WEIGHT_HOOKS) for table in hook_tables(module) for hook in table.values())


def _drops(module: Any) -> bool:
    return getattr(module, "p", None) or getattr(module, "drop_prob", None) or False


def _cut(values: Tensor, rows: Tensor | None, cols: Tensor | None = None) -> nn.Parameter:
    """Return a new parameter with the kept rows and columns; None keeps all."""
    kept = values.detach()
    if rows is not None:
        kept = kept.index_select(0, rows.to(kept.device))
    if cols is not None:
        kept = kept.index_select(1, cols.to(kept.device))
    return nn.Parameter(kept.clone(), requires_grad=values.requires_grad)


def _cut_linear(linear: Projection, rows: Tensor | None, cols: Tensor | None) -> CompactLinear:
    bias = linear.bias
    return CompactLinear(_cut(linear.weight, rows, cols), None if bias is None else _cut(bias, rows))


def _cut_norm(norm: nn.Module, kept: Tensor) -> nn.Module:
    return nn.Identity() if isinstance(norm, nn.Identity) else CompactNorm(norm, kept)


def _cut_layer_scale(scale: nn.Module, out_cols: Tensor | None) -> nn.Module:
    return nn.Identity() if isinstance(scale, nn.Identity) else CompactLayerScale(scale, out_cols)


def _register_columns(module: nn.Module, name: str, cols: Tensor | None, beside: Tensor) -> None:
    # Index lists come from the mask, not from a checkpoint, so they are real even while the parameters are on meta.
    real = cols is None or beside.device.type == "meta"
    module.register_buffer(name, cols if real else cols.to(beside.device), persistent=False)  # type: ignore[union-attr]


def hook_tables(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Return the tables of the hooks that a call of the module runs, forwards and backwards."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def has_additions(module: nn.Module) -> bool:
    """Return whether a call of the module does more than its class tells: a hook, or a forward put on the object."""
    return any(hook_tables(module)) or "forward" in vars(module)
