# SPDX-License-Identifier: Apache-2.0
"""timm's Beit (BEiT, BEiT v2) and VisionTransformerRelPos: scores of attention with biases for relative positions.

However a dense model comes to its biases, a compressed one has a table of them in each block, a column for each head
that is left.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast

import timm
import torch
from timm.models import beit
from timm.models.beit import Beit
from timm.models.vision_transformer_relpos import (
    RelPosAttention,
    RelPosBlock,
    ResPostRelPosBlock,
    VisionTransformerRelPos,
)
from torch import Tensor, nn

from gohsp.layers import FrozenBlock, PrunedAttention, PrunedBlock, PrunedBlocks, RaggedAttention, plain_linear
from gohsp.models.base import (
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    OpenBlock,
    Projection,
    ScoreBias,
    wrong_kind,
)
from gohsp.models.refusals import refuse_computed
from gohsp.models.registry import register
from gohsp.models.timm_named import COMMON_ARGUMENTS, OfOneSize, TimmNamed
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
    plain_scale,
    then_select,
    tokens_read,
    unfilled,
    whole_gamma,
    why_half_blocks,
)
from gohsp.models.timm_positions import bias_of, plain_positions, real_index


class PrunedRelPosBlock(PrunedBlock):
    """Block with compact parameters, called like timm's; biases are its own, those of the model are not read."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        shared_rel_pos: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
        num_queries: int | None = None,
    ) -> Tensor:
        """Return the block's output [B, num_queries or N, D] for x [B, N, D]."""
        return self.run(x, num_queries=num_queries)


class FrozenRelPosBlock(FrozenBlock):
    """Packed block, called like timm's; biases are packed, those that it is given are not read."""

    def forward(  # type: ignore[override]
        self, x: Tensor, shared_rel_pos: Tensor | None = None, shared_rel_pos_bias: Tensor | None = None
    ) -> Tensor:
        return super().forward(x)


class PlainRelPosAttention(RaggedAttention):
    """Attention of heads of any width in plain PyTorch, called like timm's."""

    def forward(  # type: ignore[override]
        self, x: Tensor, shared_rel_pos: Tensor | None = None, shared_rel_pos_bias: Tensor | None = None
    ) -> Tensor:
        return super().forward(x)


class PrunedRelPosModel(OfOneSize, CompressedModel):
    """What the compressed models of both classes have in common."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the tokens behind the last norm, as timm's own does."""
        return self._features(x, None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes], as timm's own forward does, for images [B, C, height, width]."""
        model: Any = self
        logits: Tensor = model.forward_head(self._features(x, tokens_read(self, 1)))
        return logits

    def _features(self, x: Tensor, queries: int | None) -> Tensor:
        model: Any = self
        x = _embed(model, x)
        if model.grad_checkpointing:
            for block in model.blocks:
                x = timm.models.checkpoint(block, x)
        else:
            x = model.blocks(x, num_queries=queries)
        features: Tensor = model.norm(x)
        return features


class PrunedBeit(PrunedRelPosModel, Beit):
    """A timm Beit whose blocks are compact. Made by :func:`gohsp.compress`."""


class PrunedVisionTransformerRelPos(PrunedRelPosModel, VisionTransformerRelPos):
    """A timm VisionTransformerRelPos whose blocks are compact. Made by :func:`gohsp.compress`."""


class TimmRelPos(TimmNamed):
    """Adapter for timm's VisionTransformerRelPos."""

    wanted = "a timm VisionTransformerRelPos (not a subclass)"
    dense, frozen_block, fc_norm = VisionTransformerRelPos, FrozenRelPosBlock, "fc_norm"
    compressed: ClassVar[type[nn.Module]] = PrunedVisionTransformerRelPos
    shared: ClassVar[str] = "shared_rel_pos"
    arguments: ClassVar[tuple[str, ...]] = (
        *COMMON_ARGUMENTS,
        *("qk_norm", "class_token", "fc_norm", "rel_pos_type", "rel_pos_dim", "shared_rel_pos", "fix_init"),
    )

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if type(model) is not self.dense:
            raise wrong_kind(self.wanted, model)
        check_blocks(model, self.why_unsupported)
        common = getattr(model, self.shared)
        return tuple(_open(block, self.bias(block.attn, common)) for block in model.blocks)

    def why_unsupported(self, block: Any) -> str | None:
        """Return why this block cannot be pruned exactly, or None if it can."""
        if type(block) not in (RelPosBlock, ResPostRelPosBlock):
            return f"wanted timm's RelPosBlock or ResPostRelPosBlock, got {type(block).__name__}"
        return _why_not(block, RelPosAttention)

    def bias(self, attn: Any, common: Any) -> ScoreBias | None:
        """Return what the attention of a block adds to its scores.

        Args:
            attn: The attention.
            common: What the model has for all of its blocks, or None.
        """
        source = attn.rel_pos if attn.rel_pos is not None else common
        return bias_of(source)

    def plain_block(self, block: PrunedBlock) -> nn.Module:
        """Return a compact block as the library's own, in plain PyTorch."""
        attn = block.attn
        kind = ResPostRelPosBlock if block.post_norm else RelPosBlock
        plain = _plain(unfilled(kind, dim=2, num_heads=1), block)
        if _is_whole(attn):
            plain.attn = _librarys(unfilled(RelPosAttention, dim=2, num_heads=1), attn)
            plain.attn.head_dim, plain.attn.q_norm, plain.attn.k_norm = attn.v_widths[0], attn.q_norm, attn.k_norm
            plain.attn.rel_pos = plain_positions(attn, (1, 1))
        if block.post_norm:
            let_read(plain.attn, plain.mlp, block)
        else:
            plain.ls1, plain.ls2 = plain_scale(block.ls1), plain_scale(block.ls2)
        return cast(nn.Module, plain)

    def embed(self, model: Any, images: Tensor) -> Tensor:
        return _embed(model, images)

    def taken_over(self, model: nn.Module) -> list[nn.Module]:
        common = getattr(model, self.shared)
        return [] if common is None else [common]

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result: Any = copy.deepcopy(model)
        for index, block in enumerate(blocks):
            block.__class__ = PrunedRelPosBlock
            result.blocks[index] = block
        result.blocks.__class__ = PrunedBlocks
        setattr(result, self.shared, None)  # each block has a table of its own
        result.__class__ = self.compressed
        return cast(nn.Module, result)

    def disassemble(self, model: Any) -> nn.Module:
        refuse_computed(model.blocks)
        result: Any = copy.deepcopy(model)
        for index, block in enumerate(result.blocks):
            result.blocks[index] = self.plain_block(block)
        result.blocks.__class__ = nn.Sequential
        result.__class__ = self.dense
        return cast(nn.Module, result)


class TimmBeit(TimmRelPos):
    """Adapter for timm's Beit."""

    wanted = "a timm Beit (not a subclass)"
    dense, fc_norm = Beit, "use_fc_norm"
    compressed = PrunedBeit
    shared = "rel_pos_bias"
    arguments = (
        *COMMON_ARGUMENTS,
        *("swiglu_mlp", "scale_mlp", "pos_drop_rate", "use_abs_pos_emb", "use_rel_pos_bias"),
        *("use_shared_rel_pos_bias", "head_init_scale", "use_fc_norm"),
    )

    def why_unsupported(self, block: Any) -> str | None:
        if type(block) is not beit.Block:
            return f"wanted timm's Block of Beit, got {type(block).__name__}"
        if block.attn.qkv_bias_separate:
            return "a bias of q, k and v that is added after the product"
        return _why_not(block, beit.Attention)

    def bias(self, attn: Any, common: Any) -> ScoreBias | None:
        sources = [attn] if attn.relative_position_bias_table is not None else []
        sources += [] if common is None else [common]
        if not sources:
            return None
        trains = any(source.relative_position_bias_table.requires_grad for source in sources)
        index = real_index(sources[0], beit.gen_relative_position_index)
        return ScoreBias(partial(_summed, sources), index, trains)

    def plain_block(self, block: PrunedBlock) -> nn.Module:
        plain = _plain(unfilled(beit.Block, dim=2, num_heads=1), block)
        if _is_whole(block.attn):
            plain.attn = _librarys(unfilled(beit.Attention, dim=2, num_heads=1), block.attn)
            if (table := block.attn.position_bias) is not None:
                plain.attn.window_size = (1, len(table.index) - 1)  # it counts tokens by it, and no more
                plain.attn.relative_position_bias_table = table.table
                del plain.attn.relative_position_index
                plain.attn.register_buffer("relative_position_index", table.index, persistent=False)
        plain.gamma_1, plain.gamma_2 = whole_gamma(block.ls1), whole_gamma(block.ls2)
        return cast(nn.Module, plain)


register(TimmRelPos())
register(TimmBeit())


def _embed(model: Any, x: Tensor) -> Tensor:
    """Return the tokens that the first block reads."""
    x = model.patch_embed(x)
    if model.cls_token is not None:
        x = torch.cat((model.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
    if getattr(model, "pos_embed", None) is not None:
        x = x + model.pos_embed
    x = model.pos_drop(x) if hasattr(model, "pos_drop") else x
    return x


def _summed(sources: Sequence[Any]) -> Tensor:
    """Return the sum of the tables of some modules, [positions, H]."""
    first, *more = (source.relative_position_bias_table for source in sources)
    table: Tensor = sum(more, first)
    return table


def _why_not(block: Any, attention: type[nn.Module]) -> str | None:
    attn = block.attn
    if type(attn) is not attention:
        return f"attn is {type(attn).__name__}; wanted timm's {attention.__name__}"
    return why_half_blocks(block)


def _open(block: Any, bias: ScoreBias | None) -> OpenBlock:
    attn, mlp = block.attn, block.mlp
    split = getattr(attn, "q_bias", None) is not None
    read = SplitBiases(attn) if split else Projection(attn.qkv)
    width = read.out_features // 3 // attn.num_heads
    size = BlockGeometry(
        dim=read.in_features,
        num_heads=attn.num_heads,
        head_dim=width,
        hidden=mlp.fc2.in_features,
        qk_norm=not isinstance(getattr(attn, "q_norm", nn.Identity()), nn.Identity),
        gated=is_gated(mlp),
        post_norm=type(block) is ResPostRelPosBlock,
    )
    scales = [
        getattr(block, own) if hasattr(block, own) else layer_scale(getattr(block, gamma, None))
        for own, gamma in (("ls1", "gamma_1"), ("ls2", "gamma_2"))
    ]
    attention = open_attention(block, read, Projection(attn.proj), scales[0], size, bias=bias)
    return OpenBlock(block, attention, open_mlp(block, scales[1], size))


def _is_whole(attn: PrunedAttention) -> bool:
    """Return whether an attention has all of its channels; timm's own can have no fewer."""
    widths = {*attn.qk_widths, *attn.v_widths}
    whole = len(widths) == 1 and sum(attn.v_widths) == attn.dim and attn.in_cols is None
    return whole and math.isclose(attn.scale, attn.v_widths[0] ** -0.5)  # which timm takes from the width


def _librarys(plain: Any, attn: PrunedAttention) -> Any:
    """Fill an attention of timm's with the parts of a compact one that has all of its channels."""
    plain.num_heads, plain.scale = len(attn.heads), attn.scale
    plain.qkv, plain.proj = plain_linear(attn.qkv), placed(attn.proj, attn.out_cols, attn.dim)
    plain.attn_drop, plain.proj_drop = attn.attn_drop, attn.proj_drop
    return plain


def _plain(plain: Any, block: PrunedBlock) -> Any:
    """Fill a block of timm's with the parts of a compact one, but for its layer scale."""
    attn: PrunedAttention = block.attn
    mlp = block.mlp
    front = (None, None) if block.post_norm else (attn.in_cols, mlp.in_cols)
    plain.norm1, plain.norm2 = then_select(block.norm1, front[0]), then_select(block.norm2, front[1])
    plain.attn = PlainRelPosAttention(attn)
    plain.attn.proj = placed(attn.proj, attn.out_cols, attn.dim)
    plain.drop_path1, plain.drop_path2 = block.drop_path1, block.drop_path2
    plain.mlp = plain_mlp(mlp)
    plain.mlp.fc2 = placed(mlp.fc2, mlp.out_cols, mlp.dim)
    return plain.train(block.training)
