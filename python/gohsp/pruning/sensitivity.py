# SPDX-License-Identifier: Apache-2.0
"""Sensitivities: how much the features that a model gives react to errors in and after each sublayer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gohsp.models.base import Attention, Mlp, OpenModel
from gohsp.models.hooks import inputs_of, outputs_of
from gohsp.pruning.calibration import CHUNK


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
        queries: Of attention E[sum over tokens of g g^T] for g the gradient by the q of each head, before any norm,
            float64 [H, d, d]; of an MLP there are none, [0, 0, 0].
    """

    metric: Tensor
    tokens: Tensor
    taylor: Tensor
    taylor_in: Tensor
    rows: Tensor
    queries: Tensor

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
            metric=zeros(dim, dim),
            tokens=zeros(tokens),
            taylor=zeros(layer.write.in_features),
            taylor_in=zeros(dim),
            rows=zeros(layer.read.out_features),
            queries=zeros(*_heads(layer)),
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
            heads, width, _ = total.queries.shape
            by_head = traced.read[..., : heads * width].double().unflatten(-1, (heads, width)).flatten(0, 1)
            total.queries.add_(by_head.permute(1, 2, 0) @ by_head.transpose(0, 1))
    for total in found:
        for sums in (total.metric, total.tokens, total.taylor, total.taylor_in, total.rows, total.queries):
            sums /= len(stream)
    return found


def _heads(layer: Attention | Mlp) -> tuple[int, int, int]:
    """Return the shape of what is measured of the queries."""
    size = layer.geometry
    return (size.num_heads, size.head_dim, size.head_dim) if isinstance(layer, Attention) else (0, 0, 0)


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
