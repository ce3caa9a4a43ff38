# SPDX-License-Identifier: Apache-2.0
"""Calibration images where there are none: drawn by a procedure, and changed until a model finds them rich.

A vision transformer keeps no statistics of the images that it has seen, as batch normalisation would. What it keeps is
what its parts are for, and that is what the optimisation asks of the images:

- every neuron answers differently to different patches: one that nothing moves would look free to remove;
- the outputs of the heads at the patches of an image are alike for some pairs and unlike for others, as they are for
  things before a background and are not for noise (the entropy of that similarity, after PSAQ-ViT, ECCV 2022);
- the features tell the images from each other;
- where there is a classifier, it is sure of each image, and all its classes come up;
- neighbouring pixels are nearly alike (total variation).

The start from procedural images, the terms for neurons and features, and all weights are our choice.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.arguments import check_callable, check_name, check_seed, check_whole
from gohsp.models.base import Attention, OpenModel
from gohsp.models.hooks import evaluating
from gohsp.models.registry import open_model
from gohsp.progress import ticking
from gohsp.pruning.calibration import CHUNK
from gohsp.pruning.procedural import PROCEDURES, procedural

KINDS = ("optimised", "procedural", *PROCEDURES)

DRAWN = 128  # at once: points of fractals take megabytes an image
RATE = 0.03  # of Adam, in deviations of the pixels
BINS, WIDTH = 24, 0.1  # of the density of similarities from -1 to 1


def synthesise(
    model: nn.Module,
    n: int,
    kind: str = "optimised",
    *,
    steps: int = 10,
    seed: int = 0,
    on_progress: Callable[[int, int], object] | None = None,
) -> Tensor:
    """Make images to calibrate with where none are at hand, for :func:`gohsp.prune` and :func:`gohsp.rank_heads`.

    Args:
        model: Dense vision transformer that gohsp knows, made for one size of images. It is not changed.
        n: How many.
        kind: "optimised" starts from procedural images and changes them until the model finds them rich; "procedural"
            has dead leaves, coloured noise and fractals in turn; "dead-leaves", "coloured-noise" and "fractals" are
            each of them alone. All but the first ask the model for no more than size and normalisation.
        steps: Of the optimisation; each costs a forward and a backward pass of every image.
        seed: The same images come from the same seed, model and number.
        on_progress: Called with (steps done, steps in all) of the optimisation, all images together. By default a bar
            shows them where stderr is a terminal.

    Returns:
        Normalised images [n, channels, height, width], on the device and in the dtype of the model;
        ``synthesise(model, 128).split(32)`` are batches.

    Raises:
        TypeError: The model or another argument is of a kind that is not known.
        ValueError: An argument is out of its range, or the model is compressed, or made for no size in particular.
    """
    opened = open_model(model)
    check_whole("n", n, 1)
    check_name("kind", kind, KINDS)
    check_whole("steps", steps, 0)
    check_seed(seed)
    check_callable("on_progress", on_progress)
    shape = opened.family.image_shape(model)
    if shape is None:
        raise ValueError("model: wanted one that is made for images of one size, got one that takes any")
    like = next(model.parameters())
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in opened.family.normalisation(model))
    draw = PROCEDURES.get(kind, procedural)
    generator = torch.Generator().manual_seed(seed)
    drawn = [draw(min(DRAWN, n - start), *shape, generator) for start in range(0, n, DRAWN)]
    images = (torch.cat(drawn) - mean) / std
    if kind != "optimised":
        return images.to(like)
    limits = ((0 - mean) / std).to(like.device), ((1 - mean) / std).to(like.device)
    parts = images.to(like.device).split(CHUNK)
    with ticking("synthesise", on_progress, steps * len(parts)) as tick, evaluating(model):
        return torch.cat([_optimised(opened, part, limits, steps, tick) for part in parts]).to(like)


def _optimised(
    opened: OpenModel, start: Tensor, limits: tuple[Tensor, Tensor], steps: int, tick: Callable[[], None]
) -> Tensor:
    """Return images that the model finds richer than these, with every pixel within the limits."""
    dtype = next(opened.model.parameters()).dtype
    with torch.inference_mode(False), torch.enable_grad():
        images = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], lr=RATE)
        for _ in range(steps):
            (images.grad,) = torch.autograd.grad(poverty(opened, images.to(dtype)), [images])
            optimizer.step()
            with torch.no_grad():
                images.clamp_(*limits)
            tick()
    return images.detach()


def poverty(opened: OpenModel, images: Tensor) -> Tensor:
    """Return how little a model finds in some images, a number: the sum of the terms that this module names."""
    neurons, patches = [], []
    x = opened.embed(images)
    for layer in opened.sublayers:
        trace = layer.trace(layer.enter(x))
        seen, x = trace.hidden, trace.after
        if isinstance(layer, Attention):
            patches.append(_similarity_entropy(seen))
        else:
            neurons.append(seen.flatten(0, 1).var(dim=0).add(1e-6).log().mean())
    features = F.normalize(opened.features(x).flatten(1), dim=1)
    alike = (2 * features @ features.T - 2).exp().mean()  # from 1, all the same, down to what spreads over the sphere
    loss = alike.log() - torch.stack(patches).mean() - torch.stack(neurons).mean() + _total_variation(images)
    answers = opened.family.answers(opened.model, x)
    return loss if answers is None else loss + _doubt(answers)


def _similarity_entropy(tokens: Tensor) -> Tensor:
    """Return the entropy of the cosine similarities of the tokens of an image [B, N, m], mean over the images."""
    directions = F.normalize(tokens, dim=-1)
    similarities = (directions @ directions.mT).flatten(1)
    grid = torch.linspace(-1, 1, BINS, device=tokens.device, dtype=tokens.dtype)
    density = torch.stack([(-((similarities - g) / WIDTH).square() / 2).exp().mean(dim=1) for g in grid], dim=1)
    density = density / density.sum(dim=1, keepdim=True)
    return -(density * (density + 1e-9).log()).sum(dim=1).mean()


def _doubt(answers: Tensor) -> Tensor:
    """Return the entropy of the classes for an image, less that of the classes over all images."""
    chances = answers.softmax(dim=-1)
    mean = chances.mean(dim=0)
    return (mean * (mean + 1e-9).log()).sum() - (chances * (chances + 1e-9).log()).sum(dim=-1).mean()


def _total_variation(images: Tensor) -> Tensor:
    return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()
