# SPDX-License-Identifier: Apache-2.0
"""What is added to scores: what it means, and what is said of one that does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gohsp_kernels as gk
from gohsp_kernels import dispatch
from gohsp_kernels.testing import Maker, error

BACKENDS = [name for name in ("reference", "cpu") if dispatch.can_run(name)]


def attend(qkv: Tensor, **more: Any) -> Tensor:
    return gk.ragged_attention(qkv, (4, 0), (8, 3), 0.25, **more)


def by_hand(qkv: Tensor, table: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """The two heads of :func:`attend`, image by image, in float64."""
    images = []
    for number, image in enumerate(qkv.double()):
        q, k, first, second = image.split((4, 4, 8, 3), dim=-1)
        outputs = []
        for head, (scores, values) in enumerate(((q @ k.T * 0.25, first), (torch.zeros(len(q), len(q)), second))):
            shares = (scores + table.double()[:, head][index] + mask[number % len(mask)].double()).softmax(-1)
            outputs.append(shares @ values)
        images.append(torch.cat(outputs, dim=-1))
    return torch.stack(images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_are_added_to_scaled_scores(backend: str) -> None:
    maker = Maker(3)
    qkv, bias = maker.normal(6, 33, 4 + 4 + 11), maker.bias(2, 33, 3)
    wanted = by_hand(qkv, *bias.values())
    with torch.no_grad():
        assert error(attend(qkv, backend=backend, **bias), wanted) < 2e-6
        assert error(attend(qkv, backend=backend, num_queries=5, **bias), wanted[:, :5]) < 2e-6


def test_gradients_reach_the_table() -> None:
    maker = Maker(4)
    bias = maker.bias(2, 5, 2)
    qkv, table = maker.normal(4, 5, 19).double().requires_grad_(), bias.pop("bias_table").double().requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv, table: attend(qkv, bias_table=table, **bias), (qkv, table))


INDEX = torch.zeros(5, 5, dtype=torch.int64)
TABLE = torch.zeros(9, 2)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a table alone": ({"bias_table": TABLE}, r"bias_index: wanted a tensor beside bias_table; got None"),
    "an index alone": ({"bias_index": INDEX}, r"bias_table: wanted a tensor beside bias_index; got None"),
    "a table of other heads": (
        {"bias_table": torch.zeros(9, 3), "bias_index": INDEX},
        r"bias_table: wanted shape \[9, 2\]; got shape \[9, 3\]",
    ),
    "an index past the table": (
        {"bias_table": TABLE, "bias_index": INDEX + 9},
        "bias_index: wanted rows of a bias_table of 9; got 9 to 9",
    ),
    "a negative index": (
        {"bias_table": TABLE, "bias_index": INDEX - 1},
        "bias_index: wanted rows of a bias_table of 9; got -1 to -1",
    ),
    "an index of other tokens": (
        {"bias_table": TABLE, "bias_index": INDEX[:4, :4]},
        r"bias_index: wanted those of 5 tokens, as x has; got shape \[4, 4\]",
    ),
    "an index that is no square": (
        {"bias_table": TABLE, "bias_index": INDEX[:4]},
        r"bias_index: wanted int64 \[tokens, tokens\]; got torch.int64 \[4, 5\]",
    ),
    "an index of 32 bits": (
        {"bias_table": TABLE, "bias_index": INDEX.int()},
        r"bias_index: wanted int64 \[tokens, tokens\]; got torch.int32 \[5, 5\]",
    ),
    "a mask of other tokens": (
        {"bias_mask": torch.zeros(2, 4, 4)},
        r"bias_mask: wanted those of 5 tokens, as x has; got shape \[2, 4, 4\]",
    ),
    "groups that do not divide the images": (
        {"bias_mask": torch.zeros(3, 5, 5)},
        r"bias_mask: wanted a number of groups that divides the 4 images; got shape \[3, 5, 5\]",
    ),
    "no group": (
        {"bias_mask": torch.zeros(0, 5, 5)},
        r"bias_mask: wanted shape \[1, 5, 5\]; got shape \[0, 5, 5\]",
    ),
    "a mask of bools": (
        {"bias_mask": torch.zeros(1, 5, 5, dtype=torch.bool)},
        "bias_mask: wanted a tensor of floats; got torch.bool",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        attend(torch.zeros(4, 5, 19), **arguments)


def test_an_index_that_is_no_tensor_is_named() -> None:
    with pytest.raises(TypeError, match="bias_index: wanted an int64 tensor; got list"):
        attend(torch.zeros(4, 5, 19), bias_table=TABLE, bias_index=[[0]])
