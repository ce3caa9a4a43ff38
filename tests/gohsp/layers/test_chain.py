# SPDX-License-Identifier: Apache-2.0
"""PrunedBlocks: whatever is changed inside a compressed model after its first call is in the next result."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gohsp
from gohsp.masks.mask import ModelMask

CHANGES: dict[str, Callable[[Any], object]] = {
    "a parameter in place": lambda m: m.blocks[0].mlp.fc1.weight.mul_(1.5),
    "a parameter through .data": lambda m: setattr(m.blocks[0].mlp.fc1.weight, "data", m.blocks[0].mlp.fc1.weight * 2),
    "a parameter object": lambda m: setattr(
        m.blocks[1].attn.qkv, "weight", nn.Parameter(m.blocks[1].attn.qkv.weight * 2)
    ),
    "a module": lambda m: setattr(m.blocks[1], "norm2", nn.LayerNorm(m.embed_dim, dtype=torch.float32)),
    "a state dict": lambda m: m.load_state_dict({k: v * 1.1 for k, v in m.state_dict().items()}),
    "a state dict that replaces": lambda m: m.load_state_dict(
        {k: v * 1.1 for k, v in m.state_dict().items()}, assign=True
    ),
    "eps": lambda m: setattr(m.blocks[0].norm1, "eps", 0.5),
    "scale": lambda m: setattr(m.blocks[0].attn, "scale", 1.0),
    "one block more": lambda m: m.blocks.append(copy.deepcopy(m.blocks[0])),
    "one block less": lambda m: m.blocks.pop(0),
    "blocks in another order": lambda m: m.blocks.__setitem__(0, m.blocks[1]),
}


@pytest.fixture
def compact(make_model: Callable[..., Any]) -> Any:
    model = make_model().float()
    return gohsp.compress(model, ModelMask.random(model, 0.7, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("change", CHANGES)
def test_changes_show(
    compact: Any, images: Callable[..., Tensor], relative_error: Callable[..., float], change: str
) -> None:
    x = images().float()
    with torch.no_grad():
        before = compact(x)
        CHANGES[change](compact)
        after = compact(x)
        truth = copy.deepcopy(compact).double()(x.double())
    assert relative_error(after, truth) < 1e-5
    assert relative_error(before, truth) > 1e-4


def test_hook_set_after_the_first_call_fires(compact: Any, images: Callable[..., Tensor]) -> None:
    seen: list[int] = []
    with torch.no_grad():
        compact(images().float())
        hook = compact.blocks[0].mlp.register_forward_hook(lambda *_: seen.append(1))
        compact(images().float())
        hook.remove()
        compact(images().float())
    assert seen == [1]


def test_copies_carry_no_packed_weights(compact: Any, images: Callable[..., Tensor]) -> None:
    size = len(pickle.dumps(compact.state_dict()))
    with torch.no_grad():
        compact(images().float())
    assert len(pickle.dumps(compact.state_dict())) == size
    assert set(vars(compact.blocks)) == set(vars(copy.deepcopy(compact).blocks))
