# SPDX-License-Identifier: Apache-2.0
"""The image encoders of Hugging Face transformers: ViT, DeiT, MSN, IJepa, DINOv2, DINOv3, CLIP, SigLIP.

Imported where such a model is met, because transformers is optional. A model stays one of its class: only its layers
are replaced. transformers calls these one by one, so that each is a chain of its own; those of a frozen model are one.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn
from transformers import activations
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.ijepa import modeling_ijepa as ijepa
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.vit import modeling_vit as vit
from transformers.models.vit_msn import modeling_vit_msn as msn
from transformers.utils import output_capturing

from gohsp.files import check_keys, cut, explain, shown
from gohsp.layers import (
    FrozenBlocks,
    PlaceColumns,
    PrunedAttention,
    PrunedBlock,
    RaggedAttention,
    SelectColumns,
    head_angles,
    plain_linear,
)
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

OLDEST = "5.20"
"""Release of transformers from which on the layers have these names."""

ACTIVATIONS: dict[type[nn.Module], str] = {
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    activations.SiLUActivation: "silu",
    activations.LinearActivation: "identity",
    nn.SiLU: "silu",
    nn.ReLU: "relu",
}
"""Modules that transformers makes of ``hidden_act``, and the name in gohsp_kernels."""


@dataclass(frozen=True)
class Names:
    """What an architecture calls its parts.

    Attributes:
        layer, attention, mlp: Classes.
        layers: Path from the encoder to the list of layers.
        patches: Path from the encoder to the convolution of patches.
        norm: Of the residual stream behind the last layer.
        prefix: How many tokens stand in front of the patches, for a configuration.
        attn, norms: In a layer: attention, and the norms in front of attention and MLP.
        write, heads, scale, drop: In the attention.
        fc1, fc2, act: In the MLP: its matrices and the module of its activation.
        gated: Class of the MLP with a gate, and the name of that in it, where the architecture knows one.
        rope: What gives rotary positions for images, in the encoder; empty where there are none.
        any_size: Whether positions follow the size of the images.
        pixels: Mean and deviation that pixels are normalised with.
    """

    layer: type[nn.Module]
    attention: type[nn.Module]
    mlp: type[nn.Module]
    layers: str
    patches: str
    norm: str
    prefix: Callable[[Any], int]
    attn: str
    norms: tuple[str, str]
    write: str = "o_proj"
    heads: str = "num_attention_heads"
    scale: str = "scaling"
    drop: str = "attention_dropout"
    fc1: str = "fc1"
    fc2: str = "fc2"
    act: str = "activation_fn"
    gated: tuple[type[nn.Module], str] | None = None
    rope: str = ""
    any_size: bool = False
    pixels: tuple[Sequence[float], Sequence[float]] = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


_HALVES = ((0.5,) * 3, (0.5,) * 3)


def _vit_names(layer: Any, attention: Any, mlp: Any, prefix: int, pixels: Any) -> Names:
    return Names(
        *(layer, attention, mlp, "layers", "embeddings.patch_embeddings.projection", "layernorm"),
        prefix=lambda config: prefix,
        attn="attention",
        norms=("layernorm_before", "layernorm_after"),
        pixels=pixels,
    )


def _dinov2_names(layer: Any, attention: Any, mlp: Any) -> Names:
    return Names(
        *(layer, attention, mlp, "encoder.layer", "embeddings.patch_embeddings.projection", "layernorm"),
        prefix=lambda config: 1 + getattr(config, "num_register_tokens", 0),
        attn="attention",
        norms=("norm1", "norm2"),
        any_size=True,
    )


def _clip_names(layer: Any, attention: Any, mlp: Any, prefix: int, pixels: Any) -> Names:
    return Names(
        *(layer, attention, mlp, "encoder.layers", "embeddings.patch_embedding", "post_layernorm"),
        prefix=lambda config: prefix,
        attn="self_attn",
        norms=("layer_norm1", "layer_norm2"),
        write="out_proj",
        heads="num_heads",
        scale="scale",
        drop="dropout",
        pixels=pixels,
    )


VIT = _vit_names(vit.ViTLayer, vit.ViTAttention, vit.ViTMLP, 1, _HALVES)
DEIT = _vit_names(*(deit.DeiTLayer, deit.DeiTAttention, deit.DeiTMLP, 2), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
MSN = _vit_names(
    *(msn.ViTMSNLayer, msn.ViTMSNAttention, msn.ViTMSNMLP, 1), (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
)
IJEPA = _vit_names(ijepa.IJepaLayer, ijepa.IJepaAttention, ijepa.IJepaMLP, 0, _HALVES)
DINOV2 = _dinov2_names(dinov2.Dinov2Layer, dinov2.Dinov2Attention, dinov2.Dinov2MLP)
REGISTERS = _dinov2_names(
    registers.Dinov2WithRegistersLayer, registers.Dinov2WithRegistersAttention, registers.Dinov2WithRegistersMLP
)
DINOV3 = Names(
    *(dinov3.DINOv3ViTLayer, dinov3.DINOv3ViTAttention, dinov3.DINOv3ViTMLP, "model.layer"),
    *("embeddings.patch_embeddings", "norm"),
    prefix=lambda config: 1 + config.num_register_tokens,
    attn="attention",
    norms=("norm1", "norm2"),
    heads="num_heads",
    drop="dropout",
    fc1="up_proj",
    fc2="down_proj",
    act="act_fn",
    gated=(dinov3.DINOv3ViTGatedMLP, "gate_proj"),
    rope="rope_embeddings",
    any_size=True,
)
CLIP = _clip_names(*(clip.CLIPEncoderLayer, clip.CLIPAttention, clip.CLIPMLP, 1), (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
SIGLIP = _clip_names(siglip.SiglipEncoderLayer, siglip.SiglipAttention, siglip.SiglipMLP, 0, _HALVES)
LAYERS = {names.layer: names for names in (VIT, DEIT, MSN, IJEPA, DINOV2, REGISTERS, DINOV3, CLIP, SIGLIP)}


def _all(names: Names, encoder: Any, x: Tensor) -> Tensor:
    """What a model without a head gives: the tokens in front, and the mean of the patches."""
    x, prefix = getattr(encoder, names.norm)(x), names.prefix(encoder.config)
    return torch.cat((x[:, :prefix], x[:, prefix:].mean(dim=1, keepdim=True)), dim=1)


def _first(names: Names, encoder: Any, x: Tensor) -> Tensor:
    return getattr(encoder, names.norm)(x[:, 0])


def _first_two(names: Names, encoder: Any, x: Tensor) -> Tensor:
    return getattr(encoder, names.norm)(x[:, :2])


def _first_and_mean(names: Names, encoder: Any, x: Tensor) -> Tensor:
    tokens = _all(names, encoder, x)
    return torch.cat((tokens[:, 0], tokens[:, -1]), dim=1)


def _mean(names: Names, encoder: Any, x: Tensor) -> Tensor:
    return getattr(encoder, names.norm)(x).mean(dim=1)


def _mean_of_bare_patches(names: Names, encoder: Any, x: Tensor) -> Tensor:
    return x[:, names.prefix(encoder.config) :].mean(dim=1)


def _pooled(names: Names, encoder: Any, x: Tensor) -> Tensor:
    x = getattr(encoder, names.norm)(x)
    return encoder.head(x) if encoder.use_head else x.mean(dim=1)


@dataclass(frozen=True)
class Kind:
    """One class of models.

    Attributes:
        dense: The class of transformers.
        names: Of its encoder's parts.
        path: To the encoder; empty where it is the model itself.
        read: What its head reads, of the encoder and the residual stream.
        heads: Its linear layers behind the encoder; where there are two, the logits are their mean.
    """

    dense: type[Any]
    names: Names
    path: str
    read: Callable[[Names, Any, Tensor], Tensor]
    heads: tuple[str, ...] = ()

    @property
    def compressed(self) -> type[nn.Module]:
        """The class that a compressed model of this kind has."""
        return globals()[f"Pruned{self.dense.__name__}"]

    def encoder(self, model: Any) -> Any:
        """Return what embeds images and has the layers."""
        return getattr(model, self.path) if self.path else model

    def layers(self, model: Any) -> Any:
        """Return the list of layers."""
        return self.encoder(model).get_submodule(self.names.layers)

    def patches(self, model: Any) -> Any:
        """Return the convolution of patches."""
        return self.encoder(model).get_submodule(self.names.patches)


_TEACHERS = ("cls_classifier", "distillation_classifier")
KINDS: dict[type[Any], Kind] = {
    kind.dense: kind
    for kind in (
        Kind(vit.ViTModel, VIT, "", _all),
        Kind(vit.ViTForImageClassification, VIT, "vit", _first, ("classifier",)),
        Kind(deit.DeiTModel, DEIT, "", _all),
        Kind(deit.DeiTForImageClassification, DEIT, "deit", _first, ("classifier",)),
        Kind(deit.DeiTForImageClassificationWithTeacher, DEIT, "deit", _first_two, _TEACHERS),
        Kind(msn.ViTMSNModel, MSN, "", _all),
        Kind(msn.ViTMSNForImageClassification, MSN, "vit", _first, ("classifier",)),
        Kind(ijepa.IJepaModel, IJEPA, "", _all),
        Kind(ijepa.IJepaForImageClassification, IJEPA, "ijepa", _mean, ("classifier",)),
        Kind(dinov2.Dinov2Model, DINOV2, "", _all),
        Kind(dinov2.Dinov2ForImageClassification, DINOV2, "dinov2", _first_and_mean, ("classifier",)),
        Kind(registers.Dinov2WithRegistersModel, REGISTERS, "", _all),
        Kind(
            *(registers.Dinov2WithRegistersForImageClassification, REGISTERS, "dinov2_with_registers"),
            *(_first_and_mean, ("classifier",)),
        ),
        Kind(dinov3.DINOv3ViTModel, DINOV3, "", _all),
        Kind(clip.CLIPVisionModel, CLIP, "", _all),
        Kind(clip.CLIPVisionModelWithProjection, CLIP, "vision_model", _first),
        Kind(clip.CLIPForImageClassification, CLIP, "vision_model", _mean_of_bare_patches, ("classifier",)),
        Kind(siglip.SiglipVisionModel, SIGLIP, "", _pooled),
        Kind(siglip.SiglipForImageClassification, SIGLIP, "vision_model", _mean, ("classifier",)),
    )
}


def kind_of(model: nn.Module) -> Kind | None:
    """Return the kind of a dense, compressed or frozen model, or None if it is of none."""
    return next((KINDS[base] for base in type(model).__mro__ if base in KINDS), None)


class PrunedLayer(PrunedBlock):
    """A compact layer, called as transformers calls its own. Each of their classes has a subclass that is one as well.

    So transformers finds the layers where it gives hidden states or checkpoints gradients.

    Attributes:
        positions: Rotary positions that the layer holds, see :meth:`hold`.
        prefix: How many tokens in front of the patches have none.
    """

    positions: Tensor
    prefix: int

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Return the residual stream after the layer, [B, N, D].

        Args:
            hidden_states: [B, N, D].
            attention_mask: Bool (True = may attend) or additive, broadcastable to [B, heads of the dense layer, N, N].
            kwargs: Of transformers; ``position_embeddings`` are cosine and sine of rotary positions.

        Raises:
            ValueError: The probabilities of attention are asked for, or the mask has another form.
        """
        _refuse_attentions(kwargs)
        rope = self._turns(kwargs.get("position_embeddings"), hidden_states.shape[1])
        return self.run(hidden_states, *_masked(attention_mask, kwargs), rope=rope)

    def hold(self, positions: Tensor) -> None:
        """Let the layer hold rotary positions, for its packed weights.

        Args:
            positions: [2, patches, d], cosine and sine.
        """
        with torch.inference_mode(False):  # training reads them too
            self.register_buffer("positions", positions.detach().clone(), persistent=False)
            self.attn.rope = self.attn.angles(angles_of(self.positions, self.prefix + positions.shape[1]))

    def _turns(self, given: tuple[Tensor, Tensor] | None, tokens: int) -> Tensor | None:
        """Return the positions that a call is given, or None where the layer holds them.

        In inference it takes over those of the images that come, so that of one size all but the first find it ready.
        """
        if given is None:
            return None
        fixed = given[0].device.type == "cpu" and not torch.compiler.is_compiling() and not self.training
        if not fixed or torch.is_grad_enabled():
            return self.attn.angles(angles_of(torch.stack(given), tokens))
        if not _same(given, self.positions):
            self.hold(torch.stack(given))
        return None

    def is_hooked(self) -> bool:
        return any(not _records(hook) for hook in self._forward_hooks.values()) or any(
            (self._forward_pre_hooks, self._backward_hooks, self._backward_pre_hooks)
        )


def angles_of(positions: Tensor, tokens: int) -> Tensor:
    """Return rotary positions as :class:`gohsp.models.base.Attention` has them.

    Args:
        positions: [2, patches, d], cosine and sine, each once for both channels of a pair.
        tokens: In all; those in front of the patches have no position.

    Returns:
        [2, 1, tokens, d / 2].
    """
    cos, sin = positions[..., : positions.shape[-1] // 2]
    prefix = (0, 0, tokens - positions.shape[1], 0)
    return torch.stack((F.pad(cos, prefix, value=1.0), F.pad(sin, prefix)))[:, None]


def _same(given: tuple[Tensor, Tensor], held: Tensor) -> bool:
    return given[0].shape == held.shape[1:] and given[0].dtype == held.dtype and all(map(torch.equal, given, held))


class FrozenLayers(nn.Module):
    """All layers of a frozen model, in the place of the list's first.

    Args:
        blocks: The layers.
        positions: Rotary positions that they hold, see :meth:`PrunedLayer.hold`; None for none.
    """

    def __init__(self, blocks: FrozenBlocks, positions: Tensor | None) -> None:
        super().__init__()
        self.blocks = blocks
        self.register_buffer("positions", positions, persistent=False)

    positions: Tensor | None

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the residual stream after the last layer, [B, N, D].

        Raises:
            ValueError: A mask, probabilities of attention or hidden states are asked for.
        """
        _refuse_attentions(kwargs)
        if kwargs.get("output_hidden_states"):
            raise ValueError("output_hidden_states: wanted False; got True, but a frozen model runs its layers as one")
        if attention_mask is not None or kwargs.get("is_causal"):
            raise ValueError("attention_mask: wanted None; got one, which a frozen model does not take")
        given = kwargs.get("position_embeddings")
        if given is not None and self.positions is not None and not _same(given, self.positions):
            raise ValueError(
                "pixel_values: wanted images of the size in the configuration, whose rotary positions a frozen model "
                "holds; set config.image_size before gohsp.freeze"
            )
        return self.blocks(hidden_states)


class PlainRagged(RaggedAttention):
    """Attention of heads of different widths in plain PyTorch, called as transformers calls its own."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Return the attention's output [B, N, D], and None in place of the probabilities."""
        given, angles = kwargs.get("position_embeddings"), None
        if given is not None:
            turns = angles_of(torch.stack(given), hidden_states.shape[1])
            angles = head_angles(turns, self.num_heads, self.heads)
        return super().forward(hidden_states, *_masked(attention_mask, kwargs), angles), None


def _refuse_attentions(asked: Mapping[str, Any]) -> None:
    if asked.get("output_attentions"):
        raise ValueError(
            "output_attentions: wanted False; got True, but the kernels keep no probabilities of attention. "
            "Ask the dense model"
        )


def _masked(attention_mask: Tensor | None, asked: Mapping[str, Any]) -> tuple[Tensor | None, bool]:
    """Return the mask, and whether tokens attend to earlier ones alone; as in transformers a mask says that itself."""
    if attention_mask is None:
        return None, bool(asked.get("is_causal"))
    if attention_mask.dim() != 4:
        raise ValueError(
            f"attention_mask: wanted [B, heads, N, N], as of 'sdpa' and 'eager'; got {list(attention_mask.shape)}. "
            "Call model.set_attn_implementation('sdpa')"
        )
    return attention_mask, False


def _records(hook: Any) -> bool:
    """Whether a hook is one that transformers left, after hidden states were asked for; it stays, and rests."""
    return getattr(hook, "__module__", "") == output_capturing.__name__


class PrunedEncoder(CompressedModel):
    """What the compressed classes of transformers' models have in common."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Write configuration and compact parameters, as a Trainer's checkpoint wants them.

        ``from_pretrained`` does not read them: no configuration tells what was pruned. :func:`gohsp.save` writes what
        :func:`gohsp.load` reads.
        """
        warnings.warn(
            "save_pretrained: it writes the compact parameters, but from_pretrained cannot read them, because the "
            "configuration does not tell what was pruned; gohsp.save(model, directory) writes what gohsp.load reads",
            stacklevel=2,
        )
        # Under the names that the model has, not under those of older releases, which load_state_dict does not know.
        return super().save_pretrained(*args, **{"save_original_format": False, **kwargs})  # type: ignore[misc]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # transformers does so when it makes a model; ours change their class, or come out of a pickle.
        dict.__setitem__(output_capturing._CAN_RECORD_REGISTRY, str(cls), cls._can_record_outputs)  # type: ignore[attr-defined]


def _subclass(name: str, *bases: type[Any], doc: str) -> None:
    """Put a class of that name into this module, where pickles find it."""
    globals()[name] = type(name, bases, {"__module__": __name__, "__qualname__": name, "__doc__": doc})


for _layer in LAYERS:
    _subclass(f"Pruned{_layer.__name__}", PrunedLayer, _layer, doc="A compact layer of that architecture.")
for _dense in KINDS:
    _subclass(f"Pruned{_dense.__name__}", PrunedEncoder, _dense, doc="Such a model with compact layers.")


class HfVit(Family):
    """Adapter for the image encoders of Hugging Face transformers."""

    wanted = OUTSIDE["transformers"].wanted

    def claims(self, model: nn.Module) -> bool:
        return kind_of(model) is not None

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        kind = KINDS.get(type(model))
        if kind is None:
            raise wrong_kind(" or ".join(dense.__name__ for dense in KINDS) + " (not a subclass)", model)
        if Version(transformers.__version__) < Version(OLDEST):
            raise ValueError(f"model: wanted transformers {OLDEST} or newer; got {transformers.__version__}")
        layers, names = kind.layers(model), kind.names
        if not len(layers):
            raise ValueError("model: it has no transformer layers")
        for index, layer in enumerate(layers):
            if reason := _why_unsupported(layer, names):
                raise ValueError(f"model: cannot prune {names.layers}.{index}: {reason}")
        rope = _own_angles(kind, model)
        return tuple(_open(layer, names, rope) for layer in layers)

    def open_block(self, block: nn.Module) -> OpenBlock | None:
        names = LAYERS.get(type(block))
        if names is None:
            return None
        if names.rope:
            raise ValueError("block: cannot prune it: its model gives it rotary positions; wanted the model")
        if reason := _why_unsupported(block, names):
            raise ValueError(f"block: cannot prune it: {reason}")
        return _open(block, names, None)

    def dress(self, compact: CompactBlock, block: nn.Module) -> CompactBlock:
        compact.__class__ = globals()[f"Pruned{type(block).__name__}"]
        return compact

    def keeps_hook(self, hook: Any) -> bool:
        return _records(hook)

    def architecture(self, model: nn.Module) -> str:
        """Return the name of the class in transformers."""
        return _kind(model).dense.__name__

    def embed(self, model: Any, images: Tensor) -> Tensor:
        kind = _kind(model)
        encoder, own = kind.encoder(model), self.image_shape(model)[1:]
        if kind.names.rope and tuple(images.shape[-2:]) != own:
            raise ValueError(
                f"images: wanted {own}, which config.image_size says and rotary positions are made for, got "
                f"{list(images.shape)}; set config.image_size to what the images are"
            )
        tokens: Tensor = encoder.embeddings(images)
        return encoder.pre_layrnorm(tokens) if hasattr(encoder, "pre_layrnorm") else tokens

    def features(self, model: Any, x: Tensor) -> Tensor:
        """Return what the head reads; of a model without one, the tokens in front and the mean of the patches."""
        kind = _kind(model)
        return kind.read(kind.names, kind.encoder(model), x)

    def answers(self, model: Any, x: Tensor) -> Tensor | None:
        kind = _kind(model)
        heads = [getattr(model, name) for name in kind.heads]
        if not heads or isinstance(heads[0], nn.Identity):
            return None
        read = self.features(model, x)
        each = [read] if len(heads) == 1 else read.unbind(dim=1)
        return torch.stack([head(part) for head, part in zip(heads, each, strict=True)]).mean(dim=0)

    def classes(self, model: Any) -> int:
        return int(model.num_labels) if _kind(model).heads else 0

    def normalisation(self, model: Any) -> tuple[Sequence[float], Sequence[float]]:
        """Return what the published models of the architecture have; the mean where the channels are no colours."""
        mean, std = _kind(model).names.pixels
        if _kind(model).patches(model).in_channels == len(mean):
            return mean, std
        return (sum(mean) / len(mean),), (sum(std) / len(std),)

    def stream_places(self, model: Any) -> list[nn.Module]:
        kind = _kind(model)
        # CLIP normalises the class token alone.
        norm = [] if kind.names is CLIP else [getattr(kind.encoder(model), kind.names.norm)]
        return [*kind.layers(model), *norm]

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        _, height, width = self.image_shape(model)
        kind = _kind(model)
        return len(kind.layers(model)), self.tokens(model, height, width), kind.patches(model).out_channels

    def image_shape(self, model: Any) -> tuple[int, int, int]:
        kind = _kind(model)
        return kind.patches(model).in_channels, *_pair(kind.encoder(model).config.image_size)

    def tokens(self, model: Any, height: int, width: int) -> int:
        kind = _kind(model)
        config, own = kind.encoder(model).config, self.image_shape(model)[1:]
        if not kind.names.any_size and (height, width) != own:
            raise ValueError(f"wanted {own}, which this model is fixed to, got {(height, width)}")
        rows, columns = _pair(config.patch_size)
        return (height // rows) * (width // columns) + kind.names.prefix(config)

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        kind, tokens = _kind(model), self.tokens(model, height, width)
        encoder, patches = kind.encoder(model), kind.patches(model)
        dim = patches.out_channels
        parts: list[tuple[nn.Module | None, tuple[int, ...]]] = [
            (patches, (1, patches.in_channels, height, width)),
            (getattr(getattr(encoder, "pooler", None), "dense", None), (1, dim)),
            (encoder.head if getattr(encoder, "use_head", False) else None, (1, tokens, dim)),
            (getattr(model, "visual_projection", None), (1, dim)),
        ]
        heads = [getattr(model, name) for name in kind.heads]
        parts += [(head, (1, head.in_features)) for head in heads if isinstance(head, nn.Linear)]
        return [(module, shape) for module, shape in parts if module is not None]

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        kind = _kind(model)
        result = _copy_without_layers(model)
        kind.layers(result).extend(map(self.dress, blocks, kind.layers(model)))
        result.__class__ = kind.compressed
        self.refresh(result)
        return result

    def refresh(self, model: Any) -> None:
        """Let the layers hold the rotary positions of images of the size in the configuration."""
        kind = _kind(model)
        if kind.names.rope:  # a model in float64 has its frequencies in it
            rope: Any = getattr(kind.encoder(model), kind.names.rope)
            rope.to(torch.promote_types(rope.inv_freq.dtype, kind.patches(model).weight.dtype))
        positions = _own_positions(kind, model)
        for layer in kind.layers(model) if positions is not None else ():
            layer.prefix = kind.names.prefix(kind.encoder(model).config)
            layer.hold(positions)

    def disassemble(self, model: nn.Module) -> nn.Module:
        kind = _kind(model)
        for index, block in enumerate(kind.layers(model)):
            if reason := why_computed(block):
                raise ValueError(f"model: cannot make {kind.names.layers}.{index} plain: {reason}")
        result = _copy_without_layers(model)
        config = kind.encoder(result).config
        kind.layers(result).extend(
            _plain_layer(block, kind.names, config) for block in copy.deepcopy(kind.layers(model))
        )
        result.__class__ = kind.dense
        return result

    def freeze(self, model: nn.Module, blocks: nn.Module, embedding: str = "float32") -> nn.Module:
        """Return a copy with packed layers. Embedding and heads stay as they are."""
        kind, result = _kind(model), _copy_without_layers(model)
        frozen = FrozenLayers(blocks, _own_positions(kind, model))  # type: ignore[arg-type]
        kind.layers(result).append(frozen)
        return result.eval()

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        """Return the class, and of its configuration what decides which modules it makes and what they compute."""
        kind = _kind(model)
        encoder, names = kind.encoder(model), list(_Config.model_fields)
        whole, tower = model.config.to_dict(), encoder.config.to_dict()
        described = {
            "class": kind.dense.__name__,
            "config": {name: tower[name] for name in names if name in tower},
            "labels": list(whole["id2label"].values()) if kind.heads else None,
        }
        if not kind.path and kind.names in (VIT, DEIT, MSN, IJEPA):  # whose encoders are made with options
            options = {"use_mask_token": encoder.embeddings.mask_token is not None}
            pooled = {"add_pooling_layer": encoder.pooler is not None} if hasattr(encoder, "pooler") else {}
            described["options"] = {**pooled, **options}
        return described

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        check_keys(description, ("class", "config", "labels"), "plan.model", optional=("options",))
        wanted = {dense.__name__: kind for dense, kind in KINDS.items()}.get(str(description["class"]))
        if wanted is None:
            names = sorted(dense.__name__ for dense in KINDS)
            raise ValueError(f"plan.model.class: wanted one of {names}, got {shown(description['class'])}")
        config = _read(_Config, description["config"], "plan.model.config")
        options = _read(_Options, description.get("options", {}), "plan.model.options")
        labels = _read(_Labels, {"labels": description["labels"]}, "plan.model").get("labels")
        try:
            return _make(wanted, config, options if not wanted.path else {}, labels)
        except Exception as error:  # transformers divides, indexes and raises with what it is given
            raise ValueError(f"plan.model.config: it makes no {wanted.dense.__name__}: {cut(error)}") from error


register(HfVit())


def _kind(model: nn.Module) -> Kind:
    kind = kind_of(model)
    assert kind is not None  # the registry asks the families that claim a model
    return kind


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _why_unsupported(layer: Any, names: Names) -> str | None:
    """Return why this layer cannot be pruned exactly, or None if it can."""
    if type(layer) is not names.layer:
        return f"wanted {names.layer.__name__}, got {type(layer).__name__}"
    attention, mlp = getattr(layer, names.attn), layer.mlp
    if type(attention) is not names.attention:
        return f"{names.attn} is {type(attention).__name__}; wanted {names.attention.__name__}"
    if type(mlp) is not names.mlp and not _is_gated(mlp, names):
        gated = " (a gated MLP, whose two products no kernel multiplies)" if "SwiGLU" in type(mlp).__name__ else ""
        return f"mlp is {type(mlp).__name__}{gated}; wanted {names.mlp.__name__}"
    linear = ("q_proj", "k_proj", "v_proj", names.write)
    reasons = [
        why_altered(layer),
        *(why_norm(name, getattr(layer, name)) for name in names.norms),
        *(why_linear(f"{names.attn}.{name}", getattr(attention, name)) for name in linear),
        *(why_linear(f"mlp.{name}", getattr(mlp, name)) for name in (*_reads(mlp, names), names.fc2)),
    ]
    return next((reason for reason in reasons if reason), None) or _why_sizes(attention, mlp, names)


def _why_sizes(attention: Any, mlp: Any, names: Names) -> str | None:
    span = getattr(attention, names.heads) * attention.head_dim
    widths = [getattr(attention, name).out_features for name in ("q_proj", "k_proj", "v_proj")]
    dim = attention.q_proj.in_features
    if widths != [span] * 3:
        return f"q, k and v have {widths} channels; wanted {span} each ({names.heads} x head_dim)"
    for written in (getattr(attention, names.write).out_features, getattr(mlp, names.fc2).out_features):
        if written != dim:
            return f"{written} features are written into a residual stream of {dim}"
    activation = getattr(mlp, names.act)
    if type(activation) not in ACTIVATIONS:
        known = ", ".join(sorted(set(ACTIVATIONS.values())))
        return f"activation {type(activation).__name__}; known are {known}"
    return None


def _is_gated(mlp: Any, names: Names) -> bool:
    return names.gated is not None and type(mlp) is names.gated[0]


def _reads(mlp: Any, names: Names) -> tuple[str, ...]:
    """Return what the first matrices of an MLP are called: a gate comes first."""
    return (names.gated[1], names.fc1) if names.gated is not None and _is_gated(mlp, names) else (names.fc1,)


@torch.no_grad()
def _own_positions(kind: Kind, model: Any) -> Tensor | None:
    """Return the rotary positions of images of the size in the configuration, [2, patches, d], or None."""
    if not kind.names.rope:
        return None
    encoder = kind.encoder(model)
    rope = getattr(encoder, kind.names.rope)
    weight, training = kind.patches(model).weight, rope.training
    rope.eval()  # which shifts them at random otherwise
    try:
        size = _pair(encoder.config.image_size)
        return torch.stack(rope(torch.zeros((1, 1, *size), dtype=weight.dtype, device=rope.inv_freq.device)))
    finally:
        rope.train(training)


def _own_angles(kind: Kind, model: Any) -> Tensor | None:
    positions = _own_positions(kind, model)
    if positions is None:
        return None
    return angles_of(positions, positions.shape[1] + kind.names.prefix(kind.encoder(model).config))


def _open(layer: Any, names: Names, rope: Tensor | None) -> OpenBlock:
    attention, mlp = getattr(layer, names.attn), layer.mlp
    fc2 = getattr(mlp, names.fc2)
    size = BlockGeometry(
        dim=attention.q_proj.in_features,
        num_heads=getattr(attention, names.heads),
        head_dim=attention.head_dim,
        hidden=fc2.in_features,
        rope=rope is not None,
        gated=_is_gated(mlp, names),
    )
    nothing, drop = nn.Identity(), getattr(layer, "dropout", nn.Identity())
    path = DropPath(rate) if (rate := getattr(getattr(layer, "drop_path", None), "drop_prob", 0.0)) else nothing
    return OpenBlock(
        layer,
        Attention(
            norm=getattr(layer, names.norms[0]),
            body=attention,
            read=Projection(attention.q_proj, attention.k_proj, attention.v_proj),
            write=Projection(getattr(attention, names.write)),
            scale=_scale(layer, "layer_scale1"),
            drop_path=path,
            geometry=size,
            softmax_scale=getattr(attention, names.scale),
            q_norm=nothing,
            k_norm=nothing,
            drop=nn.Dropout(getattr(attention, names.drop)),
            write_drop=drop,
            rope=rope,
        ),
        Mlp(
            norm=getattr(layer, names.norms[1]),
            body=mlp,
            read=Projection(*(getattr(mlp, name) for name in _reads(mlp, names))),
            write=Projection(fc2),
            scale=_scale(layer, "layer_scale2"),
            drop_path=path,
            geometry=size,
            activation=ACTIVATIONS[type(getattr(mlp, names.act))],
            gate="first" if _is_gated(mlp, names) else "",
            drop=nothing,
            write_drop=drop,
        ),
    )


def _scale(layer: Any, name: str) -> nn.Module:
    """Return layer scale under timm's name for its factors, which are the layer's own parameter."""
    if not hasattr(layer, name):
        return nn.Identity()
    with torch.device("meta"):
        scale = LayerScale(1)
    scale.gamma = getattr(layer, name).lambda1
    return scale


def _copy_without_layers(model: Any) -> Any:
    """Return a copy with an empty list of layers; all else, and what the user hung on it, is there."""
    layers = _kind(model).layers(model)
    empty = nn.ModuleList().train(layers.training)
    result = copy.deepcopy(model, {id(layers): empty})
    for module in result.modules():  # transformers hung recorders on layers that are gone, and shall do so again
        vars(module).pop("_output_capturing_hooks_installed", None)
    return result


def _plain_layer(block: Any, names: Names, config: Any) -> nn.Module:
    """Return a layer of transformers with the parameters of a compact one."""
    with torch.device("meta"):
        layer: Any = names.layer(config)
    attn, mlp = block.attn, block.mlp
    for name, norm, cols in ((names.norms[0], block.norm1, attn.in_cols), (names.norms[1], block.norm2, mlp.in_cols)):
        setattr(layer, name, norm if cols is None else nn.Sequential(norm, SelectColumns(cols)))
    for name, scale in (("layer_scale1", block.ls1), ("layer_scale2", block.ls2)):
        if not isinstance(scale, nn.Identity):
            factors = scale(scale.gamma.detach().new_ones(scale.dim)).detach()
            getattr(layer, name).lambda1 = nn.Parameter(factors, requires_grad=scale.gamma.requires_grad)
    setattr(layer, names.attn, _plain_attention(attn, getattr(layer, names.attn), names))
    for name, part in zip(_reads(layer.mlp, names), [p for p in (mlp.gate, mlp.fc1) if p is not None], strict=True):
        setattr(layer.mlp, name, plain_linear(part))
    setattr(layer.mlp, names.fc2, _placed(plain_linear(mlp.fc2), mlp))
    return layer.train(block.training)


def _plain_attention(attn: PrunedAttention, plain: Any, names: Names) -> nn.Module:
    widths = {*attn.qk_widths, *attn.v_widths}
    if len(widths) != 1 or 0 in widths:
        ragged: Any = PlainRagged(attn)
        ragged.proj = _placed(ragged.proj, attn)
        return ragged
    (plain.head_dim,) = widths
    setattr(plain, names.heads, len(attn.heads))
    for name, part in zip(("q_proj", "k_proj", "v_proj"), _thirds(attn), strict=True):
        setattr(plain, name, part)
    setattr(plain, names.write, _placed(plain_linear(attn.proj), attn))
    return plain


def _thirds(attn: Any) -> list[nn.Linear]:
    rows = sum(attn.v_widths)
    weights, bias = attn.qkv.weight.detach().split(rows), attn.qkv.bias
    biases = [None] * 3 if bias is None else bias.detach().split(rows)
    parts = []
    for weight, own in zip(weights, biases, strict=True):
        part = nn.Linear(1, 1, bias=own is not None, device="meta")
        part.weight = nn.Parameter(weight.clone(), requires_grad=attn.qkv.weight.requires_grad)
        if own is not None:
            part.bias = nn.Parameter(own.clone(), requires_grad=bias.requires_grad)
        part.out_features, part.in_features = part.weight.shape
        parts.append(part)
    return parts


def _placed(linear: nn.Module, half: Any) -> nn.Module:
    return linear if half.out_cols is None else nn.Sequential(linear, PlaceColumns(half.out_cols, half.dim))


_Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
_Sizes = _Size | Annotated[list[_Size], Field(min_length=2, max_length=2)]
_Rate = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Config(_Strict):
    """What a description may say of a configuration; a file that names anything else is refused."""

    hidden_size: _Size = 1
    num_hidden_layers: Annotated[int, Field(ge=1, le=MAX_DEPTH)] = 1
    num_attention_heads: _Size = 1
    intermediate_size: _Size = 1
    mlp_ratio: Annotated[int | float, Field(gt=0, le=MAX_SIZE)] = 1
    hidden_act: Literal[
        "gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish", "linear"
    ] = "gelu"
    hidden_dropout_prob: _Rate = 0
    attention_probs_dropout_prob: _Rate = 0
    attention_dropout: _Rate = 0
    drop_path_rate: _Rate = 0
    layer_norm_eps: _Rate = 0
    image_size: _Sizes = 1
    patch_size: _Sizes = 1
    num_channels: _Size = 1
    qkv_bias: bool = True
    pooler_output_size: _Size = 1
    pooler_act: Literal["tanh", "relu", "gelu", "silu", "sigmoid", "linear"] = "tanh"
    layerscale_value: Annotated[float, Field(ge=-1e6, le=1e6)] = 1
    use_mask_token: bool = True
    num_register_tokens: Annotated[int, Field(ge=0, le=MAX_SIZE)] = 0
    projection_dim: _Size = 1
    vision_use_head: bool = True
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    proj_bias: bool = True
    mlp_bias: bool = True
    use_gated_mlp: bool = False
    rope_theta: Annotated[float, Field(gt=0, le=1e9)] = 100.0
    pos_embed_shift: Annotated[float, Field(ge=0, le=MAX_SIZE)] | None = None
    pos_embed_jitter: Annotated[float, Field(ge=0, le=MAX_SIZE)] | None = None
    pos_embed_rescale: Annotated[float, Field(ge=0, le=MAX_SIZE)] | None = None


class _Options(_Strict):
    add_pooling_layer: bool = True
    use_mask_token: bool = False


class _Labels(_Strict):
    labels: list[str] | None = None


def _read(kind: type[_Strict], data: Any, where: str) -> dict[str, Any]:
    """Return what a mapping of a description says, each value of its type and in its range."""
    try:
        return kind.model_validate_json(json.dumps(data)).model_dump(exclude_unset=True)
    except ValidationError as error:
        raise ValueError(explain(error, where)) from error


def _make(kind: Kind, config: dict[str, Any], options: dict[str, Any], labels: list[str] | None) -> nn.Module:
    """Return a dense model with its parameters on the meta device."""
    ids = list(enumerate(labels or ()))
    named = {"id2label": dict(ids), "label2id": {label: index for index, label in ids}} if ids else {}
    made = kind.dense.config_class
    whole = made(vision_config=config, **named) if "vision_config" in made.sub_configs else made(**config, **named)
    with torch.device("meta"):
        dense: Any = kind.dense(whole, **options)
    embeddings = kind.encoder(dense).embeddings
    if hasattr(embeddings, "position_ids"):  # not in the weights, and so on no other device
        positions = torch.arange(embeddings.num_positions).expand(1, -1)
        embeddings.register_buffer("position_ids", positions, persistent=False)
    if kind.names.rope:
        encoder = kind.encoder(dense)
        setattr(encoder, kind.names.rope, type(getattr(encoder, kind.names.rope))(encoder.config))
    return dense
