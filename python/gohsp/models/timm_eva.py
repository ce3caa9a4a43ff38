# SPDX-License-Identifier: Apache-2.0
"""timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder and others of that class.

Most of them have rotary positions, some gated MLPs, norms in front of the last matrices of their sublayers, or RMSNorm.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from gohsp.files import check_keys, cut, shown
from gohsp.layers import (
    CompactLayerScale,
    FrozenBlock,
    FrozenLinear,
    PlaceColumns,
    PrunedAttention,
    PrunedBlock,
    PrunedBlocks,
    RaggedAttention,
    has_additions,
    head_angles,
    plain_linear,
)
from gohsp.models.base import (
    MAX_DEPTH,
    Attention,
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    Geometry,
    OpenBlock,
    Projection,
    wrong_kind,
)
from gohsp.models.refusals import why_altered, why_computed, why_linear
from gohsp.models.registry import register
from gohsp.models.timm_parts import (
    check_blocks,
    is_gated,
    open_mlp,
    plain_mlp,
    plain_norm,
    then_select,
    tokens_read,
    unfilled,
    why_mlp,
    why_norms,
)
from gohsp.models.timm_vit import TimmVit, softmax_scale


def angles_of(rope: Tensor, pairs: str, tokens: int) -> Tensor:
    """Return rotary positions as :class:`gohsp.models.base.Attention` has them.

    Args:
        rope: As timm's blocks are given them: [patches, 2 d] or [heads, patches, 2 d], sines and then cosines, each
            once for both channels of a pair.
        pairs: See :func:`gohsp_kernels.ragged_attention`.
        tokens: In all; those in front of the patches have no position.

    Returns:
        [2, heads or 1, tokens, d / 2].

    Raises:
        ValueError: The positions are those of single images, as patch dropout makes them.
    """
    if rope.dim() > 3:
        raise ValueError("rope: wanted one for all images; got some of each, as patch dropout makes them")
    sin, cos = rope.chunk(2, dim=-1)
    once = slice(rope.shape[-1] // 4) if pairs == "halves" else slice(None, None, 2)
    prefix = (0, 0, tokens - rope.shape[-2], 0)
    angles = torch.stack((F.pad(cos[..., once], prefix, value=1.0), F.pad(sin[..., once], prefix)))
    return angles if rope.dim() == 3 else angles[:, None]


class EvaProjection(Projection):
    """The q, k and v of timm's EvaAttention: one matrix, with biases for q and for v.

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


class PrunedEvaBlock(PrunedBlock):
    """Block with compact parameters, called like timm's EvaBlock."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        num_queries: int | None = None,
    ) -> Tensor:
        """Return the block's output.

        Args:
            x: [B, N, D].
            rope: Rotary positions as timm has them; by default those of an image of the model's own size.
            attn_mask, is_causal, num_queries: See :class:`gohsp.layers.PrunedBlock`.

        Returns:
            [B, num_queries or N, D].
        """
        attn = self.attn
        turns = None if rope is None else attn.angles(angles_of(rope, attn.rope_pairs, x.shape[1]))
        return self.run(x, attn_mask, is_causal, num_queries, turns)


class FrozenEvaBlock(FrozenBlock):
    """Packed block, called like timm's EvaBlock; rotary positions are packed, those that it is given are not read."""

    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask, is_causal: wanted none; a frozen model attends to all tokens")
        return super().forward(x)


class PlainEvaAttention(RaggedAttention):
    """Attention of heads of any width in plain PyTorch, called like timm's EvaAttention."""

    def forward(  # type: ignore[override]
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        angles = None
        if rope is not None:
            angles = head_angles(angles_of(rope, self.rope_pairs, x.shape[1]), self.num_heads, self.heads)
        return super().forward(x, attn_mask, is_causal, angles)


class PrunedEva(CompressedModel, Eva):
    """A timm Eva whose blocks are compact. Made by :func:`gohsp.compress`.

    Rotary positions of images of the model's own size are kept with the packed weights. Others work as well, but the
    weights of attention are then packed at each call: tell timm's ``set_input_size`` what the images are.
    """

    own_rope: Tensor | None

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the tokens behind the last norm, as timm's own does."""
        return self._features(x, attn_mask, is_causal)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the logits, as timm's own forward does.

        Args:
            x: Images [B, C, height, width].
            attn_mask, is_causal: As in timm.
        """
        read = None if attn_mask is not None or is_causal else tokens_read(self, 1)
        logits: Tensor = self.forward_head(self._features(x, attn_mask, is_causal, read))
        return logits

    def _features(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, queries: int | None = None) -> Tensor:
        x, rope = self._pos_embed(self.patch_embed(x))
        x = self.norm_pre(x)
        whole = attn_mask is None and not is_causal and not self.grad_checkpointing
        if whole and not torch.compiler.is_compiling() and not self.training and self._is_own(rope):
            features: Tensor = self.norm(self.blocks(x, num_queries=queries))
            return features
        for index, block in enumerate(self.blocks):
            turns = rope[index] if rope is not None and self.rope_mixed else rope
            if self.grad_checkpointing:
                x = timm.models.checkpoint(block, x, rope=turns, attn_mask=attn_mask, is_causal=is_causal)
            else:
                x = block(x, rope=turns, attn_mask=attn_mask, is_causal=is_causal)
        features = self.norm(x)
        return features if queries is None else features[:, :queries]

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, rope = super()._pos_embed(x)
        if isinstance(self.blocks[0], FrozenBlock) and not self._is_own(rope):
            raise ValueError(
                f"x: wanted images of {tuple(self.patch_embed.img_size)}, whose rotary positions a frozen model holds"
            )
        return x, rope

    def _is_own(self, rope: Tensor | None) -> bool:
        """Whether the blocks hold these rotary positions; they take them over where the model's own have changed."""
        own = self.own_rope
        if rope is None or own is None or rope.device.type != "cpu":
            return rope is own  # a GPU would have to be waited for, and a capture cannot
        if _equal(rope, own):
            return True
        if isinstance(self.blocks[0], FrozenBlock):
            return False
        now = _own_rope(self)
        if now is None or not _equal(now, rope):
            return False
        self.take_over(now)
        return True

    def take_over(self, rope: Tensor) -> None:
        """Let the blocks hold these rotary positions, which are those of an image of the model's own size."""
        with torch.inference_mode(False):  # training reads them too
            self.own_rope = rope.detach().clone()
            for index, block in enumerate(self.blocks):
                turns = self.own_rope[index] if self.rope_mixed else self.own_rope
                tokens = turns.shape[-2] + self.num_prefix_tokens
                block.attn.rope = block.attn.angles(angles_of(turns, block.attn.rope_pairs, tokens))


class TimmEva(TimmVit):
    """Adapter for timm's Eva. What is not here is as in a VisionTransformer."""

    wanted = "a timm Eva (EVA-02, DINOv3, ...; not a subclass)"

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, Eva)

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if type(model) is not Eva:
            raise wrong_kind(self.wanted, model)
        if model.patch_drop is not None:
            raise ValueError("model: wanted no patch dropout, which gives each image rotary positions of its own")
        check_blocks(model, _why_unsupported)
        rope = _own_rope(model)
        per_block = [rope[i] if rope is not None and model.rope_mixed else rope for i in range(len(model.blocks))]
        return tuple(map(_open, model.blocks, per_block))

    def embed(self, model: Any, images: Tensor) -> Tensor:
        own = model.patch_embed.img_size
        if model.rope is not None and tuple(images.shape[-2:]) != tuple(own):
            raise ValueError(
                f"images: wanted {tuple(own)}, which the model's rotary positions are for, got {list(images.shape)}; "
                "timm's set_input_size gives the model another size"
            )
        tokens: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images))[0])
        return tokens

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        dim, tokens = model.embed_dim, self.tokens(model, height, width)
        channels = model.patch_embed.proj.in_channels
        parts: list[tuple[nn.Module | None, tuple[int, ...]]] = [
            (model.patch_embed, (1, channels, height, width)),
            (model.attn_pool, (1, tokens, dim)),
            (model.head, (1, dim)),
        ]
        return [(module, shape) for module, shape in parts if module is not None]

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result: Any = copy.deepcopy(model)
        for index, block in enumerate(blocks):
            block.__class__ = PrunedEvaBlock
            result.blocks[index] = block
        result.blocks.__class__ = PrunedBlocks
        result.__class__ = PrunedEva
        rope = _own_rope(result)
        result.register_buffer("own_rope", None if rope is None else rope.detach().clone(), persistent=False)
        return result

    def refresh(self, model: Any) -> None:
        if model.rope is None:
            return
        model.rope.to(model.patch_embed.proj.weight.dtype)
        model.take_over(_own_rope(model))

    def disassemble(self, model: Any) -> nn.Module:
        for index, block in enumerate(model.blocks):
            if reason := why_computed(block):
                raise ValueError(f"model: cannot make blocks.{index} plain: {reason}")
        result: Any = copy.deepcopy(model)
        for index, block in enumerate(result.blocks):
            result.blocks[index] = _plain_block(block, model.num_prefix_tokens, model.rope_mixed)
        result.blocks.__class__ = nn.ModuleList
        result.__class__ = Eva
        del result.own_rope
        return result

    def freeze(self, model: Any, blocks: Any, embedding: str = "float32") -> nn.Module:
        result: Any = copy.deepcopy(model, {id(model.blocks): model.blocks})
        for block in blocks:
            block.__class__ = FrozenEvaBlock
        result.blocks = blocks
        if type(model.head) is nn.Linear and not has_additions(model.head):
            result.head = FrozenLinear(model.head)
        return result

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        """Return timm's name of the architecture, and the arguments that it was given beside."""
        config = getattr(model, "pretrained_cfg", None) or {}
        name = config.get("architecture")
        if not timm.is_model(name or ""):
            raise ValueError("model: wanted an Eva that timm.create_model made; plan.json can describe no other")
        own = {"num_classes": model.num_classes, "global_pool": model.global_pool, "in_chans": model.in_chans}
        arguments = {**getattr(model, "_model_args", {}), **own, "depth": len(model.blocks)}
        arguments["img_size"] = list(model.patch_embed.img_size)
        arguments["use_fc_norm"] = not isinstance(model.fc_norm, nn.Identity)
        return {
            "class": "Eva",
            "architecture": ".".join(filter(None, (name, config.get("tag")))),
            "arguments": _plain(arguments),
        }

    def check_description(self, description: Mapping[str, Any], geometry: Geometry) -> None:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        arguments = _plain(description["arguments"])
        if not isinstance(depth := arguments.get("depth"), int) or depth != geometry.depth or depth > MAX_DEPTH:
            raise ValueError(f"mask: it is made for {geometry}, but plan.model.arguments.depth is {shown(depth)}")

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        check_keys(description, ("class", "architecture", "arguments"), "plan.model")
        name = description["architecture"]
        # What is registered is code of timm's; other names, such as "hf-hub:", would make it fetch or read something.
        if not isinstance(name, str) or not timm.is_model(name):
            raise ValueError(f"plan.model.architecture: this timm ({timm.__version__}) knows no {shown(name)}")
        arguments = _plain(description["arguments"])
        try:
            with torch.device("meta"):
                dense: Any = timm.create_model(name, **arguments)
        except Exception as error:  # timm asserts, divides and indexes with what it is given
            raise ValueError(f"plan.model.arguments: they do not make a {name}: {cut(error)}") from error
        if type(dense) is not Eva:
            raise ValueError(f"plan.model: wanted an Eva, but timm made a {type(dense).__name__}")
        if dense.patch_embed.num_patches > _MOST_PATCHES:
            raise ValueError(f"plan.model.arguments.img_size: wanted at most {_MOST_PATCHES} patches")
        if dense.rope is not None:  # no file holds its tables: they follow from the arguments
            dense.rope.to_empty(device="cpu")
            dense.rope.init_non_persistent_buffers()
        return cast(nn.Module, dense)


register(TimmEva())


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _own_rope(model: Any) -> Tensor | None:
    """Return the rotary positions of images of the model's own size, as timm gives them to blocks, or None."""
    rope = model.rope
    if rope is None:
        return None
    training = rope.training
    rope.eval()  # which shifts them at random otherwise
    try:
        with torch.no_grad():
            known = not model.dynamic_img_size and hasattr(rope, "feat_shape")
            positions: Tensor = rope.get_embed() if known else rope.get_embed(shape=model.patch_embed.grid_size)
            return positions
    finally:
        rope.train(training)


def _why_unsupported(block: Any) -> str | None:
    """Return why this block cannot be pruned exactly, or None if it can."""
    if type(block) is not EvaBlock:
        return f"wanted timm's pre-norm EvaBlock, got {type(block).__name__}"
    return (
        why_altered(block)
        or why_norms(block)
        or _why_attention(block.attn)
        or why_mlp(block.mlp, block.norm2.normalized_shape[0])
    )


def _why_attention(attn: Any) -> str | None:
    if type(attn) not in (EvaAttention, AttentionRope):
        return f"attn is {type(attn).__name__}; wanted timm's EvaAttention or AttentionRope"
    if attn.gate is not None:
        return "gated attention, whose gate reads the columns that pruning removes"
    if getattr(attn, "num_kv_groups", 1) != 1:
        return f"{attn.num_heads} heads of queries that share {attn.num_kv_heads} of keys and values"
    if attn.qkv_bias_separate if type(attn) is EvaAttention else False:
        return "a bias of q, k and v that is added after the product"
    names = ("qkv", "proj") if attn.qkv is not None else ("q_proj", "k_proj", "v_proj", "proj")
    reasons = (why_linear(f"attn.{name}", getattr(attn, name)) for name in names)
    return next(filter(None, reasons), None)


class _Gamma(nn.Module):
    """Layer scale that timm's EvaBlock keeps as a parameter of its own, as a module."""

    def __init__(self, gamma: nn.Parameter) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def _scale(gamma: nn.Parameter | None) -> nn.Module:
    return nn.Identity() if gamma is None else _Gamma(gamma)


def _reads(attn: Any) -> Projection:
    if attn.qkv is None:
        return Projection(attn.q_proj, attn.k_proj, attn.v_proj)
    return EvaProjection(attn) if getattr(attn, "q_bias", None) is not None else Projection(attn.qkv)


def _open(block: Any, rope: Tensor | None) -> OpenBlock:
    attn, mlp = block.attn, block.mlp
    read, pairs = _reads(attn), "halves" if attn.rotate_half else "neighbours"
    size = BlockGeometry(
        dim=read.in_features,
        num_heads=attn.num_heads,
        head_dim=read.out_features // 3 // attn.num_heads,
        hidden=mlp.fc2.in_features,
        qk_norm=not isinstance(attn.q_norm, nn.Identity),
        rope=rope is not None,
        gated=is_gated(mlp),
    )
    tokens = None if rope is None else attn.num_prefix_tokens + rope.shape[-2]
    attention = Attention(
        norm=block.norm1,
        body=attn,
        read=read,
        write=Projection(attn.proj),
        scale=_scale(block.gamma_1),
        drop_path=block.drop_path1,
        geometry=size,
        softmax_scale=softmax_scale(attn),
        q_norm=attn.q_norm,
        k_norm=attn.k_norm,
        drop=attn.attn_drop,
        write_drop=attn.proj_drop,
        inner_norm=attn.norm,
        rope=None if rope is None or tokens is None else angles_of(rope, pairs, tokens),
        rope_pairs=pairs,
    )
    return OpenBlock(block, attention, open_mlp(block, _scale(block.gamma_2), size))


def _plain_block(block: PrunedBlock, prefix: int, by_head: bool) -> nn.Module:
    attn, mlp = block.attn, block.mlp
    plain = unfilled(EvaBlock, dim=2, num_heads=1)
    plain.norm1 = then_select(block.norm1, attn.in_cols)
    # timm's own takes the rotary positions of all heads that there were.
    of_all = not by_head or len(attn.heads) == attn.num_heads
    plain.attn = _plain_attention(attn, prefix, of_all)
    plain.gamma_1 = _whole_gamma(block.ls1)
    plain.drop_path1 = block.drop_path1
    plain.norm2 = then_select(block.norm2, mlp.in_cols)
    plain.mlp = plain_mlp(mlp)
    plain.mlp.fc2 = _placed(mlp.fc2, mlp.out_cols, mlp.dim)
    plain.gamma_2 = _whole_gamma(block.ls2)
    plain.drop_path2 = block.drop_path2
    return cast(nn.Module, plain.train(block.training))


def _placed(linear: Any, cols: Tensor | None, features: int) -> nn.Module:
    plain = plain_linear(linear)
    return plain if cols is None else nn.Sequential(plain, PlaceColumns(cols, features))


def _whole_gamma(scale: nn.Module) -> nn.Parameter | None:
    if not isinstance(scale, CompactLayerScale):
        return None
    if scale.out_cols is None:
        return scale.gamma
    whole = scale.gamma.detach().new_ones(scale.dim).index_copy(0, scale.out_cols, scale.gamma.detach())
    return nn.Parameter(whole, requires_grad=scale.gamma.requires_grad)


def _plain_attention(attn: PrunedAttention, prefix: int, of_all: bool) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    whole = isinstance(attn.inner_norm, nn.Identity) or attn.inner_norm.features == sum(attn.v_widths)
    if of_all and len(widths) == 1 and 0 not in widths and whole and math.isclose(attn.scale, min(widths) ** -0.5):
        return _librarys_attention(attn, prefix)
    plain: Any = PlainEvaAttention(attn)
    plain.proj = _placed(attn.proj, attn.out_cols, attn.dim)
    return plain


def _librarys_attention(attn: PrunedAttention, prefix: int) -> nn.Module:
    width = attn.v_widths[0]
    plain = unfilled(AttentionRope, dim=2, num_heads=1)
    plain.num_heads = plain.num_kv_heads = len(attn.heads)
    plain.head_dim, plain.scale = width, width**-0.5
    plain.attn_dim = plain.kv_dim = len(attn.heads) * width
    plain.num_prefix_tokens, plain.rotate_half = prefix, attn.rope_pairs == "halves"
    plain.qkv, plain.proj = plain_linear(attn.qkv), _placed(attn.proj, attn.out_cols, attn.dim)
    plain.q_norm, plain.k_norm = attn.q_norm, attn.k_norm
    plain.norm = plain_norm(attn.inner_norm, plain.attn_dim)
    plain.attn_drop, plain.proj_drop = attn.attn_drop, attn.proj_drop
    return cast(nn.Module, plain)


_ARGUMENTS = (
    *("img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads"),
    *("num_kv_heads", "qkv_bias", "qkv_fused", "qk_norm", "mlp_ratio", "swiglu_mlp", "swiglu_align_to", "scale_mlp"),
    *("scale_attn_inner", "attn_type", "drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate"),
    *("drop_path_rate", "init_values", "attn_only_layer_scale", "class_token", "num_reg_tokens", "no_embed_class"),
    *("use_abs_pos_emb", "use_rot_pos_emb", "rope_type", "rope_grid_offset", "rope_grid_indexing"),
    *("rope_temperature", "rope_rotate_half", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
    *("rope_mrope_section", "use_pre_transformer_norm", "use_post_transformer_norm", "use_fc_norm"),
    *("attn_pool_num_heads", "attn_pool_mlp_ratio", "dynamic_img_size", "dynamic_img_pad", "ref_feat_shape"),
    "head_init_scale",
)
"""All that a description gives to timm; one that names anything else, such as weights to fetch, is refused."""

_MOST, _MOST_PATCHES = 2**24, 2**20


def _plain(arguments: Any) -> dict[str, Any]:
    """Return the arguments of a description, which are numbers, names and short lists of these."""
    if not isinstance(arguments, Mapping):
        raise ValueError(f"plan.model.arguments: wanted a mapping, got {type(arguments).__name__}")
    found = {name: list(value) if isinstance(value, tuple) else value for name, value in arguments.items()}
    for name, value in found.items():
        if name not in _ARGUMENTS:
            raise ValueError(f"plan.model.arguments: wanted no {shown(name)}, which {shown(value)} is given for")
        for part in value if isinstance(value, list) else [value]:
            fits = (
                part is None or isinstance(part, bool | str) or (isinstance(part, int | float) and abs(part) <= _MOST)
            )
            if not fits:
                raise ValueError(
                    f"plan.model.arguments.{name}: wanted a number up to {_MOST} or a name, got {shown(part)}"
                )
    return found
