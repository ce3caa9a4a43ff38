# SPDX-License-Identifier: Apache-2.0
"""Calibration images that nobody took: what each kind is made of, and that a model finds the optimised ones richer."""

from __future__ import annotations

import copy
import math
import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gohsp
import gohsp.pruning.procedural as procedures
from gohsp.models.registry import open_model
from gohsp.pruning import synthesis
from gohsp.pruning.procedural import PROCEDURES, procedural
from gohsp.pruning.synthesis import KINDS, poverty
from gohsp.serialization import digest_weights


def drawn(kind: str, n: int = 16, height: int = 64, width: int = 64, seed: int = 0) -> Tensor:
    return PROCEDURES[kind](n, 3, height, width, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", PROCEDURES)
def test_a_procedure_gives_pixels_of_different_images_at_any_size(kind: str) -> None:
    for channels, height, width in ((3, 40, 24), (1, 24, 40), (4, 8, 8)):
        images = PROCEDURES[kind](3, channels, height, width, torch.Generator().manual_seed(0))
        assert images.shape == (3, channels, height, width) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1 and images.isfinite().all()
        assert all((a - b).abs().mean() > 0.02 for a, b in pairwise(images))
        assert (images.std(dim=(2, 3)) > 0.02).all()  # no image is of one colour


def test_the_amplitude_of_coloured_noise_falls_with_the_frequency() -> None:
    amplitude = torch.fft.rfft2(drawn("coloured-noise", 64)).abs().mean(dim=(0, 1))
    along = amplitude[0, 1:32]
    steps = torch.arange(1, 32).log()
    slope = torch.linalg.lstsq(torch.stack([steps, torch.ones(31)], dim=1), along.log()[:, None]).solution[0]
    assert -1.7 < slope < -0.7


def test_the_channels_of_an_image_vary_together() -> None:
    for kind in PROCEDURES:
        channels = drawn(kind, 32, 32, 32).flatten(2)
        together = torch.stack([torch.corrcoef(image)[0, 1] for image in channels])
        assert together.mean() > 0.3, kind


def test_dead_leaves_have_regions_and_edges_and_noise_has_not() -> None:
    def kurtosis(images: Tensor) -> float:
        steps = images.diff(dim=-1)
        return float(steps.pow(4).mean() / steps.square().mean() ** 2)

    assert kurtosis(drawn("dead-leaves")) > 1.3 * kurtosis(drawn("coloured-noise"))


def test_dead_leaves_have_as_much_to_see_at_each_scale() -> None:
    """What the contrast of two pixels gains with each doubling of their distance; leaves of one size gain at theirs."""

    def gains(images: Tensor) -> list[float]:
        images = images - images.mean(dim=(2, 3), keepdim=True)
        contrasts = [float((images[..., d:] - images[..., :-d]).square().mean()) for d in (1, 2, 4, 8, 16, 48)]
        return [(b - a) / contrasts[-1] for a, b in pairwise(contrasts[:-1])]

    assert all(0.1 < gain < 0.25 for gain in gains(drawn("dead-leaves", 8, 128, 128)))
    noise = torch.rand(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert all(abs(gain) < 0.05 for gain in gains(noise))


def test_two_maps_that_halve_draw_the_line_between_their_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half in the colour of its map, and nothing beside it."""
    maps = torch.eye(2).expand(1, 2, 2, 2) / 2, torch.tensor([[[0.0, 0.0], [0.5, 0.5]]])
    monkeypatch.setattr(procedures, "_contractions", lambda n, generator: maps)
    monkeypatch.setattr(procedures, "MOST_MAPS", 2)
    monkeypatch.setattr(procedures, "coloured_noise", lambda n, c, h, w, generator: torch.full((n, c, h, w), -9.0))
    (image,) = drawn("fractals", 1, 16, 16)
    assert torch.equal(image[0] > -4, torch.eye(16, dtype=torch.bool))
    first, second = image[0].diagonal().split(8)
    assert first.std() < 1e-3 and second.std() < 1e-3 and (first.mean() - second.mean()).abs() > 0.05


def test_procedural_has_all_kinds_in_turn() -> None:
    images = procedural(7, 3, 32, 32, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for start, (kind, size) in enumerate(zip(PROCEDURES, (3, 2, 2), strict=True)):
        assert torch.equal(images[start::3], PROCEDURES[kind](size, 3, 32, 32, generator))
    assert procedural(1, 3, 32, 32, torch.Generator()).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_decides_and_nothing_else_is_touched(kind: str, make_model) -> None:
    model = make_model().train()
    before = digest_weights(model), [(p.requires_grad, p.grad) for p in model.parameters()]
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first = gohsp.synthesise(model, 4, kind, steps=2, seed=5)
    torch.rand(3)
    with torch.inference_mode():
        again = gohsp.synthesise(model, 4, kind, steps=2, seed=5)
    assert torch.equal(first, again)
    assert not torch.equal(first, gohsp.synthesise(model, 4, kind, steps=2, seed=6))
    assert first.shape == (4, 3, 48, 48) and first.dtype == torch.float64 and not first.requires_grad
    torch.set_rng_state(states[0])
    gohsp.synthesise(model, 4, kind, steps=1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert (digest_weights(model), [(p.requires_grad, p.grad) for p in model.parameters()]) == before
    assert all(module.training and not module._forward_hooks for module in model.modules())


def test_many_are_drawn_in_parts(make_model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def draw(n: int, *shape: Any) -> Tensor:
        sizes.append(n)
        return torch.full((n, *shape[:3]), float(len(sizes)))

    monkeypatch.setitem(PROCEDURES, "fractals", draw)
    images = gohsp.synthesise(make_model(), 300, "fractals")
    assert sizes == [128, 128, 44] and images.shape == (300, 3, 48, 48)
    assert len(images[:128].unique(dim=0)) == 1 and len(images.unique(dim=0)) == 3


def test_images_are_normalised_as_the_model_says(make_model) -> None:
    model = make_model(img_size=(32, 48))
    wanted = procedural(3, 3, 32, 48, torch.Generator().manual_seed(0)).double()
    for record in (dict, lambda **values: SimpleNamespace(**values)):
        model.pretrained_cfg = record(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
        images = gohsp.synthesise(model, 3, "procedural")
        back = images * torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        assert torch.allclose(back, wanted, atol=1e-6)
    grey = make_model(in_chans=1)
    grey.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert torch.allclose(
        gohsp.synthesise(grey, 2, "fractals") * 0.5 + 0.2,
        PROCEDURES["fractals"](2, 1, 48, 48, torch.Generator().manual_seed(0)).double(),
        atol=1e-6,
    )
    del grey.pretrained_cfg
    assert gohsp.synthesise(grey, 2, "fractals").shape == (2, 1, 48, 48)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_model_finds_optimised_images_richer_and_they_stay_pixels(name: str, make_model) -> None:
    model = make_model(name)
    opened = open_model(model)
    start, better = (gohsp.synthesise(model, 6, steps=steps) for steps in (0, 8))
    assert torch.equal(start, gohsp.synthesise(model, 6, "procedural"))
    with torch.no_grad():
        assert poverty(opened, better) < poverty(opened, start) - 0.1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in opened.family.normalisation(model))
    pixels = better * std + mean
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


def test_images_are_optimised_in_any_dtype(make_model) -> None:
    images = gohsp.synthesise(make_model().bfloat16(), 2, steps=1)
    assert images.dtype == torch.bfloat16 and images.isfinite().all()


def test_what_images_are_poor_in(make_model, images) -> None:
    """Each term, by images that differ in what it asks for."""
    model, some = make_model(), images(6)
    opened = open_model(model)
    with torch.no_grad():
        assert poverty(opened, some[:1].expand(6, -1, -1, -1)) > poverty(opened, some)  # all the same
    one = torch.ones(1, 9, 4, dtype=torch.float64)
    parts = torch.eye(4, dtype=torch.float64).repeat_interleave(3, dim=0)[None]
    mixed = torch.randn(1, 9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    entropies = [synthesis._similarity_entropy(tokens) for tokens in (one, parts, mixed)]
    assert entropies[0] < entropies[1] < entropies[2]
    sure = 9 * torch.eye(4)
    assert float(synthesis._doubt(sure)) == pytest.approx(-math.log(4), abs=0.02)
    for poor in (0 * sure, sure[:1].expand(4, 4)):  # sure of nothing; sure of one class for all
        assert float(synthesis._doubt(poor)) == pytest.approx(0, abs=1e-6)
    flat = some * 0
    assert synthesis._total_variation(flat) == 0 < synthesis._total_variation(some)


def test_a_neuron_that_no_image_moves_makes_them_poor(make_model, images) -> None:
    model = make_model()
    poor = []
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc2.weight[:, 0] = 0  # so that nothing but the term itself sees the neuron
        for _ in range(2):
            poor.append(float(poverty(open_model(model), images())))
            model.blocks[1].mlp.fc1.weight[0] = 0
    neurons = 2 * model.blocks[1].mlp.fc1.out_features
    assert (poor[1] - poor[0]) * neurons > 5  # the logarithm of a variance, from near 1 to near 0


def test_a_classifier_is_asked_where_there_is_one(make_model, images) -> None:
    model = make_model()
    x = open_model(model).embed(images())
    family = open_model(model).family
    for block in model.blocks:
        x = block(x)
    assert torch.allclose(family.answers(model, x), model(images()))
    bare = make_model(num_classes=0)
    assert family.answers(bare, x) is None
    unsure = copy.deepcopy(model)
    with torch.no_grad():
        unsure.head.weight.zero_()
        difference = poverty(open_model(model), images()) - poverty(open_model(unsure), images())
        assert difference == pytest.approx(
            float(synthesis._doubt(model(images())) - synthesis._doubt(unsure(images())))
        )


def test_progress_is_told(make_model) -> None:
    told: list[tuple[int, int]] = []
    gohsp.synthesise(make_model(), 17, steps=2, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "n: wanted a whole number from 1 up, got 0"),
        ({"n": 2.0}, TypeError, "n: wanted a whole number, got float"),
        ({"kind": "leaves"}, ValueError, "kind: wanted one of optimised, procedural, dead-leaves, .*, got 'leaves'"),
        ({"steps": -1}, ValueError, "steps: wanted a whole number from 0 up, got -1"),
        ({"seed": "x"}, TypeError, "seed: wanted a whole number, got str"),
        ({"on_progress": 3}, TypeError, "on_progress: wanted a function, got int"),
        ({"model": torch.nn.Linear(1, 1)}, TypeError, "model: wanted a timm "),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message: str, make_model) -> None:
    with pytest.raises(error, match=message):
        gohsp.synthesise(**({"model": make_model(), "n": 1} | arguments))


def test_models_that_cannot_say_what_images_they_want_are_refused(make_model) -> None:
    model = make_model()
    with pytest.raises(ValueError, match="model: it is already compressed"):
        gohsp.synthesise(gohsp.compress(model, gohsp.ModelMask.full(model)), 1)
    model.patch_embed.img_size = None
    with pytest.raises(ValueError, match="model: wanted one that is made for images of one size, got"):
        gohsp.synthesise(model, 1)


def test_pruning_takes_them(make_model) -> None:
    model = make_model()
    result = gohsp.prune(model, gohsp.synthesise(model, 6, steps=1).split(4), target={"params": 0.7})
    assert result.report.pruned.params <= 0.7 * result.report.dense.params


@pytest.mark.slow
def test_a_pruned_model_learns_from_the_dense_one_on_them(make_model) -> None:
    pytest.importorskip("accelerate")
    dense = make_model(img_size=32).float()
    images, unseen = (gohsp.synthesise(dense, 32, "procedural", seed=seed) for seed in (0, 1))
    result = gohsp.prune(dense, images.split(16), target={"params": 0.6}, optimiser="drop")
    trained = [
        gohsp.train(
            result,
            torch.utils.data.TensorDataset(images, torch.full((32,), label)),
            fit=gohsp.Fit(epochs=4, batch_size=16, lr=3e-4, warmup_epochs=0, mixup=0, cutmix=0),
            distill=gohsp.Distillation(weight=1.0, features=4.0),
            teacher=dense,
        ).model
        for label in (0, 1)
    ]
    before = gohsp.compress(result.model, result.mask)
    with torch.inference_mode():
        errors = [float((model(unseen) - dense(unseen)).square().mean()) for model in (before, *trained)]
    assert errors[1] < 0.5 * errors[0]
    assert errors[1] == errors[2]  # the labels do not count
