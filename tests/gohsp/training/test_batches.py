# SPDX-License-Identifier: Apache-2.0
"""Batches: which images, in which order, for which process."""

from __future__ import annotations

from typing import Any

import torch

from gohsp.training.batches import BatchKeys, every_batch


def keys(**changes: Any) -> list[list[tuple[int, int]]]:
    settings: dict[str, Any] = {"images": 10, "batch_size": 4, "first": 0, "last": 6, "seed": 0, "stage": 0}
    return list(BatchKeys(**{**settings, **changes}))


def test_each_epoch_takes_images_once_in_an_order_of_its_own() -> None:
    batches = keys()
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}, {0}, {1}, {1}, {2}, {2}]
    epochs = [[index for batch in batches[i : i + 2] for _, index in batch] for i in (0, 2, 4)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert keys(seed=1) != batches and keys(stage=1) != batches


def test_batches_can_begin_anywhere() -> None:
    assert keys(first=3) == keys()[3:]
    assert len(BatchKeys(10, 4, 3, 6, 0, 0)) == 3


def test_processes_share_the_batches_of_one() -> None:
    shares = [keys(process=process, processes=2) for process in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == keys()


def test_every_image_is_in_one_share() -> None:
    data = [(torch.tensor(float(i)), i) for i in range(7)]
    seen = [
        int(label) for p in range(3) for _, labels in every_batch(data, 2, process=p, processes=3) for label in labels
    ]
    assert sorted(seen) == list(range(7))
