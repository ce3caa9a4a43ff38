# SPDX-License-Identifier: Apache-2.0
"""The patch embedding of a compressed model: a product on GPUs, timm's convolution elsewhere."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import gohsp
from gohsp import layers
from gohsp.layers import PatchConv2d, patch_product


def compressed(**kwargs: object) -> nn.Module:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3, **kwargs).eval()
    return gohsp.compress(model, gohsp.ModelMask.full(model))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 32, 48), (1, 1, 16, 16), (3, 4, 39, 35), (0, 3, 32, 32)])
@pytest.mark.parametrize("kernel", [(16, 16), (8, 14)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_product_is_the_convolution(
    shape: tuple[int, ...], kernel: tuple[int, int], bias: bool, layout: torch.memory_format
) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight = torch.randn(24, shape[1], *kernel, dtype=torch.float64, requires_grad=True)
    offset = torch.randn(24, dtype=torch.float64, requires_grad=True) if bias else None
    leaves = [t for t in (x, weight, offset) if t is not None]
    results = [patch_product(x, weight, offset), F.conv2d(x, weight, offset, stride=kernel)]
    torch.testing.assert_close(*results)
    grad = torch.randn_like(results[0])
    torch.testing.assert_close(*(torch.autograd.grad(result, leaves, grad) for result in results))


def test_a_gpu_takes_the_product_and_the_cpu_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    model, taken = compressed(), []
    monkeypatch.setattr(
        layers, "patch_product", lambda x, *rest: taken.append(x.device.type) or patch_product(x, *rest)
    )
    model(torch.randn(1, 3, 32, 32))
    assert not taken
    meta = compressed().to("meta")
    conv = meta.patch_embed.proj
    monkeypatch.setattr(conv, "forward", conv.forward)
    fake = torch._subclasses.fake_tensor.FakeTensorMode()
    with fake:
        images = torch.empty(2, 3, 32, 32, device="cuda")
        conv.weight, conv.bias = (nn.Parameter(torch.empty(p.shape, device="cuda")) for p in (conv.weight, conv.bias))
        assert PatchConv2d.forward(conv, images).shape == (2, 192, 2, 2)
    assert taken == ["cuda"]


def test_names_stay_and_densify_gives_the_convolution_back() -> None:
    model = compressed()
    assert type(model.patch_embed.proj) is PatchConv2d
    assert {"patch_embed.proj.weight", "patch_embed.proj.bias"} <= set(model.state_dict())
    assert type(gohsp.densify(model).patch_embed.proj) is nn.Conv2d
    assert type(model.patch_embed.proj) is PatchConv2d


def test_other_convolutions_stay() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.patch_embed.proj = nn.Conv2d(3, 192, 16, stride=16, padding=1)
    assert type(gohsp.compress(model, gohsp.ModelMask.full(model)).patch_embed.proj) is nn.Conv2d
