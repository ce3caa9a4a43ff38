# SPDX-License-Identifier: Apache-2.0
"""Everything gohsp knows about timm's vision transformers.

Which models can be pruned, where their blocks are and what size they have, and the two classes that a compressed model
belongs to. The other modules ask here, so that a change in timm is met in one file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from timm.layers import GELU, Attention, GELUTanh, LayerNorm, Mlp, QuickGELU
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

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


@dataclass(frozen=True)
class Geometry:
    """Sizes of a dense vision transformer whose blocks are all alike.

    Attributes:
        depth: Number of blocks.
        dim: D, the width of the residual stream.
        num_heads: H, attention heads of a block.
        head_dim: d, channels of a head in each of q, k and v. H * d need not equal D.
        hidden: M, neurons of a block's MLP.
        qk_norm: Whether q and k are normalised head by head. Such a norm mixes the channels of a head.
    """

    depth: int
    dim: int
    num_heads: int
    head_dim: int
    hidden: int
    qk_norm: bool = False


def architecture(model: nn.Module) -> str:
    """Return timm's name of the architecture, or the name of the class where timm recorded none."""
    config = getattr(model, "pretrained_cfg", None) or {}
    name = config.get("architecture") if isinstance(config, dict) else getattr(config, "architecture", None)
    return name or type(model).__name__


def is_compressed(model: nn.Module) -> bool:
    """Return whether the model was made by :func:`gohsp.compress`."""
    return isinstance(model, PrunedVisionTransformer)


def find_blocks(model: nn.Module) -> list[Any]:
    """Return the transformer blocks of a model that gohsp can prune, or of a compressed one.

    Args:
        model: timm VisionTransformer or VisionTransformerDistilled of standard pre-norm blocks, or a compressed model.

    Raises:
        TypeError: The model is not one of those classes.
        ValueError: A block holds something that gohsp cannot prune exactly; the message names the block and the reason.
    """
    if is_compressed(model):
        compact: list[Any] = list(model.blocks)  # type: ignore[arg-type]
        if not all(hasattr(block, "mask") for block in compact):
            raise ValueError("model: it is frozen, so its compact weights are gone; wanted the model it was made from")
        return compact
    if type(model) not in (VisionTransformer, VisionTransformerDistilled):
        raise TypeError(
            "model: wanted a timm VisionTransformer or VisionTransformerDistilled (not a subclass), "
            f"got {type(model).__module__}.{type(model).__name__}"
        )
    blocks = list(model.blocks)  # type: ignore[arg-type]
    if not blocks:
        raise ValueError("model: it has no transformer blocks")
    for index, block in enumerate(blocks):
        reason = _why_unsupported(block)
        if reason:
            raise ValueError(f"model: cannot prune blocks.{index}: {reason}")
    return blocks


def find_dense_blocks(model: nn.Module) -> list[Block]:
    """Return the blocks of a dense model, refusing one that is already compressed.

    Raises:
        ValueError: The model is compressed, or see :func:`find_blocks`.
        TypeError: See :func:`find_blocks`.
    """
    if is_compressed(model):
        raise ValueError("model: it is already compressed; wanted the dense timm model that the mask is made for")
    return find_blocks(model)


def geometry(model: nn.Module) -> Geometry:
    """Return the sizes of a dense model, or those that a compressed model had before.

    Raises:
        ValueError: The blocks differ in size, or see :func:`find_blocks`.
        TypeError: See :func:`find_blocks`.
    """
    blocks = find_blocks(model)
    if is_compressed(model):
        first = blocks[0]
        heads, head_dim = first.mask.qk.shape
        return Geometry(
            depth=len(blocks),
            dim=first.mask.attn_in.numel(),
            num_heads=heads,
            head_dim=head_dim,
            hidden=first.mask.hidden.numel(),
            qk_norm=not isinstance(first.attn.q_norm, nn.Identity),
        )
    sizes = [_block_geometry(block, len(blocks)) for block in blocks]
    for index, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(f"model: blocks.{index} is {size}, but blocks.0 is {sizes[0]}; wanted blocks of one size")
    return sizes[0]


def activation_name(module: nn.Module) -> str | None:
    """Return the name by which gohsp_kernels knows an activation module, or None if it does not know it."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return _NAMES.get(type(module))


def softmax_scale(attn: Attention) -> float:
    """Return what timm's attention multiplies q k by before the softmax.

    Its fused path takes that from the width of the heads, whatever ``attn.scale`` says; models that other tools made
    narrower have an old value there.
    """
    return attn.head_dim**-0.5 if attn.fused_attn else attn.scale


def _block_geometry(block: Block, depth: int) -> Geometry:
    return Geometry(
        depth=depth,
        dim=block.attn.qkv.in_features,
        num_heads=block.attn.num_heads,
        head_dim=block.attn.head_dim,
        hidden=block.mlp.fc1.out_features,
        qk_norm=not isinstance(block.attn.q_norm, nn.Identity),
    )


def _why_unsupported(block: Any) -> str | None:
    """Return why this block cannot be pruned exactly, or None if it can."""
    if type(block) is not Block:
        return f"wanted timm's pre-norm Block, got {type(block).__name__}"
    return (
        _why_altered(block)
        or _why_norm("norm1", block.norm1)
        or _why_norm("norm2", block.norm2)
        or _why_attention(block.attn, block.norm1.normalized_shape[0])
        or _why_mlp(block.mlp, block.norm2.normalized_shape[0])
    )


def refuse_hooks(blocks: Iterable[Any]) -> None:
    """Refuse hooks on modules that compact ones take the place of. Those on ``norm1`` and ``norm2`` are kept.

    Raises:
        ValueError: There is such a hook; the message names the module.
    """
    for index, block in enumerate(blocks):
        for name, module in block.named_modules():
            hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
            if any((*hooks, module._backward_pre_hooks)) and name not in ("norm1", "norm2"):
                where = f"blocks.{index}.{name}".rstrip(".")
                raise ValueError(
                    f"model: a hook hangs on {where}, which compress replaces; wanted none. "
                    "Remove it, and hang it on the compressed model"
                )


# Attribute that a tool leaves on a module whose weight it computes -> what undoes it.
_COMPUTED = {
    "parametrizations": "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')",
    "weight_orig": "torch.nn.utils.prune.remove(module, 'weight') or torch.nn.utils.remove_spectral_norm(module)",
    "weight_g": "torch.nn.utils.remove_weight_norm(module)",
}


def why_computed(block: Any) -> str | None:
    """Return which weight of a block is computed from other tensors and how to end that, or None if none is."""
    for name, module in block.named_modules():
        for attribute, way_out in _COMPUTED.items():
            if hasattr(module, attribute):
                return f"the weight of {name} is computed ({attribute}); call {way_out} first"
    return None


def _why_altered(block: Any) -> str | None:
    """Return what stands between the modules of a block and their bare weights, or None if nothing does."""
    if computed := why_computed(block):
        return computed
    for name, module in block.named_modules():
        if "forward" in vars(module):
            return f"forward of {name or 'the block'} was replaced on the object, and would be lost; undo that first"
    return None


def _why_linear(name: str, layer: Any) -> str | None:
    if type(layer) is nn.Linear:
        return None
    kind = type(layer)
    return (
        f"{name} is {kind.__module__}.{kind.__qualname__}; wanted torch.nn.Linear. "
        "Adapters are merged first (peft: merge_and_unload())"
    )


def _why_norm(name: str, norm: Any) -> str | None:
    # Subclasses that compute in another dtype or another way would not be what the fused kernels compute.
    if type(norm) not in (nn.LayerNorm, LayerNorm):
        return f"{name} is {type(norm).__name__}; wanted LayerNorm"
    return None


def _why_attention(attn: Any, dim: int) -> str | None:
    if type(attn) is not Attention:
        return f"attn is {type(attn).__name__}; wanted timm's Attention"
    if getattr(attn, "gate", None) is not None:
        return "gated attention, whose gate reads the columns that pruning removes"
    if not isinstance(getattr(attn, "norm", nn.Identity()), nn.Identity):
        return "attention with a norm before proj (scale_attn_norm), which mixes all heads"
    reason = _why_linear("attn.qkv", attn.qkv) or _why_linear("attn.proj", attn.proj)
    if reason is not None:
        return reason
    if attn.proj.out_features != dim:
        return f"attention writes {attn.proj.out_features} features (dim_out) into a residual stream of {dim}"
    if isinstance(attn.q_norm, nn.Identity) and isinstance(attn.k_norm, nn.Identity):
        return None
    return _why_norm("attn.q_norm", attn.q_norm) or _why_norm("attn.k_norm", attn.k_norm) or _why_qk_norms(attn)


def _why_qk_norms(attn: Any) -> str | None:
    if attn.q_norm.weight is None or attn.k_norm.weight is None:
        return "q and k norms without a learned scale"
    if attn.q_norm.eps != attn.k_norm.eps:
        return f"q and k norms of different eps ({attn.q_norm.eps} and {attn.k_norm.eps})"
    return None


def _why_mlp(mlp: Any, dim: int) -> str | None:
    if type(mlp) is not Mlp:
        return f"mlp is {type(mlp).__name__}; wanted timm's Mlp"
    reason = _why_linear("mlp.fc1", mlp.fc1) or _why_linear("mlp.fc2", mlp.fc2)
    if reason is not None:
        return reason
    if not isinstance(mlp.norm, nn.Identity):
        return "MLP with a norm before fc2 (scale_mlp_norm), which mixes all neurons"
    if mlp.fc2.out_features != dim:
        return f"MLP writes {mlp.fc2.out_features} features into a residual stream of {dim}"
    if activation_name(mlp.act) is None:
        return f"activation {type(mlp.act).__name__}; known are {', '.join(ACTIVATIONS)}"
    return None


class PrunedVisionTransformer(VisionTransformer):
    """A timm VisionTransformer whose blocks are compact. Made by :func:`gohsp.compress`.

    In inference its last block computes no more than the tokens that the head reads. Exact algebra: keys and values of
    that block need every token, but its queries, proj and MLP act on each token alone, so tokens that nobody reads need
    none of them. ``forward_features`` and ``forward_intermediates`` give every token, as in timm.
    """

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the logits, as timm's own forward does.

        Args:
            x: Images [B, C, height, width].
            attn_mask: As in timm: bool or additive, broadcastable to [B, heads of the dense model, N, N].
            is_causal: As in timm.

        Returns:
            [B, num_classes], or what the head of the model gives.
        """
        tokens = self._tokens_read()
        if tokens is None or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return self.forward_head(self.norm(self.blocks(x, num_queries=tokens)))

    def _tokens_read(self) -> int | None:
        """Return how many leading tokens are enough for the head, or None if all of them are needed."""
        if self.training or self.grad_checkpointing or len(self.blocks) == 0 or self.attn_pool is not None:
            return None
        # A hook may look at tokens that the head does not read.
        if any(m._forward_hooks or m._forward_pre_hooks for m in (self.blocks, self.norm)):
            return None
        if self.blocks[-1]._forward_hooks or not isinstance(self.norm, nn.LayerNorm | nn.Identity):
            return None
        if isinstance(self, VisionTransformerDistilled):
            return 2
        return 1 if self.global_pool == "token" else None


class PrunedVisionTransformerDistilled(PrunedVisionTransformer, VisionTransformerDistilled):
    """A timm VisionTransformerDistilled (DeiT) whose blocks are compact. Made by :func:`gohsp.compress`."""


COMPRESSED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: PrunedVisionTransformer,
    VisionTransformerDistilled: PrunedVisionTransformerDistilled,
}
DENSE_CLASS = {compressed: dense for dense, compressed in COMPRESSED_CLASS.items()}
