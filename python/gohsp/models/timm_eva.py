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
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from gohsp.layers import (
    FrozenBlock,
    PrunedAttention,
    PrunedBlock,
    PrunedBlocks,
    RaggedAttention,
    head_angles,
    plain_linear,
)
from gohsp.models.base import (
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    OpenBlock,
    Projection,
    wrong_kind,
)
from gohsp.models.refusals import refuse_computed, why_altered, why_linear
from gohsp.models.registry import register
from gohsp.models.timm_named import COMMON_ARGUMENTS, TimmNamed
from gohsp.models.timm_parts import (
    SplitBiases,
    check_blocks,
    is_gated,
    layer_scale,
    let_read,
    open_attention,
    open_mlp,
    placed,
    plain_mlp,
    plain_norm,
    then_select,
    tokens_read,
    unfilled,
    whole_gamma,
    why_mlp,
    why_norms,
)


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


class HoldsPositions(CompressedModel):
    """What compressed models have in common whose blocks hold the rotary positions of images of the model's own size.

    Others work as well, but the weights of attention are then packed at each call.
    """

    own_rope: Tensor | None

    def through(self, x: Tensor, rope: Tensor | None, queries: int | None = None, **how: Any) -> Tensor:
        """Return the residual stream behind the last block.

        Args:
            x: [B, N, D].
            rope: Rotary positions as timm gives them to blocks, or None.
            queries: Give the first so many tokens only; all by default.
            how: What else timm gives to each block.

        Returns:
            [B, queries or N, D].
        """
        model: Any = self
        whole = not how and not model.grad_checkpointing and not model.training
        if whole and not torch.compiler.is_compiling() and self._is_own(rope):
            stream: Tensor = model.blocks(x, num_queries=queries)
            return stream
        for index, block in enumerate(model.blocks):
            turns = rope[index] if rope is not None and _is_mixed(model) else rope
            if model.grad_checkpointing:
                x = timm.models.checkpoint(block, x, rope=turns, **how)
            else:
                x = block(x, rope=turns, **how)
        return x if queries is None else x[:, :queries]

    def _pos_embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, rope = super()._pos_embed(x)  # type: ignore[misc]
        model: Any = self
        if isinstance(model.blocks[0], FrozenBlock) and not self._is_own(rope):
            raise ValueError(
                f"x: wanted images of {tuple(model.patch_embed.img_size)}, whose rotary positions a frozen model holds"
            )
        return x, rope

    def _is_own(self, rope: Tensor | None) -> bool:
        """Whether the blocks hold these rotary positions; they take them over where the model's own have changed."""
        own, model = self.own_rope, cast(Any, self)
        if rope is None or own is None or rope.device.type != "cpu":
            return rope is own  # a GPU would have to be waited for, and a capture cannot
        if _equal(rope, own):
            return True
        if isinstance(model.blocks[0], FrozenBlock):
            return False
        now = own_positions(self)
        if now is None or not _equal(now, rope):
            return False
        self.take_over(now)
        return True

    def take_over(self, rope: Tensor) -> None:
        """Let the blocks hold these rotary positions, which are those of an image of the model's own size."""
        model: Any = self
        with torch.inference_mode(False):  # training reads them too
            self.own_rope = rope.detach().clone()
            for index, block in enumerate(model.blocks):
                turns = self.own_rope[index] if _is_mixed(model) else self.own_rope
                tokens = turns.shape[-2] + model.num_prefix_tokens
                block.attn.rope = block.attn.angles(angles_of(turns, block.attn.rope_pairs, tokens))


class PrunedEva(HoldsPositions, Eva):
    """A timm Eva whose blocks are compact. Made by :func:`gohsp.compress`.

    For images of another size tell timm's ``set_input_size``; see :class:`HoldsPositions`.
    """

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
        masked = {"attn_mask": attn_mask, "is_causal": is_causal} if attn_mask is not None or is_causal else {}
        features: Tensor = self.norm(self.through(self.norm_pre(x), rope, queries, **masked))
        return features


_ARGUMENTS = (
    *COMMON_ARGUMENTS,
    *("num_kv_heads", "qkv_fused", "qk_norm", "swiglu_mlp", "swiglu_align_to", "scale_mlp"),
    *("scale_attn_inner", "attn_type", "pos_drop_rate"),
    *("attn_only_layer_scale", "class_token", "num_reg_tokens", "no_embed_class"),
    *("use_abs_pos_emb", "use_rot_pos_emb", "rope_type", "rope_grid_offset", "rope_grid_indexing"),
    *("rope_temperature", "rope_rotate_half", "rope_shift_coords", "rope_jitter_coords", "rope_rescale_coords"),
    *("rope_mrope_section", "use_pre_transformer_norm", "use_post_transformer_norm", "use_fc_norm"),
    *("attn_pool_num_heads", "attn_pool_mlp_ratio", "dynamic_img_size", "dynamic_img_pad", "ref_feat_shape"),
    "head_init_scale",
)


class TimmEva(TimmNamed):
    """Adapter for timm's Eva. What is not here is as in a VisionTransformer."""

    wanted = "a timm Eva (EVA-02, DINOv3, ...; not a subclass)"
    dense, frozen_block = Eva, FrozenEvaBlock
    arguments = _ARGUMENTS

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if type(model) is not Eva:
            raise wrong_kind(self.wanted, model)
        if model.patch_drop is not None:
            raise ValueError("model: wanted no patch dropout, which gives each image rotary positions of its own")
        check_blocks(model, why_eva)
        rope = own_positions(model)
        per_block = [rope[i] if rope is not None and model.rope_mixed else rope for i in range(len(model.blocks))]
        return tuple(map(open_turned, model.blocks, per_block))

    def embed(self, model: Any, images: Tensor) -> Tensor:
        if model.rope is not None:
            refuse_other_sizes(model.patch_embed, images, "timm's set_input_size gives the model another size")
        tokens: Tensor = model.norm_pre(model._pos_embed(model.patch_embed(images))[0])
        return tokens

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result: Any = copy.deepcopy(model)
        for index, block in enumerate(blocks):
            block.__class__ = PrunedEvaBlock
            result.blocks[index] = block
        result.blocks.__class__ = PrunedBlocks
        result.__class__ = PrunedEva
        hold_positions(result)
        return result

    def refresh(self, model: Any) -> None:
        if model.rope is None:
            return
        model.rope.to(model.patch_embed.proj.weight.dtype)
        model.take_over(own_positions(model))

    def disassemble(self, model: Any) -> nn.Module:
        refuse_computed(model.blocks)
        result: Any = copy.deepcopy(model)
        for index, block in enumerate(result.blocks):
            result.blocks[index] = plain_eva(block, model.num_prefix_tokens, model.rope_mixed)
        result.blocks.__class__ = nn.ModuleList
        result.__class__ = Eva
        del result.own_rope
        return result

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        dense: Any = super().build(description)
        make_real(dense.rope)
        return cast(nn.Module, dense)


register(TimmEva())


def _equal(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def _is_mixed(model: Any) -> bool:
    """Return whether each block has rotary positions of its own."""
    return bool(getattr(model, "rope_mixed", False))


def hold_positions(model: Any) -> None:
    """Let a model of which the blocks have just become compact hold what these were given."""
    rope = own_positions(model)
    model.register_buffer("own_rope", None if rope is None else rope.detach().clone(), persistent=False)


def make_real(rope: Any) -> None:
    """Fill the tables of a module of rotary positions that was made on meta: no file holds them."""
    if rope is not None:
        rope.to_empty(device="cpu")
        rope.init_non_persistent_buffers()


def refuse_other_sizes(embed: Any, images: Tensor, way_out: str) -> None:
    """Refuse images of another size than the model's own, for which rotary positions were opened."""
    own = tuple(embed.img_size)
    if tuple(images.shape[-2:]) != own:
        raise ValueError(
            f"images: wanted {own}, which the model's rotary positions are for, got {list(images.shape)}; {way_out}"
        )


def own_positions(model: Any) -> Tensor | None:
    """Return the rotary positions of images of the model's own size, as timm gives them to blocks, or None."""
    rope = model.rope
    if rope is None:
        return None
    training = rope.training
    rope.eval()  # which shifts them at random otherwise
    try:
        with torch.no_grad():
            known = not getattr(model, "dynamic_img_size", True) and hasattr(rope, "feat_shape")
            positions: Tensor = rope.get_embed() if known else rope.get_embed(shape=model.patch_embed.grid_size)
            return positions
    finally:
        rope.train(training)


def why_eva(block: Any) -> str | None:
    """Return why this block cannot be pruned exactly, or None if it can."""
    if type(block) not in (EvaBlock, EvaBlockPostNorm):
        return f"wanted timm's EvaBlock or EvaBlockPostNorm, got {type(block).__name__}"
    return (
        why_altered(block)
        or why_norms(block)
        or why_turned(block.attn)
        or why_mlp(block.mlp, block.norm2.normalized_shape[0])
    )


def why_turned(attn: Any) -> str | None:
    """Return why an attention with rotary positions cannot be pruned exactly, or None if it can."""
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


def _reads(attn: Any) -> Projection:
    if attn.qkv is None:
        return Projection(attn.q_proj, attn.k_proj, attn.v_proj)
    return SplitBiases(attn) if getattr(attn, "q_bias", None) is not None else Projection(attn.qkv)


def open_turned(block: Any, rope: Tensor | None) -> OpenBlock:
    """Return a block that there is nothing against, opened.

    Args:
        block: An EvaBlock, or one of the same parts.
        rope: Rotary positions as timm gives them to it, or None.
    """
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
        post_norm=type(block) is EvaBlockPostNorm,
    )
    tokens = None if rope is None else attn.num_prefix_tokens + rope.shape[-2]
    angles = None if rope is None or tokens is None else angles_of(rope, pairs, tokens)
    scales = [layer_scale(getattr(block, name, None)) for name in ("gamma_1", "gamma_2")]
    more: dict[str, Any] = {"rope": angles, "rope_pairs": pairs}
    attention = open_attention(block, read, Projection(attn.proj), scales[0], size, **more)
    return OpenBlock(block, attention, open_mlp(block, scales[1], size))


def plain_eva(block: PrunedBlock, prefix: int, by_head: bool) -> nn.Module:
    """Return a compact block as timm's EvaBlock; see :func:`fill_turned`."""
    if block.post_norm:
        return cast(nn.Module, fill_turned(unfilled(EvaBlockPostNorm, dim=2, num_heads=1), block, prefix, by_head))
    plain = fill_turned(unfilled(EvaBlock, dim=2, num_heads=1), block, prefix, by_head)
    plain.gamma_1, plain.gamma_2 = whole_gamma(block.ls1), whole_gamma(block.ls2)
    return cast(nn.Module, plain)


def fill_turned(plain: Any, block: PrunedBlock, prefix: int, by_head: bool) -> Any:
    """Fill a block of timm's with the parts of a compact one, but for its layer scale.

    Args:
        plain: An EvaBlock, or one of the same parts.
        block: The compact one.
        prefix: Tokens that have no position.
        by_head: Whether each head has positions of its own.
    """
    attn, mlp = block.attn, block.mlp
    # timm's own takes the rotary positions of all heads that there were.
    of_all = not by_head or len(attn.heads) == attn.num_heads
    plain.attn = _plain_attention(attn, prefix, of_all)
    plain.mlp = plain_mlp(mlp)
    plain.mlp.fc2 = placed(mlp.fc2, mlp.out_cols, mlp.dim)
    plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
    if block.post_norm:
        plain.norm1, plain.norm2 = block.norm1, block.norm2
        let_read(plain.attn, plain.mlp, block)
    else:
        plain.norm1, plain.norm2 = then_select(block.norm1, attn.in_cols), then_select(block.norm2, mlp.in_cols)
    return plain.train(block.training)


def _plain_attention(attn: PrunedAttention, prefix: int, of_all: bool) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    whole = isinstance(attn.inner_norm, nn.Identity) or attn.inner_norm.features == sum(attn.v_widths)
    if of_all and len(widths) == 1 and 0 not in widths and whole and math.isclose(attn.scale, min(widths) ** -0.5):
        return _librarys_attention(attn, prefix)
    plain: Any = PlainEvaAttention(attn)
    plain.proj = placed(attn.proj, attn.out_cols, attn.dim)
    return plain


def _librarys_attention(attn: PrunedAttention, prefix: int) -> nn.Module:
    width = attn.v_widths[0]
    plain = unfilled(AttentionRope, dim=2, num_heads=1)
    plain.num_heads = plain.num_kv_heads = len(attn.heads)
    plain.head_dim, plain.scale = width, width**-0.5
    plain.attn_dim = plain.kv_dim = len(attn.heads) * width
    plain.num_prefix_tokens, plain.rotate_half = prefix, attn.rope_pairs == "halves"
    plain.qkv, plain.proj = plain_linear(attn.qkv), placed(attn.proj, attn.out_cols, attn.dim)
    plain.q_norm, plain.k_norm = attn.q_norm, attn.k_norm
    plain.norm = plain_norm(attn.inner_norm, plain.attn_dim)
    plain.attn_drop, plain.proj_drop = attn.attn_drop, attn.proj_drop
    return cast(nn.Module, plain)
