# SPDX-License-Identifier: Apache-2.0
"""Draws by key."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from gohsp.training.seeds import seeded


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_key_decides_the_draws_and_the_generators_come_back() -> None:
    with seeded(1, 2):
        first = draws()
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    with seeded(1, 2):
        assert draws() == first
    with seeded(2, 1):
        second = draws()
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert torch.equal(state[0], torch.get_rng_state()) and random.getstate() == state[2]
    assert np.random.get_state()[1].tolist() == state[1]  # type: ignore[index]


def test_generators_come_back_after_an_error() -> None:
    state = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(3):
        raise KeyError
    assert torch.equal(state, torch.get_rng_state())
