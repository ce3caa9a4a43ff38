# SPDX-License-Identifier: Apache-2.0
"""What is minimised: timm's losses on the labels, and the distance to a teacher's answers and residual stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from gohsp.models.base import logits_of
from gohsp.models.registry import family_of
from gohsp.recipe import Distillation, Fit


def make_mixup(fit: Fit, classes: int) -> Mixup | None:
    """Return timm's mixup and CutMix over a batch, or None where neither is wanted."""
    if not fit.mixes:
        return None
    return Mixup(
        mixup_alpha=fit.mixup,
        cutmix_alpha=fit.cutmix,
        prob=fit.mixup_prob,
        switch_prob=fit.switch_prob,
        label_smoothing=fit.smoothing,
        num_classes=classes,
    )


def make_loss(fit: Fit) -> nn.Module:
    """Return the loss of logits [B, classes] against labels: [B, classes] where images are mixed, else [B]."""
    if fit.mixes:
        return SoftTargetCrossEntropy()  # the smoothing is in the labels
    return LabelSmoothingCrossEntropy(fit.smoothing) if fit.smoothing else nn.CrossEntropyLoss()


class Distilled(nn.Module):
    """The loss on the labels and that on a teacher, in the shares that the settings give.

    Args:
        loss: On the labels.
        teacher: Gives logits [B, classes] for the images that the student sees. For features it is a vision transformer
            of the student's depth and width.
        settings: See :class:`gohsp.recipe.Distillation`.
    """

    def __init__(self, loss: nn.Module, teacher: nn.Module, settings: Distillation) -> None:
        super().__init__()
        self.loss, self.settings = loss, settings
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, logits: Tensor, labels: Tensor, images: Tensor, stream: Sequence[Tensor]) -> Tensor:
        """Return the mean loss of a batch; ``stream`` is what :func:`watch` saw of the student."""
        with torch.no_grad(), watch(self.teacher, self.watches) as wanted:
            answers = logits_of(self.teacher(images)).to(logits.dtype)
        weight = self.settings.weight
        loss = (1 - weight) * self.loss(logits, labels) + weight * distance(logits, answers, self.settings)
        if self.watches:
            loss = loss + self.settings.features * stream_distance(stream, wanted)
        return loss

    @property
    def watches(self) -> bool:
        """Whether the residual stream counts."""
        return self.settings.features > 0


@contextmanager
def watch(model: nn.Module, on: bool = True) -> Iterator[list[Tensor]]:
    """Collect the residual stream [B, N, D] of the forward passes within: after each block, and after the last norm."""
    stream: list[Tensor] = []
    places = family_of(model).stream_places(model) if on else []
    hooks = [place.register_forward_hook(lambda module, inputs, output: stream.append(output)) for place in places]
    try:
        yield stream
    finally:
        for hook in hooks:
            hook.remove()


def stream_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return how far residual streams [B, N, D] are apart: squared error over variance, mean over images and places.

    Each image has its own variance, so that the share of a batch that a process has does not matter.
    """
    return torch.stack([_relative(own, other) for own, other in zip(student, teacher, strict=True)]).mean()


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = (stream.to(dtype).flatten(1, -2) for stream in (student, teacher))  # of some models [B, H, W, D]
    return ((student - teacher).square().mean(dim=(1, 2)) / teacher.var(dim=(1, 2), correction=0)).mean()


def distance(logits: Tensor, answers: Tensor, settings: Distillation) -> Tensor:
    """Return how far logits [B, classes] are from a teacher's, mean over the batch.

    "soft": T^2 KL(teacher || student), both softened by the temperature T. "hard": cross-entropy with the teacher's
    class.
    """
    if settings.kind == "hard":
        return F.cross_entropy(logits, answers.argmax(dim=1))
    t = settings.temperature
    student, teacher = F.log_softmax(logits / t, dim=1), F.log_softmax(answers / t, dim=1)
    return t * t * F.kl_div(student, teacher, reduction="batchmean", log_target=True)
