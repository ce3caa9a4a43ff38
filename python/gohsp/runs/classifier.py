# SPDX-License-Identifier: Apache-2.0
"""A linear classifier on the backbone's features, fitted in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def pool(tokens: Tensor) -> Tensor:
    """Features of an image, [B, 2 D], from its tokens [B, 1 + patches, D]: the class token and the patches' mean."""
    return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)


class Classifier(nn.Module):
    """A backbone that returns all its tokens, and a linear head that reads the class token and the patches' mean.

    The backbone stays a plain timm model (or its compressed form), so that it can be pruned, saved and exchanged
    while the head stays as it was trained.
    """

    def __init__(self, backbone: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, size, size]."""
        return self.head(pool(self.backbone(images)))


@torch.no_grad()
def collect(function: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Tensor:
    """Results of `function` for all batches, joined along the first dimension, without gradients."""
    return torch.cat([function(batch) for batch in batches])


def fit_ridge(features: Tensor, labels: Tensor, classes: int, penalty: float = 1e-3) -> nn.Linear:
    """Linear head by ridge regression of one-hot labels on standardised features (float64 inside, float32 out).

    features [n, F]; labels int64 [n]. `penalty` is the ridge per image: it is scaled by n, so that it means the
    same for any number of images. The standardisation is folded into the weights.
    """
    x = features.double()
    mean, std = x.mean(dim=0), x.std(dim=0).clamp_min(1e-6)
    x = (x - mean) / std
    targets = nn.functional.one_hot(labels, classes).double()
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ (targets - targets.mean(dim=0))).T / std
    head = nn.utils.skip_init(nn.Linear, features.shape[1], classes)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(targets.mean(dim=0) - weight @ mean)
    return head.requires_grad_(False)


def top1(logits: Tensor, labels: Tensor) -> float:
    """Share of the images whose largest logit is that of their label."""
    return (logits.argmax(dim=1) == labels).double().mean().item()
