# SPDX-License-Identifier: Apache-2.0
"""Batches, seeds, losses, checkpoints and evaluation, each alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

import gohsp
from gohsp.training import checkpoint
from gohsp.training.batches import BatchKeys, every_batch
from gohsp.training.checkpoint import Checkpoint
from gohsp.training.evaluation import evaluate
from gohsp.training.losses import Distilled, distance, make_loss, make_mixup, stream_distance, watch
from gohsp.training.seeds import seeded

from . import digits_run as runs


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_key_decides_the_draws_and_the_generators_come_back() -> None:
    with seeded(1, 2):
        first = draws()
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    with seeded(1, 2):
        assert draws() == first
    with seeded(2, 1):
        second = draws()
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert torch.equal(state[0], torch.get_rng_state()) and random.getstate() == state[2]
    assert np.random.get_state()[1].tolist() == state[1]  # type: ignore[index]


def test_generators_come_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        raise KeyError
    assert torch.equal(state, torch.get_rng_state())


def keys(**changes: Any) -> list[list[tuple[int, int]]]:
    settings: dict[str, Any] = {"images": 10, "batch_size": 4, "first": 0, "last": 6, "seed": 0, "stage": 0}
    return list(BatchKeys(**{**settings, **changes}))


def test_each_epoch_takes_images_once_in_an_order_of_its_own() -> None:
    batches = keys()
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}, {0}, {1}, {1}, {2}, {2}]
    epochs = [[index for batch in batches[i : i + 2] for _, index in batch] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys(seed=1) != batches and keys(stage=1) != batches


def test_batches_can_begin_anywhere() -> None:
    assert keys(first=3) == keys()[3:]
    assert len(BatchKeys(10, 4, 3, 6, 0, 0)) == 3


def test_processes_share_the_batches_of_one() -> None:
    shares = [keys(process=process, processes=2) for process in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == keys()


def test_every_image_is_in_one_share() -> None:
    data = [(torch.tensor(float(i)), i) for i in range(7)]
    seen = [
        int(label) for p in range(3) for _, labels in every_batch(data, 2, process=p, processes=3) for label in labels
    ]
    assert sorted(seen) == list(range(7))


def test_losses_are_what_the_settings_say() -> None:
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 5
    plain = runs.FIT
    torch.testing.assert_close(make_loss(plain)(logits, labels), F.cross_entropy(logits, labels))
    smooth = plain.model_copy(update={"smoothing": 0.2})
    wanted = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(make_loss(smooth)(logits, labels), wanted)
    mixed = plain.model_copy(update={"mixup": 1.0})
    mixup = make_mixup(mixed, 5)
    assert mixup is not None and make_mixup(plain, 5) is None
    with seeded(0):
        _, targets = mixup(torch.randn(6, 1, 4, 4), labels)
    assert targets.shape == (6, 5)
    wanted = F.cross_entropy(logits, targets.double())
    torch.testing.assert_close(make_loss(mixed)(logits, targets.double()), wanted)


def test_distances_to_the_teacher() -> None:
    ours, theirs = torch.randn(2, 6, 5, dtype=torch.float64)
    soft = gohsp.Distillation(kind="soft", temperature=3.0)
    p, q = (theirs / 3).softmax(dim=1), (ours / 3).softmax(dim=1)
    torch.testing.assert_close(distance(ours, theirs, soft), 9 * (p * (p / q).log()).sum(dim=1).mean())
    hard = gohsp.Distillation(kind="hard")
    torch.testing.assert_close(distance(ours, theirs, hard), F.cross_entropy(ours, theirs.argmax(dim=1)))
    assert float(distance(ours, ours, soft)) == pytest.approx(0, abs=1e-12)


def test_distance_of_streams() -> None:
    ours, theirs = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64)  # 3 places, 6 images
    errors = (ours - theirs).flatten(2).square().sum(dim=2)
    spread = (theirs - theirs.mean(dim=(2, 3), keepdim=True)).flatten(2).square().sum(dim=2)
    torch.testing.assert_close(stream_distance(list(ours), list(theirs)), (errors / spread).mean())
    halves = [stream_distance(list(ours[:, part]), list(theirs[:, part])) for part in (slice(3), slice(3, 6))]
    torch.testing.assert_close(sum(halves) / 2, (errors / spread).mean())
    assert float(stream_distance(list(ours), list(ours))) == 0
    half = stream_distance(list(ours.bfloat16()), list(theirs.bfloat16()))
    assert half.dtype == torch.float32 and float(half) == pytest.approx(float((errors / spread).mean()), rel=0.02)


def test_the_stream_is_watched_only_within() -> None:
    model, images = runs.make_vit().eval(), runs.Digits(4).images
    with watch(model) as stream:
        model(images)
    assert [tensor.shape for tensor in stream] == [(4, 5, 32)] * 3  # two blocks and the norm
    torch.testing.assert_close(stream[-1], model.norm(stream[-2]))
    with watch(model, on=False) as nothing:
        model(images)
    assert not nothing and len(stream) == 3


def test_a_distilled_loss_mixes_both() -> None:
    logits, labels, images = torch.randn(6, 5), torch.arange(6) % 5, torch.randn(6, 5)
    settings = gohsp.Distillation(weight=0.25)
    loss = Distilled(torch.nn.CrossEntropyLoss(), torch.nn.Identity(), settings)
    wanted = 0.75 * F.cross_entropy(logits, labels) + 0.25 * distance(logits, images, settings)
    torch.testing.assert_close(loss(logits, labels, images, []), wanted)


def test_features_are_added_to_a_distilled_loss() -> None:
    model, data = runs.make_vit().eval(), runs.Digits(4)
    labels, logits = torch.tensor(data.labels), torch.randn(4, 10)
    with watch(model) as stream:
        model(data.images)
    far = [tensor + 0.1 * torch.randn_like(tensor) for tensor in stream]
    alone, both = (
        Distilled(torch.nn.CrossEntropyLoss(), model, gohsp.Distillation(features=weight)) for weight in (0.0, 2.5)
    )
    wanted = alone(logits, labels, data.images, far) + 2.5 * stream_distance(far, stream)
    torch.testing.assert_close(both(logits, labels, data.images, far), wanted)


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


def test_evaluation_counts_and_leaves_the_mode() -> None:
    model, data = runs.make_vit(drop_path_rate=0.9).train(), runs.Digits(30)
    found = evaluate(model, data, batch_size=7)
    assert model.training
    with torch.inference_mode():
        logits = model.eval()(data.images)
    labels = torch.tensor(data.labels)
    assert found["images"] == 30
    assert found["top1"] == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(runs.make_vit(), [])
