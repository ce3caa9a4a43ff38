# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is written comes back, and optimisers go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2

from gohsp.training import checkpoint
from gohsp.training.checkpoint import Checkpoint

from . import digits_run as runs


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    tensors = {"model.a": torch.randn(3, 2).T, "model.b": torch.empty(0, 4), "admm.z": torch.tensor(1.5)}
    values = {"loss": 0.1 + 0.2, "history": [{"epoch": 1}], "none": None}
    checkpoint.write(tmp_path / "c.safetensors", Checkpoint("admm", 7, False, tensors, values))
    back = checkpoint.read(tmp_path / "c.safetensors")
    assert (back.stage, back.step, back.done, back.values) == ("admm", 7, False, values)
    assert back.part("model").keys() == {"a", "b"}
    assert all(torch.equal(back.tensors[name], tensor) for name, tensor in tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]


def test_files_that_are_no_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"c\.safetensors: wanted a checkpoint"):
        checkpoint.read(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="in format 1"):
        checkpoint.read(path)
    checkpoint.write(path, Checkpoint("admm", 0, False, {"model.a": torch.randn(1000)}))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="wanted a checkpoint"):
        checkpoint.read(path)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "adafactor"])
def test_an_optimiser_goes_on_where_it_was(name: str) -> None:
    def make() -> tuple[Any, Any]:
        model = runs.make_vit()
        return model, create_optimizer_v2(model, opt=name, lr=1e-2, weight_decay=0.1)

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad()
        model(runs.Digits(8).images).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    step(model, optimizer)
    tensors, values = checkpoint.pack_optimizer(optimizer)
    other, fresh = make()
    other.load_state_dict(model.state_dict())
    checkpoint.unpack_optimizer(fresh, {key: tensor.clone() for key, tensor in tensors.items()}, values)
    step(model, optimizer)
    step(other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_an_optimiser_that_keeps_other_things_is_refused() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight])
    optimizer.state[weight]["memory"] = object()
    with pytest.raises(ValueError, match=r"SGD keeps state\.0\.memory \(object\)"):
        checkpoint.pack_optimizer(optimizer)
