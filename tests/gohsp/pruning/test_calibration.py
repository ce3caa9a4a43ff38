# SPDX-License-Identifier: Apache-2.0
"""Images of a user, and the tokens that the first block reads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import gohsp
from gohsp.models.registry import open_model
from gohsp.pruning.calibration import all_threads, background, each_chunk, embed, one_thread, read_images, through_


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_images_take_the_dtype_of_the_model() -> None:
    model = torch.nn.Linear(1, 1).to(torch.bfloat16)
    (got,) = read_images([[torch.ones(2, 3, 4, 4), "labels"]], model)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches: wanted at least one image, got none"),
        ([torch.zeros(0, 3, 4, 4)], ValueError, "batches: wanted at least one image, got none"),
        ([torch.zeros(3, 4, 4)], ValueError, r"batches: wanted images \[B, C, height, width\], got shape \(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), TypeError, "batches: wanted an iterable of batches of images, got Tensor"),
        (7, TypeError, "batches: wanted an iterable of batches of images, got int"),
        (
            [torch.zeros(1, 3, 4, 4, dtype=torch.uint8)],
            ValueError,
            r"batches: wanted normalised images of floating point, got torch.uint8; timm\.data\.create_transform",
        ),
        (
            [torch.zeros(2, 3, 4, 4), torch.tensor([0.0, torch.nan, torch.inf]).view(3, 1, 1, 1).expand(3, 3, 4, 4)],
            ValueError,
            "batches: wanted finite pixels; image 3, counted from 0, has others",
        ),
        ([{"images": 1}], TypeError, r"batches: wanted tensors or \(images, ...\) sequences, got dict"),
    ],
)
def test_wrong_batches_are_refused(batches, error, message: str) -> None:
    with pytest.raises(error, match=message):
        list(read_images(batches, torch.nn.Linear(1, 1)))


def test_images_that_nobody_normalised_are_told_of_once() -> None:
    with pytest.warns(UserWarning, match="batches: wanted normalised images; these have pixels of 255") as told:
        list(read_images([torch.full((2, 3, 4, 4), 255.0)] * 3, torch.nn.Linear(1, 1)))
    assert len(told) == 1


def test_images_of_two_sizes_are_refused(make_model, images) -> None:
    model = make_model(dynamic_img_size=True)
    with pytest.raises(ValueError, match="batches: wanted images of one size, got"):
        embed(open_model(model), [images(1, 48), images(1, 32)])


@pytest.mark.usefixtures("three_threads")
def test_chunks_are_at_work_on_threads_of_their_own_and_come_in_order() -> None:
    stream, seen = torch.arange(100.0)[:, None, None], set()

    def work(part: Tensor, same: Tensor) -> tuple[Tensor, int, bool]:
        seen.add(threading.get_ident())
        time.sleep(0.02 if part[0] == 0 else 0.005)  # the first is the last to end
        assert torch.equal(part, same)
        return part, torch.get_num_threads(), torch.is_grad_enabled()

    found: list[tuple[Tensor, int, bool]] = []
    with torch.no_grad():
        each_chunk(work, found.append, stream, stream.clone())
    assert torch.equal(torch.cat([part for part, _, _ in found]), stream)
    assert {(threads, gradients) for _, threads, gradients in found} == {(1, False)}
    assert 1 < len(seen) <= 3 and threading.get_ident() not in seen
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_an_error_in_a_chunk_is_the_callers_and_threads_are_as_before() -> None:
    def work(part: Tensor) -> Tensor:
        if 50 in part:
            raise RuntimeError("of the chunk")
        return part

    with pytest.raises(RuntimeError, match="of the chunk"):
        each_chunk(work, lambda _: None, torch.arange(100.0))
    with pytest.raises(ZeroDivisionError):
        each_chunk(lambda part: part, lambda _: 1 / 0, torch.arange(100.0))
    with pytest.raises(RuntimeError, match="behind"), one_thread(), background() as do:
        assert torch.get_num_threads() == 1
        with all_threads():
            assert torch.get_num_threads() == 3
        do(lambda: work(torch.tensor([50]))).exception()
        raise RuntimeError("behind")
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("three_threads")
def test_a_stream_of_inference_mode_is_changed_in_place() -> None:
    with torch.inference_mode():
        stream = torch.ones(40, 2, 3)
        through_(lambda part: part + 1, stream)
        assert torch.equal(stream, torch.full((40, 2, 3), 2.0))


def test_pruning_gives_the_same_bits_on_any_number_of_threads(make_model, images, three_threads: None) -> None:
    model = make_model(img_size=32, embed_dim=48, depth=2, num_heads=3).float()
    results = []
    for threads in (3, 1):
        torch.set_num_threads(threads)
        results.append(
            gohsp.prune(model, [images(40, 32).float()], {"params": 0.6}, groups=("heads", "hidden", "qk", "v"))
        )
    assert results[0].mask == results[1].mask
    weights = (result.model.state_dict() for result in results)
    assert all(torch.equal(*pair) for pair in zip(*(state.values() for state in weights), strict=True))
