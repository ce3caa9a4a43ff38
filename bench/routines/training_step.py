# SPDX-License-Identifier: Apache-2.0
"""A step of fine-tuning: the compact model against the dense one, masked and not, on the same batch.

Each step is what a training loop does: forward in training mode, backward, AdamW; for the masked dense model the mask
again, because the optimiser moves pruned weights too. The learning rate is zero, so that every step computes the same
and its logits can be checked against the masked dense model in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import cases
from bench.harness.cases import Case, Workload
from bench.harness.compare import BASELINE, Place, ReadyContender, compare
from bench.harness.environment import Settings, version_of
from bench.routines.end_to_end import title


def run(todo: Sequence[Case], batches: Sequence[int], settings: Settings) -> list[str]:
    """Compare steps of fine-tuning, for each case and batch.

    Returns:
        Names of the contenders that were refused for a wrong result.
    """
    refused: list[str] = []
    for case in todo:
        work = cases.load(case)
        for batch in batches:
            place = Place("training", case.label, "step", batch, work.count.tokens)
            heading = f"training step, {title(work, batch)}"
            refused += compare(place, contenders(work, work.images(batch)), settings, heading).refused
    return refused


def contenders(work: Workload, images: Tensor) -> list[ReadyContender]:
    """Return the step of each contender; all but the dense model compute the same logits."""
    with torch.inference_mode():
        dense = copy.deepcopy(work.dense).double()(images.double())
        masked = work.masked_in_double()(images.double())
    own, other = version_of("gohsp"), timm.__version__
    return [
        ReadyContender("dense", step(copy.deepcopy(work.dense), images), dense, other),
        ReadyContender("masked dense", masked_step(work, images), masked, other),
        ReadyContender("sliced", step(copy.deepcopy(work.sliced), images), masked, other),
        ReadyContender(BASELINE, step(copy.deepcopy(work.compressed), images), masked, own),
    ]


def step(model: nn.Module, images: Tensor, after: Callable[[], object] = lambda: None) -> Callable[[], Tensor]:
    """Return a function that makes one step of a model, in place, and gives its logits.

    Args:
        model: A model in evaluation mode and without gradients; it is switched to training.
        images: The batch.
        after: Called at the end of each step.
    """
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.05)
    labels = torch.arange(len(images)) % 10

    def run() -> Tensor:
        optimizer.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        after()
        return logits.detach()

    return run


def masked_step(work: Workload, images: Tensor) -> Callable[[], Tensor]:
    """Return the step of the dense model whose pruned weights are set to zero after each."""
    model = work.mask.apply_(copy.deepcopy(work.dense))
    return step(model, images, after=lambda: work.mask.apply_(model))
