# SPDX-License-Identifier: Apache-2.0
"""Sensitivities: how much the features that a model gives react to errors in and after each sublayer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import islice

import torch
from torch import Tensor

from gohsp.models.base import Attention, Mlp, OpenModel
from gohsp.pruning.calibration import each_chunk
from gohsp.pruning.share import Share


@dataclass(frozen=True)
class Sensitivity:
    """How much the features that a model gives react to errors in and after one sublayer.

    In all of them the expectation is over images and over random projections f of the features.

    Attributes:
        metric: E[sum over tokens of g g^T], float64 [D, D], for g the gradient of f by the residual stream after it, or
            by what write gave where a norm lies between; see :meth:`gohsp.models.base.Sublayer.judged`.
        tokens: E[||g||^2] of each token, float64 [N].
        taylor: E[(sum over tokens of x * df/dx)^2] of each input x of its write, float64 [m]: the squared change of the
            features, to first order, when that column is taken out.
        taylor_in: The same of each input of its read, [D].
        rows: E[sum over tokens of (df/dy)^2] of each output y of its read, float64 [r].
        queries: Of attention E[sum over tokens of g g^T] for g the gradient by the q of each head, before any norm,
            float64 [H, d, d]; of an MLP there are none, [0, 0, 0].
        prices: What a look at the whole model found each input of its write to be worth, float64 [m], or None; see
            :meth:`gohsp.pruning.criteria.Criterion.survey`.
    """

    metric: Tensor
    tokens: Tensor
    taylor: Tensor
    taylor_in: Tensor
    rows: Tensor
    queries: Tensor
    prices: Tensor | None = None

    def weights(self) -> Tensor:
        """Return weights of the tokens for regressions, [N], with the mean of their squares near 1.

        The square root of the sensitivity: in the last blocks the class token has nearly all of it, and a regression on
        one token an image would learn the calibration images by heart. Ours; found best of the powers 0, 1/2 and 1.
        """
        return (self.tokens / self.tokens.mean()).sqrt().clamp_min(0.1)


SUMMED = tuple(field.name for field in fields(Sensitivity) if field.name != "prices")


def measure_sensitivities(
    opened: OpenModel, stream: Tensor, seed: int = 0, share: Share | None = None
) -> list[Sensitivity]:
    """Measure the sensitivity after each sublayer of a dense model, one backward pass for each image and no labels.

    A projection of the features on random signs has, on average over the signs, the squared norm of the Jacobian as
    the squared norm of its gradient. So ``trace(metric E)`` estimates what an error of covariance E does to the
    features, if it is alike at all tokens: the usual Kronecker factorisation.

    Args:
        opened: Dense model in evaluation mode.
        stream: Tokens before the first block, [images, N, D].
        seed: Seed of the random signs.
        share: Which of the images these are; all of them by default.
    """
    share = share or Share.of(len(stream), shared=False)
    layers = opened.sublayers
    generator = torch.Generator().manual_seed(seed)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=stream.device)

    found, x = [], stream[:1]
    with torch.no_grad():
        for layer in layers:
            x = layer(layer.enter(x))
            dim = layer.geometry.dim
            found.append(
                Sensitivity(
                    metric=zeros(dim, dim),
                    tokens=zeros(x.shape[1]),
                    taylor=zeros(layer.write.in_features),
                    taylor_in=zeros(dim),
                    rows=zeros(layer.read.out_features),
                    queries=zeros(*_heads(layer)),
                )
            )
        features = opened.features(x)
    signs = torch.randint(0, 2, (share.total, *features.shape[1:]), generator=generator, device="cpu").mul(2).sub(1)
    signs = signs[share.first : share.first + len(stream)]

    def measure(chunk: Tensor, signs: Tensor) -> list[Sensitivity]:
        traced = _traced_gradients(opened, chunk, signs)
        return [_sums(layer, each) for layer, each in zip(layers, traced, strict=True)]

    def add(sums: list[Sensitivity]) -> None:
        for total, part in zip(found, sums, strict=True):
            for name in SUMMED:
                getattr(total, name).add_(getattr(part, name))

    each_chunk(measure, add, stream, signs.to(features))
    for total in found:
        for name in SUMMED:
            share.add_up_(getattr(total, name))
            getattr(total, name).div_(share.total)
    return found


def _sums(layer: Attention | Mlp, traced: _Traced) -> Sensitivity:
    """Return what the images of a chunk add to the sensitivity of a sublayer."""
    flat = traced.judged.flatten(0, 1)
    heads, width, _ = _heads(layer)
    by_head = traced.read[..., : heads * width].unflatten(-1, (heads, width)).flatten(0, 1)
    return Sensitivity(
        metric=flat.T @ flat,
        tokens=traced.judged.square().sum(dim=(0, 2), dtype=torch.float64),
        taylor=_squared_terms(traced.hidden, traced.hidden_gradient),
        taylor_in=_squared_terms(traced.seen, traced.read @ traced.read_weight),
        rows=traced.read.square().sum(dim=(0, 1), dtype=torch.float64),
        queries=by_head.permute(1, 2, 0) @ by_head.transpose(0, 1),
    )


def _heads(layer: Attention | Mlp) -> tuple[int, int, int]:
    """Return the shape of what is measured of the queries."""
    size = layer.geometry
    return (size.num_heads, size.head_dim, size.head_dim) if isinstance(layer, Attention) else (0, 0, 0)


def _squared_terms(x: Tensor, gradient: Tensor) -> Tensor:
    """Return the squared first-order change that each column x [B, N, m] stands for, summed over images, [m]."""
    return (x * gradient).sum(dim=1).double().square().sum(dim=0)


@dataclass(frozen=True)
class _Traced:
    """What read sees and write reads in one sublayer, and gradients by read's output, by the latter, by what errors are
    measured in."""

    seen: Tensor
    hidden: Tensor
    read_weight: Tensor
    read: Tensor
    hidden_gradient: Tensor
    judged: Tensor


def _traced_gradients(opened: OpenModel, x: Tensor, signs: Tensor) -> list[_Traced]:
    """Trace a chunk [B, N, D] with the gradients of its features times some signs [B, ...]."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        traces = []
        for layer in opened.sublayers:
            traces.append(layer.trace(layer.enter(x)))
            x = traces[-1].after
        value = (opened.features(x) * signs.clone()).sum()
        judged = [layer.judged(trace) for layer, trace in zip(opened.sublayers, traces, strict=True)]
        inside = [(trace.read, trace.hidden, last) for trace, last in zip(traces, judged, strict=True)]
        flat = torch.autograd.grad(value, [part for parts in inside for part in parts])
    gradients = iter(flat)
    return [
        _Traced(trace.seen.detach(), trace.hidden.detach(), layer.read.weight.detach(), *islice(gradients, 3))
        for layer, trace in zip(opened.sublayers, traces, strict=True)
    ]
