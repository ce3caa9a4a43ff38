# SPDX-License-Identifier: Apache-2.0
"""Losses, mixup and distillation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import gohsp
from gohsp.training.losses import Distilled, distance, make_loss, make_mixup, stream_distance, watch
from gohsp.training.seeds import seeded

from . import digits_run as runs


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
