# SPDX-License-Identifier: Apache-2.0
"""Whole compressed DeiTs: in the interpreter against the CPU kernels, and traced for a GPU that is not there."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import timm
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

import gohsp
import gohsp_kernels as gk
from gohsp_kernels import _schemas
from gohsp_kernels.testing import error, samples
from gohsp_kernels.triton import config


@functools.cache
def compressed(name: str) -> Any:
    """A DeiT with random weights and a random mask: heads, channels, neurons and columns differ in every block."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    mask = gohsp.ModelMask.random(model, keep=0.6, generator=torch.Generator().manual_seed(1))
    return gohsp.compress(model, mask)


def photographs() -> Tensor:
    """The two photographs that scikit-learn carries, at 224 pixels and normalised: [2, 3, 224, 224]."""
    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    images = nn.functional.interpolate(images.permute(0, 3, 1, 2).float() / 255, (224, 224), mode="area")
    return (images - 0.5) / 0.25


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.float16, 5e-3)])
def test_deit_small_agrees_with_the_cpu_backend(
    dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Tiles larger than any GPU takes: the fewer programs, the less the interpreter has to step through.
    monkeypatch.setattr(config, "linear_tile", lambda *_: config.Tile(256, 256, 256, 4, 1))
    monkeypatch.setattr(config, "attention_tile", lambda *_: config.AttentionTile(256, 256, 4, 1))
    model, images = compressed("deit_small_patch16_224"), photographs()
    rounded = copy.deepcopy(model).to(dtype)
    with torch.inference_mode():
        with gk.use_backend("cpu" if gk.can_run("cpu") else "reference"):
            expected = model(images)
        with gk.use_backend("triton"):
            result = rounded(images.to(dtype))
    assert result.dtype == dtype
    assert error(result, expected) < tolerance


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("name", _schemas.PUBLIC)
def test_opcheck(name: str) -> None:
    with gk.use_backend("triton"):
        opcheck(getattr(torch.ops.gohsp_kernels, name).default, samples()[name].flat())


def on_fake_gpu(model: nn.Module) -> nn.Module:
    """``model`` with its parameters and buffers exchanged for fake tensors on "cuda", in a fake mode."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
                module._parameters[name] = nn.Parameter(fake, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return model


def traced(batch: int) -> torch.fx.Graph:
    model = copy.deepcopy(compressed("deit_tiny_patch16_224")).half()
    with FakeTensorMode(), torch.no_grad():
        images = torch.empty(batch, 3, 224, 224, dtype=torch.float16, device="cuda")
        return torch.export.export(on_fake_gpu(model), (images,), strict=False).graph


def test_a_compressed_deit_traces_on_cuda() -> None:
    graph = traced(batch=2)
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets.count("gohsp_kernels.attention_sublayer.default") == 12
    assert targets.count("gohsp_kernels.mlp_sublayer.default") == 12
    assert "aten.unfold.default" in targets and not any("conv" in target for target in targets)  # patches by a product
    (output,) = next(iter(reversed(graph.nodes))).args[0]
    logits = output.meta["val"]
    assert (logits.shape, logits.dtype, logits.device.type) == ((2, 1000), torch.float16, "cuda")


def test_its_graph_can_be_captured() -> None:
    """What torch.compile(mode="reduce-overhead") needs of it: everything on the device, and nothing read back."""
    for node in traced(batch=1).nodes:
        if node.op == "call_function":
            values = node.meta["val"] if isinstance(node.meta["val"], (tuple, list)) else [node.meta["val"]]
            assert all(value.device.type == "cuda" for value in values if isinstance(value, Tensor)), node
            assert all(word not in str(node.target) for word in ("_local_scalar", "nonzero", "item", "to_cpu")), node
