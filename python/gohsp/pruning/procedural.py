# SPDX-License-Identifier: Apache-2.0
"""Images that nobody took: dead leaves, coloured noise and fractals, drawn from a generator alone.

They share with photographs what most calibration needs of them: edges, regions and detail at every scale, and colours
that vary together. All are float32 [n, channels, height, width] from 0 to 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

LEAVES = 300  # drawn on an image, which is three times what covers it
SMALLEST_LEAF, LARGEST_LEAF = 0.02, 0.5  # radius, as a share of each side
POINTS, STEPS, UNSEEN = 1500, 40, 10  # of the chaos game: points at once, their steps, those before they are drawn
FEWEST_MAPS, MOST_MAPS = 2, 6


def coloured_noise(n: int, channels: int, height: int, width: int, generator: Generator) -> Tensor:
    """Return noise whose amplitude falls with the frequency f as 1 / f^a, with a from 0.7 to 1.6, an image each."""
    spectrum = torch.fft.rfft2(torch.randn(n, channels, height, width, generator=generator))
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)
    frequency = (rows.square() + columns.square()).sqrt()
    frequency[0, 0] = math.inf  # the mean is set below
    slope = _between(0.7, 1.6, (n, 1, 1, 1), generator)
    noise = torch.fft.irfft2(spectrum * frequency**-slope, s=(height, width))
    # A part that all channels share, as light has it, and a part of each channel's own.
    noise = noise.mean(dim=1, keepdim=True) * math.sqrt(channels) + _between(0.1, 1.0, (n, 1, 1, 1), generator) * noise
    noise = noise / noise.std(dim=(1, 2, 3), keepdim=True).clamp_min(1e-6)
    contrast = _between(0.1, 0.3, (n, 1, 1, 1), generator)
    return (_between(0.3, 0.7, (n, channels, 1, 1), generator) + contrast * noise).clamp(0, 1)


def dead_leaves(n: int, channels: int, height: int, width: int, generator: Generator) -> Tensor:
    """Return ellipses that cover each other, textured, as many of each size as makes an image look alike at any scale.

    The density of the radius r falls as 1 / r^3, which is what scale invariance asks for.
    """
    texture = coloured_noise(n, channels, height, width, generator) - 0.5
    canvas = coloured_noise(n, channels, height, width, generator)
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    for _ in range(LEAVES):
        draws = torch.rand(n, 6, 1, 1, generator=generator)
        radius = (SMALLEST_LEAF**-2 + draws[:, 0] * (LARGEST_LEAF**-2 - SMALLEST_LEAF**-2)) ** -0.5
        angle, stretch = math.pi * draws[:, 1], 2 ** (2 * draws[:, 2] - 1)
        down, across = y - draws[:, 3], x - draws[:, 4]
        along, beside = angle.cos() * across + angle.sin() * down, angle.cos() * down - angle.sin() * across
        inside = (along * stretch).square() + (beside / stretch).square() < radius.square()
        light = torch.rand(n, 1, 1, 1, generator=generator)
        colour = 0.6 * light + 0.4 * torch.rand(n, channels, 1, 1, generator=generator)
        canvas = torch.where(inside[:, None], colour + draws[:, 5:] * texture, canvas)
    return canvas.clamp(0, 1)


def fractals(n: int, channels: int, height: int, width: int, generator: Generator) -> Tensor:
    """Return attractors of random systems of contracting affine maps, coloured by the map, on coloured noise."""
    background = coloured_noise(n, channels, height, width, generator)
    matrices, shifts = _contractions(n, generator)
    count = torch.randint(FEWEST_MAPS, MOST_MAPS + 1, (n, 1), generator=generator)
    # A map is taken as often as its image is large, so that the attractor is covered evenly.
    chances = (torch.linalg.det(matrices).abs() + 0.02) * (torch.arange(MOST_MAPS) < count)
    taken = torch.multinomial(chances, POINTS * STEPS, replacement=True, generator=generator).view(n, STEPS, POINTS)
    image, points, track = torch.arange(n)[:, None], torch.zeros(n, POINTS, 2), []
    for chosen in taken.unbind(1):
        points = (matrices[image, chosen] @ points[..., None])[..., 0] + shifts[image, chosen]
        track.append(points)
    seen, maps = torch.cat(track[UNSEEN:], dim=1), taken[:, UNSEEN:].flatten(1)
    least, most = seen.amin(dim=1, keepdim=True), seen.amax(dim=1, keepdim=True)
    sides = torch.tensor([height, width])
    place = ((seen - least) / (most - least).clamp_min(1e-6) * sides).long().minimum(sides - 1)
    pixel = place[..., 0] * width + place[..., 1]
    hits = torch.zeros(n, MOST_MAPS, height * width)
    hits.view(n, -1).scatter_add_(1, maps * height * width + pixel, torch.ones_like(pixel, dtype=torch.float32))
    total = hits.sum(dim=1, keepdim=True)
    palette = torch.rand(n, channels, MOST_MAPS, generator=generator)
    colour = palette @ (hits / total.clamp_min(1))
    cover = (total.log1p() / total.amax(dim=2, keepdim=True).log1p() * 2).clamp(0, 1)
    return (cover * colour + (1 - cover) * background.flatten(2)).view(n, channels, height, width)


def _contractions(n: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return matrices [n, maps, 2, 2], rotation, scaling by less than one and rotation, and shifts [n, maps, 2]."""
    angles = _between(0, 2 * math.pi, (2, n, MOST_MAPS), generator)
    turn, back = (torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], dim=-1).unflatten(-1, (2, 2)) for a in angles)
    scales = _between(0.2, 0.85, (n, MOST_MAPS, 1, 2), generator)
    return turn * scales @ back, _between(-1, 1, (n, MOST_MAPS, 2), generator)


def _between(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


PROCEDURES: dict[str, Callable[[int, int, int, int, Generator], Tensor]] = {
    "dead-leaves": dead_leaves,
    "coloured-noise": coloured_noise,
    "fractals": fractals,
}


def procedural(n: int, channels: int, height: int, width: int, generator: Generator) -> Tensor:
    """Return images of all kinds in turn: a third of each."""
    kinds = list(PROCEDURES.values())
    sizes = [len(range(start, n, len(kinds))) for start in range(len(kinds))]
    images = torch.empty(n, channels, height, width)
    for start, (draw, size) in enumerate(zip(kinds, sizes, strict=True)):
        if size:
            images[start :: len(kinds)] = draw(size, channels, height, width, generator)
    return images
