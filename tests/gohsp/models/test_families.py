# SPDX-License-Identifier: Apache-2.0
"""A family of models from outside the package: other names, q, k and v apart, tokens of another kind."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp.layers import FrozenLinear, PrunedBlock, PrunedBlocks
from gohsp.masks.mask import ModelMask
from gohsp.models.base import (
    Attention,
    BlockGeometry,
    CompactBlock,
    CompressedModel,
    Family,
    Geometry,
    Mlp,
    OpenBlock,
    Projection,
)
from gohsp.models.registry import FAMILIES, OUTSIDE, open_model, register
from gohsp.pruning.axes import principal_axes

SIDE, PATCH, DIM, HEADS, WIDTH, HIDDEN = 12, 4, 24, 3, 8, 48


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(DIM, HEADS * WIDTH, bias=bias) for bias in (True, False, True))
        self.output = nn.Linear(HEADS * WIDTH, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in (self.query, self.key, self.value))
        return self.output(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(DIM, eps=1e-5), nn.LayerNorm(DIM, eps=1e-5)
        self.attention = SelfAttention()
        self.feed = nn.Sequential(nn.Linear(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.feed(self.after(x))


class Tower(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.project = nn.Linear(3 * PATCH * PATCH, DIM)
        self.layers = nn.Sequential(*(Layer() for _ in range(depth)))
        self.classify = nn.Linear(DIM, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.layers(tokens_of(self, images)).mean(dim=1))


def tokens_of(model: Any, images: Tensor) -> Tensor:
    return model.project(F.unfold(images, PATCH, stride=PATCH).transpose(1, 2))


class PrunedTower(CompressedModel, Tower):
    """A tower whose layers are compact."""


class TowerFamily(Family):
    wanted = "a Tower"

    def claims(self, model: nn.Module) -> bool:
        return isinstance(model, Tower)

    def open_blocks(self, model: Any) -> tuple[OpenBlock, ...]:
        return tuple(map(self._open, model.layers))

    def _open(self, layer: Layer) -> OpenBlock:
        size, nothing = BlockGeometry(DIM, HEADS, WIDTH, HIDDEN), nn.Identity()
        attention, feed = layer.attention, layer.feed
        shared = {"scale": nothing, "drop_path": nothing, "write_drop": nothing, "geometry": size}
        return OpenBlock(
            layer,
            Attention(
                norm=layer.before,
                body=attention,
                read=Projection(attention.query, attention.key, attention.value),
                write=Projection(attention.output),
                softmax_scale=0.3,
                q_norm=nothing,
                k_norm=nothing,
                drop=nn.Dropout(0.0),
                **shared,
            ),
            Mlp(
                norm=layer.after,
                body=feed,
                read=Projection(feed[0]),
                write=Projection(feed[2]),
                activation="relu",
                drop=nothing,
                **shared,
            ),
        )

    def architecture(self, model: nn.Module) -> str:
        return "tower"

    def embed(self, model: nn.Module, images: Tensor) -> Tensor:
        return tokens_of(model, images)

    def features(self, model: nn.Module, x: Tensor) -> Tensor:
        return x.mean(dim=1)

    def stream_places(self, model: Any) -> list[nn.Module]:
        return [*model.layers]

    def stream_shape(self, model: Any) -> tuple[int, int, int]:
        return len(model.layers), self.tokens(model, SIDE, SIDE), DIM

    def image_shape(self, model: nn.Module) -> tuple[int, int, int]:
        return 3, SIDE, SIDE

    def tokens(self, model: nn.Module, height: int, width: int) -> int:
        return (height // PATCH) * (width // PATCH)

    def modules_outside(self, model: Any, height: int, width: int) -> list[tuple[nn.Module, tuple[int, ...]]]:
        tokens = self.tokens(model, height, width)
        return [(model.project, (1, tokens, 3 * PATCH * PATCH)), (model.classify, (1, DIM))]

    def assemble(self, model: nn.Module, blocks: Sequence[CompactBlock]) -> nn.Module:
        result: Any = copy.deepcopy(model)
        result.layers = PrunedBlocks(*blocks)
        result.__class__ = PrunedTower
        return result

    def disassemble(self, model: nn.Module) -> nn.Module:
        raise NotImplementedError

    def freeze(self, model: Any, blocks: nn.Module, embedding: str = "float32") -> nn.Module:
        result: Any = copy.deepcopy(model, {id(model.layers): model.layers})
        result.layers, result.classify = blocks, FrozenLinear(model.classify)
        return result

    def describe(self, model: Any, geometry: Geometry) -> dict[str, Any]:
        return {"depth": geometry.depth}

    def build(self, description: Mapping[str, Any]) -> nn.Module:
        with torch.device("meta"):
            return Tower(description["depth"])


@pytest.fixture(autouse=True)
def family() -> Iterator[Family]:
    added = TowerFamily()
    register(added)
    yield added
    FAMILIES.remove(added)


@pytest.fixture
def tower() -> Any:
    torch.manual_seed(0)
    return Tower().double().eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_compressed_it_computes_what_the_masked_one_does(
    tower: Any, images: Tensor, relative_error: Callable[..., float]
) -> None:
    mask = ModelMask.random(tower, 0.7, torch.Generator().manual_seed(0))
    compact = gohsp.compress(tower, mask)
    assert isinstance(compact, Tower)
    assert all(isinstance(block, PrunedBlock) for block in compact.layers)
    assert gohsp.count(compact).macs == gohsp.count(tower, mask=mask).macs
    with torch.no_grad():
        masked = mask.apply_(copy.deepcopy(tower))
        assert relative_error(compact(images), masked(images)) < 1e-12
        if gk.can_run("cpu"):
            single = compact.float()
            assert relative_error(gohsp.freeze(single)(images.float()), single(images.float())) < 1e-5


@pytest.mark.parametrize("method", ["gohsp", "taylor", "information"])
def test_it_is_pruned_with_all_groups(tower: Any, images: Tensor, method: str) -> None:
    groups = ("heads", "qk", "v", "hidden", "attn_in", "attn_out", "mlp_in", "mlp_out")
    result = gohsp.prune(tower, [images], {"params": 0.7}, method, groups=groups, similarity="attention")
    assert result.report.pruned.params <= 0.7 * result.report.dense.params
    with torch.no_grad():
        torch.testing.assert_close(gohsp.compress(result.model, result.mask)(images), result.model(images))


def test_the_parts_that_are_read_apart_are_ranked_as_one(tower: Any, images: Tensor) -> None:
    layer = open_model(tower).blocks[0].attention
    seen = tower.layers[0].before(tokens_of(tower, images))
    q, k = (part(seen).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in layer.read.layers[:2])
    torch.testing.assert_close(layer.probabilities(layer.read(seen)), (q @ k.mT * 0.3).softmax(dim=-1))
    assert [scores.shape for scores in gohsp.rank_heads(tower, [images])] == [(HEADS,)] * 2


def test_its_heads_are_turned_into_their_axes(tower: Any, images: Tensor, relative_error: Callable[..., float]) -> None:
    turned = principal_axes(tower, [images])
    for given, layer in zip(tower.layers, turned.layers, strict=True):
        assert not torch.equal(layer.attention.key.weight, given.attention.key.weight)
        assert not torch.equal(layer.attention.query.bias, given.attention.query.bias)
    with torch.no_grad():
        assert relative_error(turned(images), tower(images)) < 1e-10


def test_it_is_saved_and_loaded(tower: Any, images: Tensor, tmp_path: Path) -> None:
    compact = gohsp.compress(tower, ModelMask.random(tower, 0.7, torch.Generator().manual_seed(0)))
    gohsp.save(compact, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(gohsp.load(tmp_path)(images), compact(images))
    (known,) = (found for found in FAMILIES if isinstance(found, TowerFamily))
    FAMILIES.remove(known)
    try:
        names = {type(found).__name__ for found in FAMILIES} | {outside.family for outside in OUTSIDE.values()}
        known_names = re.escape(str(sorted(names)))
        with pytest.raises(ValueError, match=rf"plan\.model\.family: wanted one of {known_names}, got 'TowerFamily'"):
            gohsp.load(tmp_path)
    finally:
        register(known)


def test_what_no_family_claims_is_told_what_they_want() -> None:
    with pytest.raises(TypeError, match=r"model: wanted a Tower or a timm .*VisionTransformer .* got torch.*Linear"):
        open_model(nn.Linear(2, 2))
