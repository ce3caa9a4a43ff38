# SPDX-License-Identifier: Apache-2.0
"""torchvision's VisionTransformer (vit_b_16 and the like), whose attention is ``nn.MultiheadAttention``."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torchvision.models.vision_transformer import EncoderBlock, MLPBlock, VisionTransformer

from gohsp.files import check_keys, cut, explain
from gohsp.layers import PlaceColumns, PrunedBlock, PrunedBlocks, RaggedAttention, SelectColumns, plain_linear
from gohsp.models.base import (
    MAX_DEPTH,
    MAX_SIZE,
    Attention,
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    Family,
    Geometry,
    Mlp,
    OpenBlock,
    Projection,
    wrong_kind,
)
from gohsp.models.refusals import why_altered, why_computed, why_linear, why_norm
from gohsp.models.registry import OUTSIDE, register


class PrunedTorchvisionTransformer(CompressedModel, VisionTransformer):
    """A torchvision VisionTransformer whose blocks are compact. Made by :func:`gohsp.compress`."""


class PlainAttention(RaggedAttention):
    """Attention of heads of any width in plain PyTorch, called as torchvision calls ``nn.MultiheadAttention``."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """Return the attention of a sequence [B, N, D] to itself, and None in place of the probabilities."""
        return super().forward(query), None


class TorchvisionVit(Family):
    """Adapter for torchvision's VisionTransformer."""

    wanted = OUTSIDE["torchvision"].wanted

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, VisionTransformer)

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        if type(model) is not VisionTransformer:
            raise wrong_kind(f"{self.wanted} (not a subclass)", model)
        if not len(model.encoder.layers):
            raise ValueError("model: it has no transformer blocks")
        for name, block in model.encoder.layers.named_children():
            if reason := _why_unsupported(block):
                raise ValueError(f"model: cannot prune encoder.layers.{name}: {reason}")
        return tuple(map(_open, model.encoder.layers))

    def open_block(self, block: nn.Module) -> OpenBlock | None:
        if type(block) is not EncoderBlock:
            return None
        if reason := _why_unsupported(block):
            raise ValueError(f"block: cannot prune it: {reason}")
        return _open(block)

    def architecture(self, model: nn.Module) -> str:
        return "torchvision VisionTransformer"

    def embed(self, model: Any, images: Tensor) -> Tensor:
        patches = model._process_input(images)
        tokens = torch.cat((model.class_token.expand(len(patches), -1, -1), patches), dim=1)
        return model.encoder.dropout(tokens + model.encoder.pos_embedding)

    def features(self, model: Any, x: Tensor) -> Tensor:
        return model.encoder.ln(x)[:, 0]

    def answers(self, model: Any, x: Tensor) -> Tensor:
        return model.heads(self.features(model, x))

    def normalisation(self, model: nn.Module) -> tuple[Sequence[float], Sequence[float]]:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    def stream_places(self, model: Any) -> list[nn.Module]:
        return [*model.encoder.layers, model.encoder.ln]

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        return len(model.encoder.layers), model.seq_length, model.hidden_dim

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        return 3, model.image_size, model.image_size

    def tokens(self, model: Any, height: int, width: int) -> int:
        own = (model.image_size, model.image_size)
        if (height, width) != own:
            raise ValueError(f"wanted {own}, which this model is fixed to, got {(height, width)}")
        return int(model.seq_length)

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        return [(model.conv_proj, (1, 3, height, width)), (model.heads, (1, model.hidden_dim))]

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result = _with_blocks(model, blocks)
        # The class changes and the object stays, with whatever the user hung on it.
        result.encoder.layers.__class__ = PrunedBlocks
        result.__class__ = PrunedTorchvisionTransformer
        return result

    def disassemble(self, model: Any) -> nn.Module:
        for name, block in model.encoder.layers.named_children():
            if reason := why_computed(block):
                raise ValueError(f"model: cannot make encoder.layers.{name} plain: {reason}")
        result = _with_blocks(model, [_plain_block(block) for block in copy.deepcopy(model.encoder.layers)])
        result.encoder.layers.__class__ = nn.Sequential
        result.__class__ = VisionTransformer
        return result

    def freeze(self, model: Any, blocks: nn.Module, embedding: str = "float32") -> nn.Module:
        """Return a copy with packed blocks. Embedding and head stay as they are."""
        result: Any = copy.deepcopy(model, {id(model.encoder.layers): blocks})
        return result.eval()

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        """Return the arguments that make the dense model, read from the live one."""
        block = next(iter(model.encoder.layers))
        return {
            "arguments": {
                "image_size": model.image_size,
                "patch_size": model.patch_size,
                "num_layers": geometry.depth,
                "num_heads": geometry.num_heads,
                "hidden_dim": geometry.dim,
                "mlp_dim": geometry.hidden,
                "dropout": block.attn.proj_drop.p,
                "attention_dropout": block.attn.attn_drop.p,
                "num_classes": model.num_classes,
                "representation_size": model.representation_size,
                "norm_eps": block.norm1.eps,
            }
        }

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        check_keys(description, ("arguments",), "plan.model")
        try:
            arguments = _Arguments.model_validate_json(json.dumps(description["arguments"])).model_dump()
        except ValidationError as error:
            raise ValueError(explain(error, "plan.model.arguments")) from error
        norm = partial(nn.LayerNorm, eps=arguments.pop("norm_eps"))
        try:
            with torch.device("meta"):
                return VisionTransformer(**arguments, norm_layer=norm)
        except Exception as error:  # torchvision asserts and divides with what it is given
            raise ValueError(f"plan.model.arguments: they make no VisionTransformer: {cut(error)}") from error


register(TorchvisionVit())


def _why_unsupported(block: Any) -> str | None:
    """Return why this block cannot be pruned exactly, or None if it can."""
    if type(block) is not EncoderBlock:
        return f"wanted torchvision's EncoderBlock, got {type(block).__name__}"
    attention, mlp = block.self_attention, block.mlp
    if type(attention) is not nn.MultiheadAttention:
        return f"self_attention is {type(attention).__name__}; wanted torch.nn.MultiheadAttention"
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        return "self_attention reads keys and values of its own; wanted one in_proj_weight, and no bias_k or zero_attn"
    kinds = (nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.Dropout)
    if type(mlp) is not MLPBlock or tuple(map(type, mlp)) != kinds or mlp[1].approximate != "none":
        return f"mlp is {type(mlp).__name__} of other layers; wanted Linear, GELU, Dropout, Linear, Dropout"
    if type(attention.out_proj) is not NonDynamicallyQuantizableLinear:  # a Linear in all but its name
        return why_linear("self_attention.out_proj", attention.out_proj) or why_altered(block)
    return why_altered(block) or why_norm("ln_1", block.ln_1) or why_norm("ln_2", block.ln_2)


def _joined(attention: nn.MultiheadAttention) -> nn.Linear:
    """Return the projection to q, k and v as a linear layer; its parameters are those of the attention."""
    with torch.device("meta"):
        joined = nn.Linear(1, 1, bias=False)
    joined.weight, joined.bias = attention.in_proj_weight, attention.in_proj_bias
    joined.out_features, joined.in_features = attention.in_proj_weight.shape
    return joined


def _open(block: Any) -> OpenBlock:
    attention, mlp, nothing = block.self_attention, block.mlp, nn.Identity()
    size = BlockGeometry(
        dim=attention.embed_dim,
        num_heads=attention.num_heads,
        head_dim=attention.head_dim,
        hidden=mlp[0].out_features,
    )
    return OpenBlock(
        block,
        Attention(
            norm=block.ln_1,
            body=attention,
            read=Projection(_joined(attention)),
            write=Projection(attention.out_proj),
            scale=nothing,
            drop_path=nothing,
            geometry=size,
            softmax_scale=attention.head_dim**-0.5,
            q_norm=nothing,
            k_norm=nothing,
            drop=nn.Dropout(attention.dropout),
            write_drop=block.dropout,
        ),
        Mlp(
            norm=block.ln_2,
            body=mlp,
            read=Projection(mlp[0]),
            write=Projection(mlp[3]),
            scale=nothing,
            drop_path=nothing,
            geometry=size,
            activation="gelu",
            drop=mlp[2],
            write_drop=mlp[4],
        ),
    )


def _with_blocks(model: Any, blocks: Sequence[nn.Module]) -> Any:
    """Return a copy of a model with other blocks under the names of its own."""
    result = copy.deepcopy(model)
    for name, block in zip([name for name, _ in result.encoder.layers.named_children()], blocks, strict=True):
        setattr(result.encoder.layers, name, block)
    return result


def _plain_block(block: PrunedBlock) -> nn.Module:
    """Return a block of torchvision's with the parameters of a compact one, which are shared."""
    attn, mlp = block.attn, block.mlp
    with torch.device("meta"):
        plain: Any = EncoderBlock(1, 1, 1, 0.0, 0.0)
    plain.num_heads = attn.num_heads
    plain.ln_1, plain.ln_2 = _then_select(block.norm1, attn.in_cols), _then_select(block.norm2, mlp.in_cols)
    plain.self_attention, plain.dropout = _plain_attention(attn), attn.proj_drop
    plain.mlp[0], plain.mlp[2] = plain_linear(mlp.fc1), mlp.drop1
    plain.mlp[3], plain.mlp[4] = _then_place(plain_linear(mlp.fc2), mlp), mlp.drop2
    return plain.train(block.training)


def _plain_attention(attn: Any) -> nn.Module:
    size = attn.dim
    widths = {*attn.qk_widths, *attn.v_widths}
    if attn.qkv.weight.shape != (3 * size, size) or attn.proj.weight.shape != (size, size) or len(widths) != 1:
        ragged: Any = PlainAttention(attn)
        ragged.proj = _then_place(ragged.proj, attn)
        return ragged
    with torch.device("meta"):
        plain: Any = nn.MultiheadAttention(size, attn.num_heads, attn.attn_drop.p, batch_first=True)
    plain.in_proj_weight, plain.in_proj_bias = attn.qkv.weight, attn.qkv.bias
    plain.out_proj.weight, plain.out_proj.bias = attn.proj.weight, attn.proj.bias
    return plain


def _then_select(norm: nn.Module, cols: Tensor | None) -> nn.Module:
    return norm if cols is None else nn.Sequential(norm, SelectColumns(cols))


def _then_place(linear: nn.Module, half: Any) -> nn.Module:
    return linear if half.out_cols is None else nn.Sequential(linear, PlaceColumns(half.out_cols, half.dim))


_Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
_Rate = Annotated[float, Field(ge=0, le=1)]


class _Arguments(BaseModel):
    """All that a description gives to torchvision."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    image_size: _Size
    patch_size: _Size
    num_layers: Annotated[int, Field(ge=1, le=MAX_DEPTH)]
    num_heads: _Size
    hidden_dim: _Size
    mlp_dim: _Size
    dropout: _Rate
    attention_dropout: _Rate
    num_classes: Annotated[int, Field(ge=1, le=2**24)]
    representation_size: _Size | None
    norm_eps: _Rate
