# SPDX-License-Identifier: Apache-2.0
"""timm's image encoders of vision-language models, Qwen3 and DeepSeek, and the classifiers that wrap them.

Blocks with rotary positions as in Eva, images of any size, and a projector behind the blocks that merges neighbouring
tokens for a language model. Encoder and classifier are models of their own: each has an adapter.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from timm.layers import RmsNorm, RmsNormFp32
from timm.models.deepseek_vit import DeepseekVitBlock, DeepseekVitClassifier, DeepseekVitEncoder
from timm.models.qwen3_vit import Qwen3VitClassifier, Qwen3VitEncoder
from torch import Tensor, nn

from gohsp.layers import PrunedBlock, PrunedBlocks
from gohsp.models.base import CompactBlock, CompressedModel, Geometry, OpenBlock, wrong_kind
from gohsp.models.refusals import refuse_computed, why_altered
from gohsp.models.registry import register
from gohsp.models.timm_eva import (
    FrozenEvaBlock,
    HoldsPositions,
    PrunedEvaBlock,
    fill_turned,
    hold_positions,
    make_real,
    open_turned,
    own_positions,
    plain_eva,
    refuse_other_sizes,
    why_eva,
    why_turned,
)
from gohsp.models.timm_named import COMMON_ARGUMENTS, TimmNamed
from gohsp.models.timm_parts import check_blocks, unfilled, why_mlp, why_norms


class PrunedQwen3VitEncoder(HoldsPositions, Qwen3VitEncoder):
    """A timm Qwen3VitEncoder whose blocks are compact. Made by :func:`gohsp.compress`."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map of tokens behind the last block [B, height, width, D], as timm's own does."""
        return _map_of_tokens(self, x)


class PrunedQwen3VitClassifier(CompressedModel, Qwen3VitClassifier):
    """A timm Qwen3VitClassifier whose blocks are compact. Made by :func:`gohsp.compress`."""


class PrunedDeepseekVitEncoder(HoldsPositions, DeepseekVitEncoder):
    """A timm DeepseekVitEncoder whose blocks are compact. Made by :func:`gohsp.compress`."""

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the map of tokens behind the last norm [B, height, width, D], as timm's own does."""
        tokens: Tensor = self.norm(_map_of_tokens(self, x))
        return tokens


class PrunedDeepseekVitClassifier(CompressedModel, DeepseekVitClassifier):
    """A timm DeepseekVitClassifier whose blocks are compact. Made by :func:`gohsp.compress`."""


class TimmTower(TimmNamed):
    """Adapter for one encoder of timm's. What is not here is as in a VisionTransformer.

    Attributes:
        compressed: What a compressed model of the class is.
        encoder, compressed_encoder: The class of the encoder in it, dense and compressed.
        projector: Name of what merges tokens behind the blocks of the encoder.
    """

    frozen_block = FrozenEvaBlock
    compressed: ClassVar[type[nn.Module]]
    encoder: ClassVar[type[nn.Module]]
    compressed_encoder: ClassVar[type[nn.Module]]
    projector: ClassVar[str]

    @abstractmethod
    def why_unsupported(self, block: Any) -> str | None:
        """Return why a block cannot be pruned exactly, or None if it can."""

    def opened(self, block: Any, rope: Tensor | None) -> OpenBlock:
        """Return a block that there is nothing against, opened, for rotary positions as timm gives them to it."""
        return open_turned(block, rope)

    @abstractmethod
    def plain_block(self, block: PrunedBlock) -> nn.Module:
        """Return a compact block as the library's own, in plain PyTorch."""

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if type(model) is not self.dense:
            raise wrong_kind(self.wanted, model)
        trunk = self.trunk(model)
        check_blocks(trunk, self.why_unsupported)
        rope = own_positions(trunk)
        return tuple(self.opened(block, rope) for block in trunk.blocks)

    def embed(self, model: Any, images: Tensor) -> Tensor:
        trunk = self.trunk(model)
        refuse_other_sizes(trunk.patch_embed, images, "its patch_embed.set_input_size gives the model another size")
        tokens: Tensor = trunk._pos_embed(trunk.patch_embed(images))[0]
        return tokens

    def features(self, model: Any, x: Tensor) -> Tensor:
        """Return what the encoder gives, token by token where it does not pool them."""
        given = self._given(model, x)
        return given.flatten(1, -2) if given.dim() > 2 else given

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        return None  # an encoder is no classifier

    def _given(self, model: Any, x: Tensor) -> Tensor:
        """Return what the encoder gives for the residual stream [B, N, D] behind its last block."""
        trunk = self.trunk(model)
        tokens: Tensor = getattr(trunk, "norm", nn.Identity())(x.unflatten(1, trunk.patch_embed.grid_size))
        projector = getattr(trunk, self.projector)
        if projector is not None:
            return cast(Tensor, projector(tokens))
        return tokens.mean(dim=(1, 2)) if trunk.global_pool == "avg" else tokens

    def stream_places(self, model: Any) -> list[nn.Module]:
        trunk = self.trunk(model)
        return [*trunk.blocks, trunk.norm] if hasattr(trunk, "norm") else [*trunk.blocks]

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        trunk = self.trunk(model)
        embed, projector = trunk.patch_embed, getattr(trunk, self.projector)
        parts: list[tuple[nn.Module, tuple[int, ...]]] = [(embed, (1, embed.proj.in_channels, height, width))]
        if projector is not None:
            parts.append((projector, (1, *embed.dynamic_feat_size((height, width)), trunk.embed_dim)))
        return parts

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result: Any = copy.deepcopy(model)
        trunk = self.trunk(result)
        for index, block in enumerate(blocks):
            block.__class__ = PrunedEvaBlock
            trunk.blocks[index] = block
        trunk.blocks.__class__ = PrunedBlocks
        trunk.__class__, result.__class__ = self.compressed_encoder, self.compressed
        hold_positions(trunk)
        return cast(nn.Module, result)

    def refresh(self, model: Any) -> None:
        trunk = self.trunk(model)
        trunk.rope.to(trunk.patch_embed.proj.weight.dtype)
        trunk.take_over(own_positions(trunk))

    def disassemble(self, model: Any) -> nn.Module:
        refuse_computed(self.trunk(model).blocks)
        result: Any = copy.deepcopy(model)
        trunk = self.trunk(result)
        for index, block in enumerate(trunk.blocks):
            trunk.blocks[index] = self.plain_block(block)
        trunk.blocks.__class__ = nn.ModuleList
        trunk.__class__, result.__class__ = self.encoder, self.dense
        del trunk.own_rope
        return cast(nn.Module, result)

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        trunk = self.trunk(model)
        own = {"global_pool": model.global_pool, "in_chans": model.in_chans, "depth": len(trunk.blocks)}
        own |= {"img_size": list(trunk.patch_embed.img_size), "out_features": trunk.out_features}
        return self.described(model, own)

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        dense = super().build(description)
        make_real(self.trunk(dense).rope)
        return dense


class WrapsTower(TimmTower):
    """Adapter for one classifier of timm's that wraps an encoder."""

    def trunk(self, model: Any) -> Any:
        return model.encoder

    def features(self, model: Any, x: Tensor) -> Tensor:
        pooled: Tensor = model.forward_head(self._given(model, x), pre_logits=True)
        return pooled

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        if model.num_classes == 0:
            return None
        logits: Tensor = model.forward_head(self._given(model, x))
        return logits if logits.dim() == 2 else None

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        return [*super().modules_outside(model, height, width), (model.head, (1, model.num_features))]

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        found = super().describe(model, geometry)
        found["arguments"] |= {"num_classes": model.num_classes, "encoder_pool": model.encoder_pool}
        return found


_ARGUMENTS = (
    *(name for name in COMMON_ARGUMENTS if name not in ("qkv_bias", "init_values")),
    *("encoder_pool", "out_features", "rope_temperature", "norm_eps", "final_norm"),
)


class TimmQwen3Encoder(TimmTower):
    """Adapter for timm's Qwen3VitEncoder."""

    wanted = "a timm Qwen3VitEncoder (not a subclass)"
    dense = encoder = Qwen3VitEncoder
    compressed = compressed_encoder = PrunedQwen3VitEncoder
    projector = "merger"
    arguments = (*_ARGUMENTS, "merge_size", "pos_embed_grid_size")

    def why_unsupported(self, block: Any) -> str | None:
        return why_eva(block)

    def plain_block(self, block: PrunedBlock) -> nn.Module:
        return plain_eva(block, 0, False)


class TimmQwen3Classifier(WrapsTower, TimmQwen3Encoder):
    """Adapter for timm's Qwen3VitClassifier."""

    wanted = "a timm Qwen3VitClassifier (not a subclass)"
    dense, compressed = Qwen3VitClassifier, PrunedQwen3VitClassifier


class TimmDeepseekEncoder(TimmTower):
    """Adapter for timm's DeepseekVitEncoder.

    Its norms compute in float32 whatever the model is. Those of compressed models compute in the dtype of the model, as
    the kernels do: in float32 the two are the same.
    """

    wanted = "a timm DeepseekVitEncoder (not a subclass)"
    dense = encoder = DeepseekVitEncoder
    compressed = compressed_encoder = PrunedDeepseekVitEncoder
    projector = "aligner"
    arguments = (*_ARGUMENTS, "downsample_ratio", "dynamic_img_pad")

    def why_unsupported(self, block: Any) -> str | None:
        if type(block) is not DeepseekVitBlock:
            return f"wanted timm's DeepseekVitBlock, got {type(block).__name__}"
        return (
            why_altered(block)
            or why_norms(block, RmsNormFp32)
            or why_turned(block.attn)
            or why_mlp(block.mlp, block.norm2.normalized_shape[0])
        )

    def opened(self, block: Any, rope: Tensor | None) -> OpenBlock:
        found = open_turned(block, rope)
        attention = replace(found.attention, norm=_in_own_dtype(block.norm1))
        return replace(found, attention=attention, mlp=replace(found.mlp, norm=_in_own_dtype(block.norm2)))

    def plain_block(self, block: PrunedBlock) -> nn.Module:
        return cast(nn.Module, fill_turned(unfilled(DeepseekVitBlock, dim=4, num_heads=1), block, 0, False))

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result: Any = super().assemble(model, blocks)
        for holder in {result, self.trunk(result)}:
            holder.norm = _in_own_dtype(holder.norm)
        return cast(nn.Module, result)


class TimmDeepseekClassifier(WrapsTower, TimmDeepseekEncoder):
    """Adapter for timm's DeepseekVitClassifier."""

    wanted = "a timm DeepseekVitClassifier (not a subclass)"
    dense, compressed = DeepseekVitClassifier, PrunedDeepseekVitClassifier


register(TimmQwen3Encoder())
register(TimmQwen3Classifier())
register(TimmDeepseekEncoder())
register(TimmDeepseekClassifier())


def _in_own_dtype(norm: Any) -> Any:
    """Return a norm that computes in the dtype of its input, with the same parameters."""
    if type(norm) is not RmsNormFp32:
        return norm
    own = unfilled(RmsNorm, channels=norm.normalized_shape, eps=norm.eps, affine=norm.elementwise_affine)
    own.weight = norm.weight
    return own.train(norm.training)


def _map_of_tokens(encoder: Any, x: Tensor) -> Tensor:
    """Return the residual stream behind the last block [B, height, width, D], for images."""
    x = encoder.patch_embed(x)
    grid = x.shape[1:3]
    tokens, rope = encoder._pos_embed(x)
    stream: Tensor = encoder.through(tokens, rope)
    return stream.unflatten(1, grid)
