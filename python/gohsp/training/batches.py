# SPDX-License-Identifier: Apache-2.0
"""Batches whose content is known from the seed and their number alone: a run can start at any of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from gohsp.training.seeds import IMAGE, ORDER, seeded

Key = tuple[int, int]  # epoch, index


@dataclass(frozen=True)
class Seeded(Dataset[Any]):
    """A data set whose augmentation of an image depends on the seed, the stage, the epoch and the image alone.

    Attributes:
        data: Map-style data set of (image, label).
        seed: Of the run.
        stage: Number of the stage.
    """

    data: Any
    seed: int
    stage: int

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        epoch, index = key
        with seeded(IMAGE, self.seed, self.stage, epoch, index):
            image, label = self.data[index]
        return image, int(label)


@dataclass(frozen=True)
class BatchKeys:
    """Keys of the batches of one process, from the first step on to the last, epochs one after another.

    The images of a step are the same whatever the number of processes; each takes its part of them.

    Attributes:
        images: Size of the data set.
        batch_size: Images of a step, those of all processes together.
        first, last: Steps; ``last`` is not taken.
        seed, stage: Of the order in which the images come.
        process, processes: Which of how many this is.
    """

    images: int
    batch_size: int
    first: int
    last: int
    seed: int
    stage: int
    process: int = 0
    processes: int = 1

    def __iter__(self) -> Iterator[list[Key]]:
        per_epoch, share = self.images // self.batch_size, self.batch_size // self.processes
        shuffled: tuple[int, list[int]] = (-1, [])
        for step in range(self.first, self.last):
            epoch, position = divmod(step, per_epoch)
            if shuffled[0] != epoch:
                shuffled = epoch, self._order(epoch)
            start = position * self.batch_size + self.process * share
            yield [(epoch, index) for index in shuffled[1][start : start + share]]

    def __len__(self) -> int:
        return self.last - self.first

    def _order(self, epoch: int) -> list[int]:
        with seeded(ORDER, self.seed, self.stage, epoch):
            return torch.randperm(self.images).tolist()


def training_batches(data: Any, keys: BatchKeys, workers: int, pin: bool) -> DataLoader[Any]:
    """Return a loader of (images [B, C, height, width], labels int64 [B]) in the order of some keys.

    Args:
        data: Map-style data set of (image tensor, label).
        keys: Which images, in which order.
        workers: Processes that load images; 0 loads in this one.
        pin: Whether batches go to pinned memory, from which a GPU reads faster.
    """
    return DataLoader(
        Seeded(data, keys.seed, keys.stage),
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # of the workers' seeds, which would else come from the caller's generator
    )


def check_labels(labels: Tensor, classes: int) -> None:
    """Check labels before they index logits: what those say of it names no labels.

    Raises:
        ValueError: One of them is no class.
    """
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = labels[(labels < 0) | (labels >= classes)][0]
        raise ValueError(f"data: wanted labels from 0 to {classes - 1}, those of the model's classes; got {int(wrong)}")


def every_batch(data: Any, batch_size: int, workers: int = 0, process: int = 0, processes: int = 1) -> DataLoader[Any]:
    """Return a loader of this process's share of all images, in order, the last batch as small as it comes."""
    share = Subset(data, range(process, len(data), processes))
    return DataLoader(share, batch_size=batch_size, num_workers=workers, generator=torch.Generator())
