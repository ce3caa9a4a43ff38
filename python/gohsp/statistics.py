# SPDX-License-Identifier: Apache-2.0
"""What pruning learns from calibration images: the tokens between the blocks, second moments, sensitivities.

Everything is accumulated in float64 and in bounded memory: a linear layer with m inputs needs O(m^2) numbers however
many images there are. The only thing kept per image is one residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.models.base import OpenModel
from gohsp.models.hooks import inputs_of, outputs_of

CHUNK = 16  # images that go through a block at once: small enough for the caches, large enough for the GEMMs


def read_images(batches: Iterable[Any], model: nn.Module, max_images: int | None = None) -> Iterator[Tensor]:
    """Give the images of some batches, on the device and in the dtype of a model.

    Args:
        batches: Tensors [B, C, height, width] or sequences that start with one, such as (images, labels).
        model: Where the images go.
        max_images: Stop after so many images; None takes all.

    Raises:
        TypeError: ``batches`` cannot be iterated over, or holds something else.
        ValueError: A tensor is not four-dimensional, ``max_images`` is not positive, or there is no image.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images: wanted a positive number or None, got {max_images}")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise TypeError(f"batches: wanted an iterable of batches of images, got {type(batches).__name__}")
    like = next(model.parameters())
    seen = 0
    for batch in batches:
        images = batch if isinstance(batch, Tensor) else _first(batch)
        if images.dim() != 4:
            raise ValueError(f"batches: wanted images [B, C, height, width], got shape {tuple(images.shape)}")
        images = images[: None if max_images is None else max_images - seen]
        seen += len(images)
        if len(images):
            yield images.to(like)
        if seen == max_images:
            return
    if seen == 0:
        raise ValueError("batches: wanted at least one image, got none")


def _first(batch: Any) -> Tensor:
    if isinstance(batch, Sequence) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    raise TypeError(f"batches: wanted tensors or (images, ...) sequences, got {type(batch).__name__}")


def embed(opened: OpenModel, batches: Iterable[Any], max_images: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Return the tokens that the first block reads, [images, N, D], and the (height, width) of the images.

    Raises:
        TypeError, ValueError: See :func:`read_images`, or the images are not all of one size.
    """
    parts, sizes = [], set()
    for images in read_images(batches, opened.model, max_images):
        sizes.add((images.shape[2], images.shape[3]))
        if len(sizes) > 1:
            raise ValueError(f"batches: wanted images of one size, got {sorted(sizes)}")
        parts += [opened.embed(part) for part in images.split(CHUNK)]
    return torch.cat(parts), sizes.pop()


class Moments:
    """Weighted second moments of rows x [rows, m] and, beside them, of y [rows, n]: what a linear regression needs.

    Args:
        inputs: m.
        outputs: n.
        device: Where to accumulate.
    """

    def __init__(self, inputs: int, outputs: int = 0, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.weight = zeros()
        self.x, self.y = zeros(inputs), zeros(outputs)
        self.xx, self.xy = zeros(inputs, inputs), zeros(inputs, outputs)
        self.sample: Tensor | None = None  # the rows of the first update, for what second moments cannot tell

    def update(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add rows: x [..., m], y [..., n], one non-negative weight a row [...] (1 if None)."""
        if self.sample is None:
            self.sample = x.detach().flatten(0, -2).clone()
        x = x.detach().double().flatten(0, -2)
        rows = x.new_ones(len(x)) if weight is None else weight.detach().double().flatten()
        weighted = x * rows[:, None]
        self.weight += rows.sum()
        self.x += weighted.sum(dim=0)
        self.xx.addmm_(weighted.T, x)
        if y is not None:
            y = y.detach().double().flatten(0, -2)
            self.y += rows @ y
            self.xy.addmm_(weighted.T, y)

    def mean(self) -> Tensor:
        """Return the mean of x, [m]."""
        return self.x / self.weight

    def covariance(self) -> Tensor:
        """Return the covariance of x, [m, m]."""
        return self.xx / self.weight - torch.outer(self.mean(), self.mean())

    def fit(self, weight: Tensor, kept: Tensor, ridge: float, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """Fit y = W x[kept] + b by least squares, pulled towards given weights.

        The minimum of E||y - W x[kept] - b||^2 + ridge * mean(diag C) * ||W - weight[:, kept]||^2, with C the
        covariance of the kept x, in closed form. The pull goes to the given weights and not to zero: where the
        calibration images say little, these are the better guess.

        Args:
            weight: [n, m], float64.
            kept: Indices of the columns to use, int64 [k].
            ridge: Strength of the pull, relative to the mean variance.
            intercept: Whether there is a b. Without one it is zero, and C is the second moment about zero.

        Returns:
            W [n, k] and b [n], float64.
        """
        mean_x, mean_y = self.x[kept] / self.weight, self.y / self.weight
        if not intercept:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        square = self.xx[kept][:, kept] / self.weight - torch.outer(mean_x, mean_x)
        cross = self.xy[kept] / self.weight - torch.outer(mean_x, mean_y)
        start = weight[:, kept]
        change = torch.cholesky_solve(cross - square @ start.T, torch.linalg.cholesky(damped(square, ridge)))
        fitted = start + change.T
        return fitted, mean_y - fitted @ mean_x


def damped(square: Tensor, ridge: float) -> Tensor:
    """Return a positive semidefinite matrix plus ``ridge`` times its mean diagonal, safely invertible."""
    # The floor keeps the Cholesky factorisation alive for duplicate or constant columns; it is far below any signal.
    level = max(ridge, 1e-9) * square.diagonal().mean() if len(square) else square.new_zeros(())
    return square + (level + 1e-30) * torch.eye(len(square), dtype=square.dtype, device=square.device)


def correlation(covariance: Tensor) -> Tensor:
    """Return the correlations that belong to a covariance [m, m]; those of a constant are 0, its own is 1."""
    inverse = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(inverse > 0, 1 / inverse, 0.0)
    return (covariance * torch.outer(inverse, inverse)).fill_diagonal_(1)


@dataclass(frozen=True)
class Sensitivity:
    """How much the features that a model gives react to errors in and after one sublayer.

    In all of them the expectation is over images and over random projections f of the features.

    Attributes:
        metric: E[sum over tokens of g g^T], float64 [D, D], for g the gradient of f by the residual stream after it.
        tokens: E[||g||^2] of each token, float64 [N].
        taylor: E[(sum over tokens of x * df/dx)^2] of each input x of its write, float64 [m]: the squared change of the
            features, to first order, when that column is taken out.
        taylor_in: The same of each input of its read, [D].
        rows: E[sum over tokens of (df/dy)^2] of each output y of its read, float64 [r].
    """

    metric: Tensor
    tokens: Tensor
    taylor: Tensor
    taylor_in: Tensor
    rows: Tensor

    def weights(self) -> Tensor:
        """Return weights of the tokens for regressions, [N], with the mean of their squares near 1.

        The square root of the sensitivity: in the last blocks the class token has nearly all of it, and a regression on
        one token an image would learn the calibration images by heart. Ours; found best of the powers 0, 1/2 and 1.
        """
        return (self.tokens / self.tokens.mean()).sqrt().clamp_min(0.1)


def measure_sensitivities(opened: OpenModel, stream: Tensor, seed: int = 0) -> list[Sensitivity]:
    """Measure the sensitivity after each sublayer of a dense model, one backward pass for each image and no labels.

    A projection of the features on random signs has, on average over the signs, the squared norm of the Jacobian as
    the squared norm of its gradient. So ``trace(metric E)`` estimates what an error of covariance E does to the
    features, if it is alike at all tokens: the usual Kronecker factorisation.

    Args:
        opened: Dense model in evaluation mode.
        stream: Tokens before the first block, [images, N, D].
        seed: Seed of the random signs.
    """
    layers = opened.sublayers
    generator = torch.Generator().manual_seed(seed)
    _, tokens, dim = stream.shape

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=stream.device)

    found = [
        Sensitivity(
            zeros(dim, dim), zeros(tokens), zeros(layer.write.in_features), zeros(dim), zeros(layer.read.out_features)
        )
        for layer in layers
    ]
    for chunk in stream.split(CHUNK):
        for total, traced in zip(found, _traced_gradients(opened, chunk, generator), strict=True):
            after = traced.after.double()
            flat = after.flatten(0, 1)
            total.metric.addmm_(flat.T, flat)
            total.tokens.add_(after.square().sum(dim=(0, 2)))
            total.taylor.add_(_squared_terms(traced.hidden, traced.hidden_gradient))
            total.taylor_in.add_(_squared_terms(traced.seen, traced.read @ traced.read_weight))
            total.rows.add_(traced.read.double().square().sum(dim=(0, 1)))
    for total in found:
        for sums in (total.metric, total.tokens, total.taylor, total.taylor_in, total.rows):
            sums /= len(stream)
    return found


def _squared_terms(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the squared first-order change that each column x [B, N, m] stands for, summed over images, [m]."""
    return (x * gradient).sum(dim=1).double().square().sum(dim=0)


@dataclass(frozen=True)
class _Traced:
    """What read sees and write reads in one sublayer, and gradients by the latter, by read's output, by the stream."""

    seen: Tensor
    hidden: Tensor
    read_weight: Tensor
    read: Tensor
    hidden_gradient: Tensor
    after: Tensor


def _traced_gradients(opened: OpenModel, x: Tensor, generator: torch.Generator) -> list[_Traced]:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        values: list[tuple[Tensor, Tensor, Tensor]] = []
        inside: list[list[Tensor]] = []
        for layer in opened.sublayers:
            reads, writes = layer.read.layers, layer.write.layers[0]
            with inputs_of(reads[0], writes) as inputs, outputs_of(*reads) as outputs:
                x = layer(x)
            values.append((inputs[0].detach(), inputs[1].detach(), layer.read.weight.detach()))
            inside.append([inputs[1], x, *outputs])
        features = opened.features(x)
        signs = torch.randint(0, 2, features.shape, generator=generator, device="cpu").mul(2).sub(1)
        flat = torch.autograd.grad((features * signs.to(features)).sum(), [t for part in inside for t in part])
    gradients = iter(flat)
    traced = []
    for before, part in zip(values, inside, strict=True):
        hidden, after, *read = (next(gradients) for _ in part)
        traced.append(_Traced(*before, torch.cat(read, dim=-1), hidden, after))
    return traced
