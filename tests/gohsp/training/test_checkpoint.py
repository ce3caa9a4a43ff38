# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what is written comes back, and optimisers go on from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
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


def edit_header(path: Path, **changes: Any) -> None:
    """Change the header of a checkpoint; what becomes None goes."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["gohsp_training"])
    header = {key: value for key, value in {**header, **changes}.items() if value is not None}
    save_file(load_file(path), path, metadata={"gohsp_training": json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stage": 1}, "stage: wanted a str, got 1"),
        ({"step": "7"}, "step: wanted a int, got '7'"),
        ({"step": -1}, "step: wanted 0 or more, got -1"),
        ({"done": 0}, "done: wanted a bool, got 0"),
        ({"values": []}, r"values: wanted a dict, got \[\]"),
        ({"step": None}, r"missing keys \['step'\]"),
        ({"more": 1}, r"missing keys \[\], unknown keys \['more'\]"),
    ],
)
def test_headers_that_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.write(path, Checkpoint("admm", 7, False, {"model.a": torch.randn(10)}))
    edit_header(path, **changes)
    with pytest.raises(ValueError, match=rf"c\.safetensors: {message}"):
        checkpoint.read(path)


def test_a_header_nested_without_end(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"gohsp_training": "[" * 100_000})
    with pytest.raises(ValueError, match=r"c\.safetensors: wanted JSON of at most 32 levels"):
        checkpoint.read(path)
    with pytest.raises(ValueError, match="wanted a checkpoint"):
        checkpoint.read(tmp_path)


def test_damage_is_noticed_and_checkpoints_without_a_digest_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.write(path, Checkpoint("admm", 7, False, {"model.a": torch.randn(10), "admm.z": torch.tensor(1.5)}))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"c\.safetensors: it is damaged"):
        checkpoint.read(path)
    edit_header(path, tensors_sha256=None)
    assert checkpoint.read(path).step == 7


def test_a_changed_number_in_the_header_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    checkpoint.write(path, Checkpoint("admm", 7, False, {"model.a": torch.ones(2)}, {"loss": 0.25, 3: (1, 2)}))
    assert checkpoint.read(path).values == {"loss": 0.25, "3": [1, 2]}
    data = path.read_bytes()
    assert data.count(b"0.25") == 1
    path.write_bytes(data.replace(b"0.25", b"0.75"))
    with pytest.raises(ValueError, match=r"c\.safetensors: it is damaged"):
        checkpoint.read(path)


CHANGES: dict[str, Callable[[Checkpoint], object]] = {
    "settings: wanted a dict, got None": lambda c: c.values.pop("settings"),
    "history: wanted a list, got 3": lambda c: c.values.update(history=3),
    "history: wanted mappings of": lambda c: c.values.update(history=[{"epochs": 1}]),
    "loss: wanted a float, got 'low'": lambda c: c.values.update(loss="low"),
    "optimizer: wanted a dict, got": lambda c: c.values.update(optimizer=[]),
    "admm: wanted a dict, got": lambda c: c.values.update(admm=1.0),
    "wanted that of such a run, but KeyError": lambda c: c.values.update(admm={}),
    "wanted that of such a run, but RuntimeError": lambda c: c.tensors.pop("model.norm.weight"),
    "wanted that of such a run, but KeyError: 'z": lambda c: c.tensors.pop("admm.z.0"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_checkpoint_of_no_such_run_is_one_line(message: str, tmp_path: Path) -> None:
    """Such as a file that somebody put together: its digest is right, and what it says is not."""

    class Stop(Exception):
        pass

    def stop(stage: str, step: int, total: int, loss: float) -> None:
        if step == 2:
            raise Stop

    with pytest.raises(Stop):
        runs.run(tmp_path, checkpoint_steps=1, on_step=stop)
    saved = checkpoint.read(tmp_path / "checkpoint.safetensors")
    CHANGES[message](saved)
    checkpoint.write(tmp_path / "checkpoint.safetensors", saved)
    with pytest.raises(ValueError, match=message) as error:
        runs.run(tmp_path, checkpoint_steps=1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["state.0", "state.x.y", "group.9.lr", "nothing"])
def test_states_of_no_optimiser_are_refused(key: str) -> None:
    model = runs.make_vit()
    with pytest.raises(ValueError, match="optimizer: wanted the state of a AdamW"):
        checkpoint.unpack_optimizer(create_optimizer_v2(model, opt="adamw"), {}, {key: 1.0})


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
