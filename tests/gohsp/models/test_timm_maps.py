# SPDX-License-Identifier: Apache-2.0
"""Blocks of timm's that read maps of tokens, one by one: VOLO, CoAtNet, GlobalContextVit and Twins."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.layers import RelPosBias
from timm.models import volo
from timm.models.gcvit import GlobalContextVit, GlobalContextVitBlock
from timm.models.maxxvit import (
    MaxxVitTransformerCfg,
    PartitionAttention2d,
    TransformerBlock2d,
)
from timm.models.twins import Block as TwinsBlock
from timm.models.twins import Twins
from torch import nn

import gohsp
from gohsp.layers import PrunedBlock
from gohsp.models.registry import open_block
from gohsp.models.timm_maps import Partition
from gohsp.models.timm_parts import HeadByHead
from tests.gohsp.models.test_single_blocks import random_mask
from tests.gohsp.models.zoo import difference


def attending(rel_pos_type: str, head_first: bool = True) -> MaxxVitTransformerCfg:
    return MaxxVitTransformerCfg(
        *(8, head_first),
        window_size=(2, 3),
        grid_size=(3, 2),
        rel_pos_type=rel_pos_type,
        rel_pos_dim=16,
        init_values=0.5,
        act_layer="gelu_tanh",
    )


GRID = (6, 12)

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "VOLO": lambda: volo.Transformer(24, 3, 2.0, qkv_bias=True),
    "CoAtNet": lambda: TransformerBlock2d(
        24, 24, rel_pos_cls=partial(RelPosBias, window_size=GRID), cfg=attending("bias")
    ),
    "CoAtNet, heads last": lambda: TransformerBlock2d(24, 24, cfg=attending("", head_first=False)),
    "GCViT": lambda: GlobalContextVitBlock(24, GRID, 3, (3, 4), use_global=False, layer_scale=0.5),
    "Twins, windows": lambda: TwinsBlock(24, 3, ws=3),
    "Twins, windows that do not divide": lambda: TwinsBlock(24, 3, ws=5),
    "Twins, all tokens": lambda: TwinsBlock(24, 3, ws=1, sr_ratio=1),
}
EACH = pytest.mark.parametrize("name", list(BLOCKS))

MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # side of images, blocks that are replaced
    "VOLO": (
        lambda: volo.VOLO((1, 1, 1, 1), 64, embed_dims=(24,) * 4, num_heads=(3,) * 4, mlp_ratio=2.0),
        *(64, 3),
    ),
    "CoAtNet": (lambda: timm.create_model("test_coatnet", img_size=64), 64, 1),
    "GCViT": (
        lambda: GlobalContextVit(img_size=64, embed_dim=16, depths=(1, 2, 2, 1), num_heads=(2, 2, 4, 4)),
        *(64, 4),
    ),
    "Twins": (
        lambda: Twins(64, embed_dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), depths=(2, 2, 2, 1), wss=(3,) * 4),
        64,
        4,
    ),
}


def shaken(module: nn.Module) -> Any:
    """A module in float64 and evaluation mode, each parameter of which matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return module.double().eval()


def made(name: str) -> tuple[Any, tuple[Any, ...]]:
    """A block of its kind, and what it is called with."""
    torch.manual_seed(0)
    x = torch.randn(2, *GRID, 24, dtype=torch.float64)
    if "CoAtNet" in name:
        x = x.permute(0, 3, 1, 2)
    return shaken(BLOCKS[name]()), (x.flatten(1, 2), GRID) if "Twins" in name else (x,)


def pair(name: str) -> tuple[Any, Any, tuple[Any, ...]]:
    """The masked block and the compact one."""
    block, given = made(name)
    mask = random_mask(block, torch.Generator().manual_seed(1))
    masked = copy.deepcopy(block)
    mask.apply_(open_block(masked)[1])
    return masked, gohsp.compress_block(block, mask), given


@EACH
def test_compact_they_are_the_masked_ones(name: str) -> None:
    masked, small, given = pair(name)
    block, _ = made(name)
    with torch.no_grad():
        wanted = masked(*given)
        assert difference(small(*given), wanted) < 1e-12
        assert difference(wanted, block(*given)) > 1e-3
        small.float()
        x = given[0].float()
        assert difference(small(x, *given[1:]), wanted) < 1e-5


@EACH
def test_modules_that_are_called_give_the_same(name: str) -> None:
    masked, small, given = pair(name)
    seen: list[Any] = []
    small.attn.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        assert difference(small(*given), masked(*given)) < 1e-12 and len(seen) == 1


@EACH
def test_gradients_are_those_of_the_masked_block(name: str) -> None:
    masked, small, (x, *more) = pair(name)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for block, given in zip((masked, small), inputs, strict=True):
        block(given, *more).square().sum().backward()
    assert difference(inputs[1].grad, inputs[0].grad) < 1e-12
    kept = small.mask.layout().hidden
    columns = slice(None) if small.mask.layout().mlp_in is None else small.mask.layout().mlp_in
    wanted = masked.mlp.fc1.weight.grad.flatten(1)  # of a convolution there are two dimensions more
    assert difference(small.mlp.fc1.weight.grad, wanted[kept][:, columns]) < 1e-12


def test_a_path_is_dropped_for_an_image_and_not_for_a_window() -> None:
    block = shaken(GlobalContextVitBlock(24, GRID, 3, (3, 4), use_global=False, drop_path=0.5))
    small = gohsp.compress_block(block, gohsp.BlockMask.of_block(block))
    x = torch.randn(8, *GRID, 24, dtype=torch.float64)
    with torch.no_grad():
        for model in (block, small):
            torch.manual_seed(3)
            assert difference(model.train()(x), block(x)) > 1e-3
        torch.manual_seed(3)
        wanted = block(x)
        torch.manual_seed(3)
        assert difference(small(x), wanted) < 1e-12


@pytest.mark.parametrize("name", list(MODELS))
def test_in_the_place_of_a_models_own(name: str) -> None:
    make, side, replaced = MODELS[name]
    torch.manual_seed(0)
    model = shaken(make())
    fast, x = gohsp.accelerate(model), torch.randn(2, 3, side, side, dtype=torch.float64)
    assert sum(isinstance(part, PrunedBlock) for part in fast.modules()) == replaced
    with torch.no_grad():
        assert difference(fast(x), model(x)) < 1e-11


@pytest.mark.parametrize("partition", [Partition((2, 3)), Partition(None)])
def test_partitions_are_undone(partition: Partition) -> None:
    x = torch.randn(2, *GRID, 5)
    assert torch.equal(partition.join(partition.split(x), *GRID), x)


def test_q_k_and_v_of_each_head_are_seen_apart() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 24).double(), torch.randn(4, 6, dtype=torch.float64)
    seen = HeadByHead(layer, 2)
    ordered = layer(x).unflatten(-1, (2, 3, 4)).transpose(1, 2).flatten(1)
    assert torch.equal(seen(x), ordered)
    assert difference(x @ seen.weight.T + seen.bias, ordered) < 1e-14
    before = seen.weight.clone(), seen.bias.clone()
    seen.write_(2 * before[0], before[1] + 1)
    assert torch.equal(seen.weight, 2 * before[0]) and torch.equal(seen.bias, before[1] + 1)
    rows = torch.zeros(24, dtype=torch.bool)
    rows[5] = True
    seen.clear_(rows)
    assert not seen.weight[5].any() and not seen.bias[5] and int((seen.weight == 0).sum()) == 6


def test_maps_that_windows_do_not_divide() -> None:
    _, small, _ = pair("GCViT")
    with pytest.raises(ValueError, match=r"x: wanted a map that windows of \(3, 4\) divide, got \[1, 6, 10, 24\]"):
        small(torch.randn(1, 6, 10, 24, dtype=torch.float64))


def test_what_cannot_be_pruned_exactly_is_refused() -> None:
    block = volo.Transformer(24, 3, norm_layer=lambda dim, **_: nn.BatchNorm1d(dim))
    with pytest.raises(ValueError, match=r"block: cannot prune it: norm1 is BatchNorm1d; wanted LayerNorm or RMSNorm"):
        gohsp.BlockMask.of_block(block)
    block = TransformerBlock2d(24, 24, cfg=attending("bias"))
    block.mlp.fc2 = nn.Conv2d(48, 24, 3)
    with pytest.raises(ValueError, match=r"block: cannot prune it: mlp\.fc2 is Conv2d; wanted .* of single pixels"):
        gohsp.BlockMask.of_block(block)
    block.mlp.norm = nn.BatchNorm2d(48)
    with pytest.raises(ValueError, match=r"block: cannot prune it: mlp is ConvMlp; wanted timm's ConvMlp without a"):
        gohsp.BlockMask.of_block(block)
    block.norm2 = nn.BatchNorm2d(24)
    with pytest.raises(ValueError, match=r"block: cannot prune it: norm2 is BatchNorm2d; wanted timm's LayerNorm2d"):
        gohsp.BlockMask.of_block(block)
    layer = volo.Transformer(24, 3)
    layer.attn.qkv = nn.Bilinear(1, 1, 1)
    with pytest.raises(ValueError, match=r"attn\.qkv is torch\.nn.*Bilinear; wanted torch\.nn\.Linear"):
        gohsp.BlockMask.of_block(layer)


OTHERS: dict[str, Callable[[], nn.Module]] = {
    "maps of channels first": lambda: PartitionAttention2d(24, "block", attending("bias")),
    "maps that become smaller": lambda: TransformerBlock2d(16, 24, stride=2, cfg=attending("bias")),
    "queries that all windows share": lambda: GlobalContextVitBlock(24, GRID, 3, (3, 4)),
    "keys of fewer tokens": lambda: TwinsBlock(24, 3, ws=1, sr_ratio=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_blocks_are_none_of_theirs(name: str) -> None:
    with pytest.raises(TypeError, match=r"block: wanted timm's Block.* block of another model that docs/models.md"):
        gohsp.BlockMask.of_block(OTHERS[name]())
