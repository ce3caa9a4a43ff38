# SPDX-License-Identifier: Apache-2.0
"""Calibration images: from the batches of a user to the tokens that the first block reads.

The only thing kept per image is one residual stream.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from gohsp.arguments import check_whole
from gohsp.models.base import Attention, Mlp, OpenModel

CHUNK = 16  # images that go through a block at once: small enough for the caches, large enough for the GEMMs

LARGEST_PIXEL = 20  # normalised ones stay below 3 with the usual deviations
NORMALISE = "timm.data.create_transform(**timm.data.resolve_model_data_config(model)) makes a model's own images"

T = TypeVar("T")


def read_images(batches: Iterable[Any], model: nn.Module, max_images: int | None = None) -> Iterator[Tensor]:
    """Give the images of some batches, on the device and in the dtype of a model.

    Args:
        batches: Tensors [B, C, height, width] or sequences that start with one, such as (images, labels).
        model: Where the images go.
        max_images: Stop after so many images; None takes all.

    Raises:
        TypeError: ``batches`` cannot be iterated over, or holds something else.
        ValueError: A tensor is not four-dimensional, not of floating point or has pixels that are not finite,
            ``max_images`` is not positive, or there is no image.
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
        _check_pixels(images, seen)
        images = images[: None if max_images is None else max_images - seen]
        seen += len(images)
        if len(images):
            yield images.to(like)
        if seen == max_images:
            return
    if seen == 0:
        raise ValueError("batches: wanted at least one image, got none")


def _check_pixels(images: Tensor, before: int) -> None:
    if not images.is_floating_point():
        raise ValueError(f"batches: wanted normalised images of floating point, got {images.dtype}; {NORMALISE}")
    largest = images.flatten(1).abs().amax(dim=1) if images.numel() else images.new_zeros(1)
    if len(bad := (~largest.isfinite()).nonzero()):
        raise ValueError(f"batches: wanted finite pixels; image {before + int(bad[0])}, counted from 0, has others")
    if before == 0 and largest.max() > LARGEST_PIXEL:
        text = f"batches: wanted normalised images; these have pixels of {float(largest.max()):.0f}. {NORMALISE}"
        warnings.warn(text, stacklevel=2)


def _first(batch: Any) -> Tensor:
    if isinstance(batch, Sequence) and batch and isinstance(batch[0], Tensor):
        return batch[0]
    raise TypeError(f"batches: wanted tensors or (images, ...) sequences, got {type(batch).__name__}")


def embed(opened: OpenModel, batches: Iterable[Any], max_images: int | None = None) -> tuple[Tensor, tuple[int, int]]:
    """Return the tokens that the first block reads, [images, N, D], and the (height, width) of the images.

    Raises:
        TypeError, ValueError: See :func:`read_images`, or the images are not all of one size.
    """
    parts: list[Tensor] = []
    sizes = set()
    for images in read_images(batches, opened.model, max_images):
        sizes.add((images.shape[2], images.shape[3]))
        if len(sizes) > 1:
            raise ValueError(f"batches: wanted images of one size, got {sorted(sizes)}")
        each_chunk(opened.embed, parts.append, images)
    return torch.cat(parts), sizes.pop()


def each_chunk(work: Callable[..., T], take: Callable[[T], object], *streams: Tensor) -> None:
    """Hand what a function makes of the chunks of some streams [images, ...] to another one, in their order.

    On a CPU several chunks are at work at a time, each on one thread. Within an operation threads would wait for the
    slowest at its end, thousands of times, and beside another process most of the time. The results are those of one
    thread, whatever the number of threads.

    Args:
        work: Called with a chunk of each stream, from several threads.
        take: Called with what ``work`` returned, from this thread.
        streams: Of equally many images.
    """
    chunks = zip(*(stream.split(CHUNK) for stream in streams if len(stream)), strict=True)
    threads = (_threads.get() or torch.get_num_threads()) if streams[0].device.type == "cpu" else 1
    with one_thread() if streams[0].device.type == "cpu" else nullcontext():
        if threads == 1 or len(streams[0]) <= CHUNK:
            for chunk in chunks:
                take(work(*chunk))
            return
        alone, waiting = _on_a_thread(work), deque[Future[T]]()
        with ThreadPoolExecutor(threads) as pool:
            try:
                for chunk in chunks:
                    waiting.append(pool.submit(alone, *chunk))
                    if len(waiting) > threads:
                        take(waiting.popleft().result())
                while waiting:
                    take(waiting.popleft().result())
            finally:
                pool.shutdown(cancel_futures=True)


def entered(layer: Attention | Mlp, stream: Tensor) -> Tensor:
    """Return a stream as a sublayer reads it, [images, N, D]: the same but where the model has something between."""
    if not isinstance(layer, Attention) or layer.transition is None:
        return stream
    parts: list[Tensor] = []
    each_chunk(layer.transition, parts.append, stream)
    return torch.cat(parts)


def through_(function: Callable[[Tensor], Tensor], stream: Tensor) -> None:
    """Send a stream [images, N, D] through a function of chunks, in place."""
    each_chunk(lambda chunk: chunk.copy_(function(chunk)), lambda _: None, stream)


@contextmanager
def background() -> Iterator[Callable[[Callable[[], T]], Future[T]]]:
    """Give a function that has work done on one thread beside this one, in the order in which it is handed over."""
    with ThreadPoolExecutor(1) as pool:
        try:
            yield lambda work: pool.submit(_on_a_thread(work))
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run every operation on the thread that calls it: the work within is shared out by chunks, or is small."""
    before = torch.get_num_threads()
    token = _threads.set(_threads.get() or before)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        _threads.reset(token)


@contextmanager
def all_threads() -> Iterator[None]:
    """Undo :func:`one_thread` for work that is not shared out by chunks."""
    before = torch.get_num_threads()
    torch.set_num_threads(_threads.get() or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_threads: ContextVar[int | None] = ContextVar("_threads", default=None)
"""How many threads there are within :func:`one_thread`."""


def _on_a_thread(work: Callable[..., T]) -> Callable[..., T]:
    """Return a function for a thread of a pool, which has modes of its own."""
    gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def alone(*arguments: Any) -> T:
        torch.set_num_threads(1)  # of this thread
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return work(*arguments)

    return alone
