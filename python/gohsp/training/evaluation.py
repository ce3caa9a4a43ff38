# SPDX-License-Identifier: Apache-2.0
"""Top-1 and loss on labelled images."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohsp.models.base import logits_of
from gohsp.models.hooks import evaluating
from gohsp.training.batches import check_labels, every_batch

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: Any,
    *,
    batch_size: int = 64,
    workers: int = 0,
    accelerator: Accelerator | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Return how well a model classifies; it runs on the kernels where they can.

    Args:
        model: Gives logits [B, classes]. It runs in evaluation mode and is left as it was.
        data: Map-style data set of (image, label).
        batch_size: Images at a time.
        workers: Processes that load images.
        accelerator: Shares the images among its processes; each gets the result for all.
        on_batch: Called with the number of images after each batch.

    Returns:
        "top1" (a share), "loss" (mean cross-entropy) and "images".

    Raises:
        ValueError: There are no images.
    """
    if not len(data):
        raise ValueError("data: wanted at least one image, got none")
    device = next(model.parameters()).device
    process, processes = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    with evaluating(model):
        for images, labels in every_batch(data, batch_size, workers, process, processes):
            logits = logits_of(model(images.to(device))).float()
            check_labels(labels, logits.shape[1])
            sums += _sums(logits, labels.to(device))
            if on_batch is not None:
                on_batch(len(labels))
    if accelerator is not None:
        sums = accelerator.reduce(sums)
    correct, loss, count = sums.tolist()
    return {"top1": correct / count, "loss": loss / count, "images": int(count)}


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    correct = (logits.argmax(dim=1) == labels).sum()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([correct.double(), loss.double(), correct.new_tensor(len(labels)).double()])
