# SPDX-License-Identifier: Apache-2.0
"""One small model of each class that gohsp takes, with weights that make every mistake visible."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
import torchvision
import transformers
from timm.layers import RmsNorm, RmsNormFp32
from timm.models.nest import Nest
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIDE = 32
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE, "patch_size": 8}
WIDE = {**SIZES, "intermediate_size": 40}


def _hugging_face(name: str, config: str, sizes: Mapping[str, Any], **options: Any) -> nn.Module:
    """Return a model of that class; an architecture of two towers has its sizes in that of its images."""
    kind = getattr(transformers, config)
    vision = "vision_config" in kind.sub_configs
    made = kind(vision_config=dict(sizes), num_labels=5) if vision else kind(**sizes, num_labels=5)
    return getattr(transformers, name)(made, **options)


def _timm(**arguments: Any) -> nn.Module:
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return VisionTransformer(**sizes | arguments)


def _torchvision(**arguments: Any) -> nn.Module:
    sizes = {"image_size": SIDE, "patch_size": 8, "num_layers": 2, "num_heads": 3, "hidden_dim": 24, "mlp_dim": 40}
    return torchvision.models.VisionTransformer(**sizes, num_classes=5, **arguments)


DINO = {**SIZES, "mlp_ratio": 2}
DINOV3 = {**SIZES, "intermediate_size": 40, "num_attention_heads": 3, "num_register_tokens": 2}
REGISTERS = {**DINO, "num_register_tokens": 2}


def _named(name: str, **arguments: Any) -> nn.Module:
    """Return a small one of timm's architectures: its kinds of blocks, positions and MLPs, and other sizes."""
    sizes = {"img_size": SIDE, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model(name, **sizes | arguments)


def _tower(name: str, **arguments: Any) -> nn.Module:
    """Return a small encoder of a vision-language model, whose heads are of 8 channels: two axes of positions."""
    return without_float32(_named(name, out_features=16, **arguments))


def without_float32(model: Any) -> Any:
    """Let norms that compute in float32 compute in the dtype of the model: of float64 they leave float32's digits."""
    for holder in [*model.modules()]:
        for part, norm in holder.named_children():
            if type(norm) is RmsNormFp32:
                own = RmsNorm(norm.normalized_shape, norm.eps, norm.weight is not None)
                own.weight = norm.weight
                setattr(holder, part, own)
    return model


SWIN = {"window_size": 4, "drop_path_rate": 0.0}
MAXVIT: dict[str, Any] = {"img_size": SIDE, "num_classes": 5, "stem_width": 8, "embed_dim": (24, 48), "depths": (1, 2)}
MAXVIT |= {"transformer_dim_head": 8, "transformer_window_size": (4, 2), "transformer_grid_size": (2, 4)}
HIERA: dict[str, Any] = {"img_size": SIDE, "num_classes": 5, "embed_dim": 24, "num_heads": 3, "stages": (2, 3, 2)}
HIERA |= {"q_pool": 2, "mask_unit_size": (4, 4), "mask_unit_attn": (True, True, False)}
HIERADET: dict[str, Any] = {"pretrained_cfg_overlay": {"input_size": (3, SIDE, SIDE)}, "num_classes": 5}
HIERADET |= {"embed_dim": 24, "num_heads": 3, "stages": (2, 4, 2), "q_pool": 2, "window_spec": (4, 2, 2)}
HIERADET |= {"global_att_blocks": (4,), "global_pos_size": (3, 3)}

ZOO: dict[str, Callable[[], nn.Module]] = {
    "AIMv2, RMSNorm and a gated MLP": partial(_named, "aimv2_large_patch14_224"),
    "DINOv2 giant, a gated MLP": partial(_named, "vit_giant_patch14_dinov2"),
    "BEiT-3, norms in front of both last matrices": partial(_named, "beit3_base_patch16_224"),
    "DINOv3": partial(_named, "vit_small_patch16_dinov3"),
    "DINOv3 of fixed size, pooled by its class token": partial(
        _named, "vit_small_patch16_dinov3", dynamic_img_size=False, global_pool="token"
    ),
    "DINOv3 with a gated MLP": partial(_named, "vit_small_plus_patch16_dinov3"),
    "EVA-02 tiny, a gate in one matrix": partial(_named, "eva02_tiny_patch14_224"),
    "EVA-02 base, a norm inside the MLP": partial(_named, "eva02_base_patch14_224"),
    "EVA-02 CLIP, a norm before proj": partial(_named, "eva02_base_patch16_clip_224"),
    "EVA giant, no rotary positions": partial(_named, "eva_giant_patch14_224"),
    "rotary positions of every block and head": partial(_named, "vit_small_patch16_rope_mixed_224"),
    "Perception Encoder, pooled by attention": partial(_named, "vit_pe_core_tiny_patch16_384"),
    "Sapiens2, RMSNorm and qk-norm": partial(_named, "vit_base_patch16_sapiens2", num_kv_heads=3),
    "BEiT": partial(_named, "beit_base_patch16_224"),
    "BEiT v2 with biases of all blocks, pooled by its class token": partial(
        _named, "beitv2_base_patch16_224", use_shared_rel_pos_bias=True, global_pool="token"
    ),
    "relative positions by an MLP": partial(_named, "vit_relpos_base_patch16_clsgap_224", init_values=0.5),
    "relative positions by an MLP for all blocks": partial(_named, "vit_srelpos_small_patch16_224", init_values=0.5),
    "relative positions by the MLP of Swin v2, and qk-norm": partial(
        _named, "vit_relpos_base_patch16_224", rel_pos_type="mlp_swin", qk_norm=True
    ),
    "relative positions by a table": partial(_named, "vit_relpos_base_patch16_cls_224", rel_pos_type="bias"),
    "Swin, three stages": partial(
        _named, "swin_tiny_patch4_window7_224", patch_size=2, depth=None, depths=(2, 3, 1), num_heads=(3, 6, 12), **SWIN
    ),
    "Swin v2, relative positions by an MLP": partial(
        _named,
        "swinv2_tiny_window8_256",
        **{"patch_size": 2, "depth": None, "depths": (2, 3, 1), "num_heads": (3, 6, 12), **SWIN},
    ),
    "Swin v2 CR, relative positions by an MLP, and norms between": partial(
        _named,
        "swinv2_cr_tiny_ns_224",
        **{"patch_size": 2, "depth": None, "depths": (2, 3, 1), "num_heads": (3, 6, 12), **SWIN},
        extra_norm_period=2,
    ),
    "norms behind both halves": partial(_named, "vit_base_patch16_rpn_224"),
    "norms behind both halves, relative positions by an MLP": partial(_named, "vit_relpos_base_patch16_rpn_224"),
    "norms behind both halves, EVA-02 CLIP": partial(_named, "eva02_enormous_patch14_clip_224", patch_size=8),
    "NesT, two levels": partial(
        Nest, SIDE, 3, 4, 2, (24, 48), (3, 6), (2, 1), num_classes=5, drop_path_rate=0.0, pad_type="same"
    ),
    "MaxViT": partial(timm.create_model, "maxvit_tiny_tf_224", head_hidden_size=20, **MAXVIT),
    "MaxViT of timm's own, heads apart, positions by an MLP": partial(
        timm.create_model, "maxvit_rmlp_pico_rw_256", transformer_rel_pos_dim=16, **MAXVIT
    ),
    "MaxxViT, ConvNeXt's blocks and a table": partial(
        timm.create_model, "maxxvit_rmlp_nano_rw_256", transformer_rel_pos_type="bias", **MAXVIT
    ),
    "MaxxViT v2, grids alone": partial(timm.create_model, "maxxvitv2_nano_rw_256", **MAXVIT),
    "Hiera": partial(timm.create_model, "hiera_tiny_224", **HIERA),
    "Hiera with windows of positions, layer scale, and a stage of one block at its end": partial(
        timm.create_model, "hiera_small_abswin_256", **{**HIERA, "init_values": 0.5, "stages": (1, 4, 1)}
    ),
    "SAM 2's Hiera": partial(timm.create_model, "sam2_hiera_tiny", **HIERADET),
    "SAM 2's Hiera with layer scale, and a stage of one block at its end": partial(
        timm.create_model, "hieradet_small", **{**HIERADET, "init_values": 0.5, "stages": (1, 4, 1)}
    ),
    "Qwen3 encoder, which merges tokens": partial(_tower, "qwen3_vit_88m_enc", pos_embed_grid_size=6),
    "Qwen3 classifier": partial(_tower, "qwen3_vit_88m", pos_embed_grid_size=6),
    "Qwen3 classifier that merges tokens": partial(_tower, "qwen3_vit_88m_merge", pos_embed_grid_size=6),
    "DeepSeek encoder that pools": partial(_tower, "deepseek_vit_412m_enc", global_pool="avg"),
    "DeepSeek classifier that merges tokens": partial(_tower, "deepseek_vit_412m_align"),
    "timm VisionTransformer": partial(_timm, init_values=0.5),
    "ViTamin, MLPs that begin with a norm": partial(
        timm.create_model, "vitamin_small_224", img_size=SIDE, depth=2, num_classes=5
    ),
    "timm hybrid": partial(timm.create_model, "vit_tiny_r_s16_p8_224", img_size=SIDE, depth=2, num_classes=5),
    "ViTModel": partial(_hugging_face, "ViTModel", "ViTConfig", WIDE),
    "ViTModel without pooler": partial(
        _hugging_face,
        "ViTModel",
        "ViTConfig",
        {**WIDE, "qkv_bias": False},
        add_pooling_layer=False,
        use_mask_token=True,
    ),
    "ViTForImageClassification": partial(_hugging_face, "ViTForImageClassification", "ViTConfig", WIDE),
    "DeiTModel": partial(_hugging_face, "DeiTModel", "DeiTConfig", {**WIDE, "image_size": [SIDE, SIDE]}),
    "DeiTForImageClassification": partial(_hugging_face, "DeiTForImageClassification", "DeiTConfig", WIDE),
    "DeiTForImageClassificationWithTeacher": partial(
        _hugging_face, "DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE
    ),
    "ViTMSNModel": partial(_hugging_face, "ViTMSNModel", "ViTMSNConfig", WIDE),
    "ViTMSNForImageClassification": partial(_hugging_face, "ViTMSNForImageClassification", "ViTMSNConfig", WIDE),
    "IJepaModel": partial(_hugging_face, "IJepaModel", "IJepaConfig", WIDE),
    "IJepaForImageClassification": partial(_hugging_face, "IJepaForImageClassification", "IJepaConfig", WIDE),
    "Dinov2Model": partial(_hugging_face, "Dinov2Model", "Dinov2Config", {**DINO, "drop_path_rate": 0.1}),
    "Dinov2ForImageClassification": partial(_hugging_face, "Dinov2ForImageClassification", "Dinov2Config", DINO),
    "Dinov2WithRegistersModel": partial(
        _hugging_face, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", REGISTERS
    ),
    "Dinov2WithRegistersForImageClassification": partial(
        _hugging_face, "Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", REGISTERS
    ),
    "DINOv3ViTModel": partial(_hugging_face, "DINOv3ViTModel", "DINOv3ViTConfig", {**DINOV3, "drop_path_rate": 0.1}),
    "DINOv3ViTModel with a gated MLP": partial(
        _hugging_face, "DINOv3ViTModel", "DINOv3ViTConfig", {**DINOV3, "use_gated_mlp": True, "hidden_act": "silu"}
    ),
    "CLIPVisionModel": partial(_hugging_face, "CLIPVisionModel", "CLIPVisionConfig", WIDE),
    "CLIPVisionModelWithProjection": partial(
        _hugging_face, "CLIPVisionModelWithProjection", "CLIPVisionConfig", {**WIDE, "projection_dim": 7}
    ),
    "CLIPForImageClassification": partial(_hugging_face, "CLIPForImageClassification", "CLIPConfig", WIDE),
    "SiglipVisionModel": partial(_hugging_face, "SiglipVisionModel", "SiglipVisionConfig", WIDE),
    "torchvision VisionTransformer": _torchvision,
    "torchvision VisionTransformer with two layers in its head": partial(
        _torchvision, representation_size=9, norm_layer=partial(nn.LayerNorm, eps=1e-3)
    ),
    "SiglipForImageClassification": partial(_hugging_face, "SiglipForImageClassification", "SiglipConfig", WIDE),
}


def make(name: str) -> Any:
    """Return a model of the zoo in float64 and evaluation mode, each parameter of which matters."""
    torch.manual_seed(0)
    model = ZOO[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double().eval()


def images(batch: int = 2) -> Tensor:
    """Return images for a model of the zoo."""
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def tensors(answer: Any) -> list[Tensor]:
    """Return the tensors that a model gave, each of them: the answer itself, or what is in an output object."""
    found = [answer] if isinstance(answer, Tensor) else [value for value in answer.values() if value is not None]
    assert found
    return [tensor for value in found for tensor in (value if isinstance(value, tuple) else (value,))]


def difference(got: Any, wanted: Any) -> float:
    """Return the largest relative error of what a model gave."""
    pairs = list(zip(tensors(got), tensors(wanted), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm()) for a, b in pairs)
