# SPDX-License-Identifier: Apache-2.0
"""Mistakes that people make with the library, each answered in one line that says what was wanted.

Those on the command line are in runs/test_commands.py, damaged files in test_serialization.py and tests/attack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import gohsp
from gohsp.recipe import Fit

FIT = Fit(epochs=1, batch_size=2, mixup=0, cutmix=0, warmup_epochs=0)
IMAGES = torch.randn(4, 3, 32, 32)


@pytest.fixture(scope="module")
def made(make_model: Callable[..., Any]) -> Any:
    """A dense model, its mask, and what became of it."""
    dense = make_model(img_size=32, embed_dim=32, num_heads=2).float()
    mask = gohsp.ModelMask.keep_first(dense, heads=1, hidden=40)
    small = gohsp.compress(dense, mask)
    return SimpleNamespace(dense=dense, mask=mask, small=small, frozen=gohsp.freeze(small))


def data(label: int) -> list[tuple[torch.Tensor, int]]:
    return [(image, label) for image in IMAGES]


def loader() -> Any:
    return torch.utils.data.DataLoader(data(0), batch_size=2)


MISTAKES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a name for a model": (lambda m: gohsp.prune("vit_tiny", [IMAGES]), TypeError, "model: wanted .* got builtins.str"),
    "a network without blocks": (
        lambda m: gohsp.rank_heads(timm.create_model("resnet18"), [IMAGES]),
        TypeError,
        "model: wanted .* got timm.models.resnet.ResNet",
    ),
    "DataParallel": (
        lambda m: gohsp.compress(nn.DataParallel(m.dense), m.mask),
        TypeError,
        "model: wanted .*DataParallel",
    ),
    "pruned twice": (lambda m: gohsp.prune(m.small, [IMAGES]), ValueError, "model: it is already compressed"),
    "saved before it was compressed": (
        lambda m: gohsp.save(m.dense, "x"),
        ValueError,
        "model: wanted a model made by gohsp.compress, got VisionTransformer",
    ),
    "frozen before it was compressed": (
        lambda m: gohsp.freeze(m.dense),
        ValueError,
        "model: wanted a model made by gohsp.compress, got VisionTransformer",
    ),
    "a frozen model saved": (lambda m: gohsp.save(m.frozen, "x"), ValueError, "model: it is frozen, .* made from"),
    "a frozen model made plain": (lambda m: gohsp.densify(m.frozen), ValueError, "model: it is frozen, .* made from"),
    "a frozen model of another size": (
        lambda m: m.frozen.set_input_size((64, 64)),
        ValueError,
        "model: it is frozen for one size of images; wanted the model that it was made from",
    ),
    "a frozen model with a mask of attention": (
        lambda m: m.frozen(IMAGES, attn_mask=torch.ones(5, 5, dtype=torch.bool)),
        ValueError,
        "attn_mask: wanted None for a frozen model",
    ),
    "a frozen model in half precision": (
        lambda m: m.frozen(IMAGES.half()),
        ValueError,
        r"x: wanted float32 images \[B, 3, 32, 32\], got torch.float16",
    ),
    "an unknown format": (lambda m: gohsp.freeze(m.small, "int4"), ValueError, "weights: wanted one of .* 'int4'"),
    "a target without a kind": (
        lambda m: gohsp.prune(m.dense, [IMAGES], 0.5),
        TypeError,
        "target: wanted a mapping such as {'params': 0.65}, got float",
    ),
    "percent": (lambda m: gohsp.prune(m.dense, [IMAGES], {"params": 65}), ValueError, "target: wanted .* 65"),
    "an unknown group": (
        lambda m: gohsp.prune(m.dense, [IMAGES], groups=["mlp"]),
        ValueError,
        "groups: wanted some of",
    ),
    "batches of dictionaries": (
        lambda m: gohsp.prune(m.dense, [{"pixel_values": IMAGES}]),
        TypeError,
        r"batches: wanted tensors or \(images, ...\) sequences, got dict",
    ),
    "a data set for batches": (
        lambda m: gohsp.prune(m.dense, data(0)),
        ValueError,
        r"batches: wanted images \[B, C, height, width\], got shape \(3, 32, 32\)",
    ),
    "bytes for images": (
        lambda m: gohsp.prune(m.dense, [IMAGES.to(torch.uint8)]),
        ValueError,
        "batches: wanted normalised images of floating point, got torch.uint8",
    ),
    "NaN in an image": (
        lambda m: gohsp.rank_heads(m.dense, [IMAGES, IMAGES / 0]),
        ValueError,
        "batches: wanted finite pixels; image 4, counted from 0",
    ),
    "a loader to train on": (lambda m: gohsp.train(m.small, loader(), fit=FIT), TypeError, "pass its dataset"),
    "a label too many": (
        lambda m: gohsp.train(m.small, data(99), fit=FIT),
        ValueError,
        "data: wanted labels from 0 to 4, those of the model's classes; got 99",
    ),
    "a label too many in the test images": (
        lambda m: gohsp.train(m.small, data(1), test=data(-1), fit=FIT),
        ValueError,
        "data: wanted labels from 0 to 4, those of the model's classes; got -1",
    ),
    "a mask of another model": (
        lambda m: gohsp.compress(timm.create_model("test_vit"), m.mask),
        ValueError,
        "mask: it is made for",
    ),
    "a folder without a model": (lambda m: gohsp.load("nowhere"), FileNotFoundError, "wanted a directory that gohsp"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_one_line(
    mistake: str, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message) as caught, torch.no_grad() if "frozen" in mistake else torch.enable_grad():
        call(made)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_block_that_was_taken_out_is_left_out(made: Any, relative_error: Callable[..., float]) -> None:
    """The last block may be an Identity, and any other: people cut depth so."""
    for index in (0, 1):
        model = copy.deepcopy(made.small)
        model.blocks[index] = nn.Identity()
        plain = gohsp.densify(made.small)
        plain.blocks[index] = nn.Identity()
        with torch.no_grad():
            assert relative_error(model(IMAGES), plain(IMAGES)) < 1e-5
