# SPDX-License-Identifier: Apache-2.0
"""What is minimised: timm's losses on the labels, and the distance to a teacher's answers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

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
    """The loss on the labels and that on a teacher's answers, in the shares that the settings give.

    Args:
        loss: On the labels.
        teacher: Gives logits [B, classes] for the images that the student sees.
        settings: See :class:`gohsp.recipe.Distillation`.
    """

    def __init__(self, loss: nn.Module, teacher: nn.Module, settings: Distillation) -> None:
        super().__init__()
        self.loss, self.settings = loss, settings
        self.teacher = teacher.eval().requires_grad_(False)

    def forward(self, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        with torch.no_grad():
            answers = self.teacher(images).to(logits.dtype)
        weight = self.settings.weight
        return (1 - weight) * self.loss(logits, labels) + weight * distance(logits, answers, self.settings)


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
