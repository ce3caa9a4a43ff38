# SPDX-License-Identifier: Apache-2.0
"""Images of a user, and the tokens that the first block reads."""

from __future__ import annotations

import pytest
import torch

from gohsp.models.registry import open_model
from gohsp.pruning.calibration import embed, read_images


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
        ([{"images": 1}], TypeError, r"batches: wanted tensors or \(images, ...\) sequences, got dict"),
    ],
)
def test_wrong_batches_are_refused(batches, error, message: str) -> None:
    with pytest.raises(error, match=message):
        list(read_images(batches, torch.nn.Linear(1, 1)))


def test_images_of_two_sizes_are_refused(make_model, images) -> None:
    model = make_model(dynamic_img_size=True)
    with pytest.raises(ValueError, match="batches: wanted images of one size, got"):
        embed(open_model(model), [images(1, 48), images(1, 32)])
