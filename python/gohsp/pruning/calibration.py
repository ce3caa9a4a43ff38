# SPDX-License-Identifier: Apache-2.0
"""Calibration images: from the batches of a user to the tokens that the first block reads.

The only thing kept per image is one residual stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.arguments import check_whole
from gohsp.models.base import OpenModel

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
    if max_images is not None:
        check_whole("max_images", max_images, 1)
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
