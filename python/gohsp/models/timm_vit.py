# SPDX-License-Identifier: Apache-2.0
"""timm's VisionTransformer and VisionTransformerDistilled of standard blocks, norms in front of their halves or behind.

Which of them can be pruned exactly, where their parts are, and the two classes that a compressed model belongs to. No
other module knows timm's names, so that a change in timm is met in this file.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal, cast

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention as TimmAttention
from timm.layers import LayerNorm, LayerScale, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from gohsp.files import check_keys, cut, explain, shown
from gohsp.layers import (
    CompactNorm,
    FrozenEmbedding,
    FrozenLinear,
    PatchProjection,
    PlaceColumns,
    PrunedAttention,
    PrunedBlock,
    PrunedBlocks,
    RaggedAttention,
    has_additions,
    lies_side_by_side,
    plain_linear,
)
from gohsp.models.base import (
    MAX_DEPTH,
    MAX_SIZE,
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    Family,
    Geometry,
    OpenBlock,
    Projection,
    wrong_kind,
)
from gohsp.models.refusals import refuse_computed, why_altered, why_linear
from gohsp.models.registry import register
from gohsp.models.timm_parts import (
    ACTIVATIONS,
    check_blocks,
    hidden_width,
    is_gated,
    let_read,
    open_attention,
    open_mlp,
    plain_mlp,
    plain_norm,
    then_select,
    tokens_read,
    unfilled,
    why_mlp,
    why_norms,
)


def _why_unsupported(block: Any) -> str | None:
    """Return why this block cannot be pruned exactly, or None if it can."""
    if type(block) not in (Block, ResPostBlock):
        return f"wanted timm's Block or ResPostBlock, got {type(block).__name__}"
    return (
        why_altered(block)
        or why_norms(block)
        or _why_attention(block.attn, block.norm1.normalized_shape[0])
        or why_mlp(block.mlp, block.norm2.normalized_shape[0], normed=type(block) is Block)
    )


def _why_attention(attn: Any, dim: int) -> str | None:
    if type(attn) is not TimmAttention:
        return f"attn is {type(attn).__name__}; wanted timm's Attention"
    if getattr(attn, "gate", None) is not None:
        return "gated attention, whose gate reads the columns that pruning removes"
    reason = why_linear("attn.qkv", attn.qkv) or why_linear("attn.proj", attn.proj)
    if reason is not None:
        return reason
    if attn.proj.out_features != dim:
        return f"attention writes {attn.proj.out_features} features (dim_out) into a residual stream of {dim}"
    return None


class PrunedVisionTransformer(CompressedModel, VisionTransformer):
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
        tokens = tokens_read(self, 2 if isinstance(self, VisionTransformerDistilled) else 1)
        if tokens is None or attn_mask is not None or is_causal:
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        return self.forward_head(self.norm(self.blocks(x, num_queries=tokens)))


class PrunedVisionTransformerDistilled(PrunedVisionTransformer, VisionTransformerDistilled):
    """A timm VisionTransformerDistilled (DeiT) whose blocks are compact. Made by :func:`gohsp.compress`."""


COMPRESSED_CLASS: dict[type[nn.Module], type[nn.Module]] = {
    VisionTransformer: PrunedVisionTransformer,
    VisionTransformerDistilled: PrunedVisionTransformerDistilled,
}
DENSE_CLASS = {compressed: dense for dense, compressed in COMPRESSED_CLASS.items()}


class TimmVit(Family):
    """Adapter for timm's VisionTransformer and VisionTransformerDistilled."""

    wanted = "a timm VisionTransformer or VisionTransformerDistilled (not a subclass)"

    def trunk(self, model: Any) -> Any:
        """Return what has the patch embedding and the blocks: the model, or the encoder that it wraps."""
        return model

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if type(model) not in COMPRESSED_CLASS:
            raise wrong_kind(self.wanted, model)
        check_blocks(model, _why_unsupported)
        return tuple(map(_open, model.blocks))

    def open_block(self, block: nn.Module) -> OpenBlock | None:
        if type(block) is not Block:
            return None
        if reason := _why_unsupported(block):
            raise ValueError(f"block: cannot prune it: {reason}")
        return _open(block)

    def architecture(self, model: nn.Module) -> str:
        """Return timm's name of the architecture, or the name of the class where timm recorded none."""
        return _recorded(model, "architecture") or DENSE_CLASS.get(type(model), type(model)).__name__

    def embed(self, model: Any, images: Tensor) -> Tensor:
        tokens: Tensor = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        return tokens

    def features(self, model: Any, x: Tensor) -> Tensor:
        """Return what the head reads; where that is all tokens, the prefix tokens and the mean of the patches."""
        pooled: Tensor = model.forward_head(model.norm(x), pre_logits=True)
        if pooled.dim() == 2:
            return pooled
        prefix = model.num_prefix_tokens
        return torch.cat((pooled[:, :prefix], pooled[:, prefix:].mean(dim=1, keepdim=True)), dim=1)

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        if model.num_classes == 0:
            return None
        logits: Tensor = model.forward_head(model.norm(x))
        return logits if logits.dim() == 2 else None

    def normalisation(self, model: Any) -> tuple[Sequence[float], Sequence[float]]:
        """Return what timm's record of the model says; the mean over the colours where the channels are others."""
        values = (
            _recorded(model, "mean") or IMAGENET_DEFAULT_MEAN,
            _recorded(model, "std") or IMAGENET_DEFAULT_STD,
        )
        channels = _image_channels(self.trunk(model))
        mean, std = (v if len(v) == channels else (sum(v) / len(v),) for v in values)
        return mean, std

    def stream_places(self, model: Any) -> list[nn.Module]:
        return [*model.blocks, model.norm]

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        model = self.trunk(model)
        embed = model.patch_embed
        # embed_dim keeps its old value where another tool narrowed the model.
        features = getattr(embed.proj, "out_channels", model.embed_dim)
        return len(model.blocks), embed.num_patches + model.num_prefix_tokens, features

    def image_shape(self, model: Any) -> tuple[int, int, int] | None:
        model = self.trunk(model)
        size = model.patch_embed.img_size
        return None if size is None else (_image_channels(model), *size)

    def tokens(self, model: Any, height: int, width: int) -> int:
        model = self.trunk(model)
        embed = model.patch_embed
        if embed.strict_img_size and (height, width) != tuple(embed.img_size):
            raise ValueError(f"wanted {tuple(embed.img_size)}, which this model is fixed to, got {(height, width)}")
        rows, columns = embed.dynamic_feat_size((height, width))
        return int(rows * columns + model.num_prefix_tokens)

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        dim, tokens = model.embed_dim, self.tokens(model, height, width)
        pooled = tokens if model.pool_include_prefix else tokens - model.num_prefix_tokens
        parts: list[tuple[nn.Module | None, tuple[int, ...]]] = [
            (model.patch_embed, (1, _image_channels(model), height, width)),
            (model.attn_pool, (1, pooled, dim)),
            (model.head, (1, dim)),
            (getattr(model, "head_dist", None), (1, dim)),
        ]
        return [(module, shape) for module, shape in parts if module is not None]

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result: Any = copy.deepcopy(model)
        for index, block in enumerate(blocks):
            result.blocks[index] = block
        # The classes change and the objects stay: everything that timm or the user hung on them is still there.
        result.blocks.__class__ = PrunedBlocks
        projection = _projection(result)
        if type(projection) is nn.Conv2d and lies_side_by_side(projection):
            result.patch_embed.proj.__class__ = PatchProjection
        result.__class__ = COMPRESSED_CLASS[type(model)]
        return result

    def disassemble(self, model: Any) -> nn.Module:
        refuse_computed(model.blocks)
        result: Any = copy.deepcopy(model)
        for index, block in enumerate(result.blocks):
            result.blocks[index] = _plain_block(block)
        result.blocks.__class__ = nn.Sequential
        if type(_projection(result)) is PatchProjection:
            result.patch_embed.proj.__class__ = nn.Conv2d
        result.__class__ = DENSE_CLASS[type(model)]
        return result

    def freeze(self, model: Any, blocks: nn.Module, embedding: str = "float32") -> nn.Module:
        # All but the blocks is copied, a few kilobytes: neither model's training, mode or dtype reaches the other.
        result: Any = copy.deepcopy(model, {id(model.blocks): model.blocks})
        result.blocks = blocks
        result.eval()
        if _embeds_plainly(model):
            result.patch_embed = FrozenPatchEmbed(result, embedding)
            result._pos_embed = _as_it_is
        for name in ("head", "head_dist"):
            layer = getattr(model, name, None)
            if type(layer) is nn.Linear and not has_additions(layer):
                setattr(result, name, FrozenLinear(layer))
        return result

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        """Return the class of the dense model and the arguments that make it, read from the live model.

        Raises:
            ValueError: No arguments but those of a registered name give it norms behind its halves.
        """
        if geometry.blocks[0].post_norm and _registered_name(model) is None:
            raise ValueError("model: wanted one that timm.create_model made; plan.json describes no other ResPostBlock")
        return {
            "class": DENSE_CLASS[type(model)].__name__,
            "architecture": _registered_name(model),
            "arguments": {**_arguments_outside(model), **_arguments_of_blocks(model, geometry)},
        }

    def check_description(self, description: Mapping[str, Any], geometry: Geometry) -> None:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        depth = _read_arguments(description["arguments"])["depth"]
        if depth != geometry.depth:
            raise ValueError(f"mask: it is made for {geometry}, but plan.model.arguments.depth is {depth}")

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        arguments = _read_arguments(description["arguments"])
        wanted = {cls.__name__: cls for cls in COMPRESSED_CLASS}.get(str(description["class"]))
        if wanted is None:
            classes = sorted(cls.__name__ for cls in COMPRESSED_CLASS)
            raise ValueError(f"plan.model.class: wanted one of {classes}, got {shown(description['class'])}")
        create = _registered(description["architecture"], wanted)
        eps, activation = arguments.pop("norm_eps"), arguments.pop("activation")
        if eps is not None:
            arguments["norm_layer"] = partial(LayerNorm, eps=eps)
        if activation is not None:
            arguments["act_layer"] = ACTIVATIONS[activation]
        if arguments["mlp_ratio"] is None:
            del arguments["mlp_ratio"]
        try:
            with torch.device("meta"):
                dense: nn.Module = create(**arguments, weight_init="skip")
        except Exception as error:  # timm asserts, divides and indexes with what it is given
            raise ValueError(f"plan.model.arguments: they do not make a {wanted.__name__}: {cut(error)}") from error
        if type(dense) is not wanted:
            raise ValueError(f"plan.model: wanted a {wanted.__name__}, but timm made a {type(dense).__name__}")
        return dense


register(TimmVit())


def _open(block: Block) -> OpenBlock:
    attn, mlp = block.attn, block.mlp
    size = BlockGeometry(
        dim=attn.qkv.in_features,
        num_heads=attn.num_heads,
        head_dim=attn.head_dim,
        hidden=hidden_width(mlp),
        qk_norm=not isinstance(attn.q_norm, nn.Identity),
        gated=is_gated(mlp),
        post_norm=type(block) is ResPostBlock,
    )
    scales = _layer_scales(block)
    attention = open_attention(block, Projection(attn.qkv), Projection(attn.proj), scales[0], size)
    return OpenBlock(block, attention, open_mlp(block, scales[1], size))


def _layer_scales(block: Any) -> tuple[nn.Module, nn.Module]:
    """Return the layer scales of both halves; a norm behind a half has none behind it."""
    return getattr(block, "ls1", nn.Identity()), getattr(block, "ls2", nn.Identity())


def _recorded(model: Any, name: str) -> Any:
    """Return what timm recorded of a model under a name, or None."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _projection(model: Any) -> nn.Module | None:
    """Return what projects the patches, or None: an ``embed_layer`` of the user's own need not have it."""
    return getattr(model.patch_embed, "proj", None)


def _image_channels(model: Any) -> int:
    """Return the channels of the images: what the first convolution reads, which in a hybrid is of its backbone."""
    embed = getattr(model, "patch_embed", model)
    return next(part.in_channels for part in embed.modules() if isinstance(part, nn.Conv2d))


def _plain_block(block: PrunedBlock) -> nn.Module:
    return _plain_post_norm(block) if block.post_norm else _plain_pre_norm(block)


def _plain_post_norm(block: PrunedBlock) -> nn.Module:
    plain = unfilled(ResPostBlock, dim=1, num_heads=1)
    plain.attn, plain.mlp = _plain_attention(block.attn), plain_mlp(block.mlp)
    let_read(plain.attn, plain.mlp, block)
    plain.norm1, plain.norm2 = block.norm1, block.norm2
    plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
    return cast(nn.Module, plain.train(block.training))


def _plain_pre_norm(block: PrunedBlock) -> Block:
    attn, mlp = block.attn, block.mlp
    plain = unfilled(Block, dim=1, num_heads=1)
    plain.norm1 = then_select(block.norm1, attn.in_cols)
    plain.attn = _plain_attention(attn)
    plain.ls1 = _then_place(_plain_layer_scale(block.ls1), attn.out_cols, attn.dim)
    plain.drop_path1 = block.drop_path1
    plain.norm2 = then_select(block.norm2, mlp.in_cols) if block.is_one_chain() else block.norm2
    plain.mlp = plain_mlp(mlp)
    plain.ls2 = _then_place(_plain_layer_scale(block.ls2), mlp.out_cols, mlp.dim)
    plain.drop_path2 = block.drop_path2
    return plain.train(block.training)


def _then_place(scale: nn.Module, cols: Tensor | None, features: int) -> nn.Module:
    return scale if cols is None else nn.Sequential(scale, PlaceColumns(cols, features))


def _plain_attention(attn: PrunedAttention) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    if len(widths) != 1 or 0 in widths:
        return RaggedAttention(attn)
    (width,) = widths
    norm = plain_norm(attn.inner_norm, len(attn.heads) * width)
    if isinstance(norm, CompactNorm):
        return RaggedAttention(attn)
    if not isinstance(attn.q_norm, nn.Identity) and attn.scale != width**-0.5:
        return RaggedAttention(attn)  # a factor in front of q_norm would be normalised away
    plain = unfilled(TimmAttention, dim=1, num_heads=1)
    plain.num_heads, plain.head_dim = len(attn.heads), width
    plain.attn_dim, plain.scale = len(attn.heads) * width, width**-0.5
    plain.qkv, plain.proj = plain_linear(attn.qkv), plain_linear(attn.proj)
    plain.q_norm, plain.k_norm, plain.norm = attn.q_norm, attn.k_norm, norm
    plain.attn_drop, plain.proj_drop = attn.attn_drop, attn.proj_drop
    _rescale_queries(plain, attn.scale * math.sqrt(width))
    return plain


def _rescale_queries(attn: TimmAttention, factor: float) -> None:
    # timm's fused path takes its scale from the width that it sees, not from the width that the head once had.
    if factor == 1.0:
        return
    with torch.no_grad():
        attn.qkv.weight[: attn.attn_dim] *= factor
        if attn.qkv.bias is not None:
            attn.qkv.bias[: attn.attn_dim] *= factor


def _plain_layer_scale(scale: Any) -> nn.Module:
    if isinstance(scale, nn.Identity):
        return scale
    plain = unfilled(LayerScale, dim=1)
    plain.gamma = scale.gamma
    return plain


def _embeds_plainly(model: Any) -> bool:
    """Whether images become tokens by one product of patches side by side, and by a constant added to it."""
    embed = model.patch_embed
    if type(embed) is not PatchEmbed or not embed.flatten or not isinstance(embed.norm, nn.Identity):
        return False
    if any(map(has_additions, (*embed.modules(), model.pos_drop))):
        return False
    return embed.img_size is not None and embed.strict_img_size and not embed.dynamic_img_pad


class FrozenPatchEmbed(FrozenEmbedding):
    """Patch embedding, class token and positions, packed; in place of timm's ``PatchEmbed``, with what timm asks of it.

    Args:
        model: The model whose patch embedding and ``_pos_embed`` it does the work of. It is not changed, and not held.
        weights: Format of the weights; see :func:`gohsp.freeze`.
    """

    def __init__(self, model: Any, weights: str) -> None:
        embed = model.patch_embed
        weight = embed.proj.weight
        # What timm adds to patches of which nothing is left: the tokens in front of them, and all positions.
        with torch.no_grad():
            base = model._pos_embed(weight.new_zeros(1, embed.num_patches, weight.shape[0]))[0]
        super().__init__(weight, embed.proj.bias, base, embed.img_size, weights)
        self.patch_size, self.grid_size, self.num_patches = embed.patch_size, embed.grid_size, embed.num_patches

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return how many patches lie below and beside each other."""
        return img_size[0] // self.patch_size[0], img_size[1] // self.patch_size[1]


def _as_it_is(x: Tensor) -> Tensor:
    return x


_Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
_Count = Annotated[int, Field(ge=0, le=MAX_SIZE)]
_Rate = Annotated[float, Field(ge=0, le=1)]


class _Arguments(BaseModel):
    """All that a description gives to timm; a file that names anything else, such as weights to fetch, is refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    img_size: tuple[_Size, _Size] | None
    patch_size: tuple[_Size, _Size]
    in_chans: _Size
    num_classes: Annotated[int, Field(ge=0, le=2**24)]
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map"]
    class_token: bool
    pos_embed: Literal["none", "learn"]
    no_embed_class: bool
    reg_tokens: _Count
    pre_norm: bool
    final_norm: bool
    fc_norm: bool
    pool_include_prefix: bool
    dynamic_img_size: bool
    dynamic_img_pad: bool
    drop_rate: _Rate
    pos_drop_rate: _Rate
    patch_drop_rate: _Rate
    embed_dim: _Size
    depth: Annotated[int, Field(ge=1, le=MAX_DEPTH)]
    num_heads: _Size
    # None where the architecture says it: a gated MLP, or other norms than LayerNorm in front of the sublayers alone.
    mlp_ratio: Annotated[float, Field(gt=0, le=MAX_SIZE + 1)] | None
    qkv_bias: bool
    qk_norm: bool
    proj_bias: bool
    init_values: _Rate
    proj_drop_rate: _Rate
    attn_drop_rate: _Rate
    drop_path_rate: _Rate
    norm_eps: _Rate | None
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "identity"] | None


def _read_arguments(data: Any) -> dict[str, Any]:
    """Return the arguments of a description, each of its type and in its range."""
    try:
        # As JSON, in which tuples and lists are one thing.
        return _Arguments.model_validate_json(json.dumps(data)).model_dump()
    except ValidationError as error:
        raise ValueError(explain(error, "plan.model.arguments")) from error


def _registered(name: Any, cls: type[nn.Module]) -> Callable[..., nn.Module]:
    """Return what makes an architecture: the class itself where it has no name."""
    if name is None:
        return cls
    # What is registered is code of timm's; other names, such as "hf-hub:", would make it fetch or read something.
    if not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"plan.model.architecture: this timm ({timm.__version__}) knows no {shown(name)}")
    return partial(timm.create_model, name)


def _arguments_outside(model: Any) -> dict[str, Any]:
    embed = model.patch_embed
    return {
        "img_size": embed.img_size,
        "patch_size": embed.patch_size,
        "in_chans": _image_channels(model),
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "class_token": model.cls_token is not None,
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": model.no_embed_class,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_size": model.dynamic_img_size,
        "dynamic_img_pad": embed.dynamic_img_pad,
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": model.pos_drop.p,
        "patch_drop_rate": getattr(model.patch_drop, "prob", 0.0),
    }


def _arguments_of_blocks(model: Any, geometry: Geometry) -> dict[str, Any]:
    first, last = model.blocks[0], model.blocks[-1]
    inner = first.attn.inner_norm, first.mlp.inner_norm
    plain = not geometry.gated and isinstance(first.norm1, nn.LayerNorm)
    plain = plain and all(isinstance(norm, nn.Identity) for norm in inner)
    given = getattr(model, "_model_args", {}).get("mlp_ratio")
    return {
        "embed_dim": geometry.dim,
        "depth": geometry.depth,
        "num_heads": geometry.num_heads,
        # timm rounds dim * ratio down; half a neuron more makes that exact.
        "mlp_ratio": (geometry.hidden + 0.5) / geometry.dim if plain else given,
        "qkv_bias": first.attn.qkv.bias is not None,
        "qk_norm": geometry.qk_norm,
        "proj_bias": first.attn.proj.bias is not None,
        # 0 rather than None, which create_model would take for "not given". The values come from the weights.
        "init_values": 0.0 if isinstance(first.ls1, nn.Identity) else 1.0,
        "proj_drop_rate": first.attn.proj_drop.p,
        "attn_drop_rate": first.attn.attn_drop.p,
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", 0.0),
        "norm_eps": first.norm1.eps if plain else None,
        "activation": first.mlp.activation if plain else None,
    }


def _registered_name(model: nn.Module) -> str | None:
    """Return the name, with its tag, under which timm can make this architecture, or None if it cannot."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, dict) or not timm.is_model(config.get("architecture") or ""):
        return None
    return ".".join(filter(None, (config["architecture"], config.get("tag"))))
