# SPDX-License-Identifier: Apache-2.0
"""Whoever sits at a terminal sees how far long calls are and how long they will take; nobody else sees anything."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gohsp
from gohsp.progress import bar
from gohsp.pruning.axes import principal_axes
from gohsp.recipe import Fit

FIT = Fit(epochs=1, batch_size=2, mixup=0, cutmix=0, warmup_epochs=0)


class Terminal(io.StringIO):
    """What stderr is for somebody who looks."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def model(make_model: Callable[..., nn.Module]) -> nn.Module:
    return make_model(depth=2, img_size=32, embed_dim=32, num_heads=2).float()


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """A function that puts a terminal in the place of stderr; pytest puts its own there before each test."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def put() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        return terminal

    return put


def train(model: nn.Module, batches: list[torch.Tensor]) -> None:
    mask = gohsp.ModelMask.full(model)
    gohsp.train(gohsp.compress(model, mask), [(image, 0) for image in batches[0]], fit=FIT)


CALLS: dict[str, Callable[[nn.Module, list[torch.Tensor]], Any]] = {
    "prune": lambda model, batches: gohsp.prune(model, batches, {"params": 0.7}),
    "rank the heads": gohsp.rank_heads,
    "turn the heads": principal_axes,
    "synthesise": lambda model, _: gohsp.synthesise(model, 2, steps=2),
    "measure": lambda model, _: gohsp.LatencyTable.measure(model, rounds=2),
    "train": train,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_terminal_shows_a_bar_that_goes_away(name: str, model: nn.Module, look: Callable[[], Terminal]) -> None:
    stderr = look()
    CALLS[name](model, [torch.randn(4, 3, 32, 32)] * 2)
    shown = stderr.getvalue()
    assert name in shown and " left " in shown
    assert shown.endswith("\x1b[2K"), "the line is not cleared"


@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_written_where_nobody_looks(name: str, model: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    CALLS[name](model, [torch.randn(4, 3, 32, 32)] * 2)
    assert capfd.readouterr() == ("", "")


def test_one_bar_at_a_time_and_none_where_the_caller_is_told(model: nn.Module, look: Callable[[], Terminal]) -> None:
    stderr, batches, told = look(), [torch.randn(4, 3, 32, 32)], []
    gohsp.prune(model, batches, {"params": 0.7}, on_progress=lambda *step: told.append(step))
    assert told and stderr.getvalue() == ""
    with bar("mine"):
        gohsp.rank_heads(model, batches)
    assert "mine" in stderr.getvalue() and "rank the heads" not in stderr.getvalue()


def test_of_several_processes_the_first_shows_it(
    model: nn.Module, look: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = look()
    monkeypatch.setenv("RANK", "1")
    gohsp.rank_heads(model, [torch.randn(4, 3, 32, 32)])
    assert stderr.getvalue() == ""


def test_batches_without_a_length_are_counted_all_the_same(model: nn.Module, look: Callable[[], Terminal]) -> None:
    class Endless(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([torch.randn(3, 32, 32)] * 3)

    stderr = look()
    gohsp.rank_heads(model, torch.utils.data.DataLoader(Endless(), batch_size=1))
    assert "/?" in stderr.getvalue()
