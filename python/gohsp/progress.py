# SPDX-License-Identifier: Apache-2.0
"""Bars for work that takes seconds, with the time that is left: on a terminal, one at a time, and nowhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")

_showing: ContextVar[bool] = ContextVar("_showing", default=False)


@contextmanager
def bar(title: str, total: int | None = None, console: Console | None = None) -> Iterator[Callable[..., None]]:
    """Show a bar until the block ends.

    Args:
        title: What is done.
        total: Steps in all, where that is known beforehand.
        console: Where; stderr by default. Nothing is shown where it is no terminal.

    Yields:
        A function that moves the bar on by one or, called with (steps done, steps in all), to there. Further words are
        shown behind the bar.
    """
    from rich import progress as rich
    from rich.console import Console

    title_column, note = (rich.TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[note]}"))
    columns = (rich.SpinnerColumn(), title_column, rich.BarColumn(), rich.MofNCompleteColumn())
    times = (rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn(), note)
    console = console or Console(stderr=True)
    before = _showing.set(True)
    try:
        with rich.Progress(*columns, *times, console=console, transient=True) as progress:
            task = progress.add_task(title, total=total, note="")

            def advance(done: int | None = None, total: int | None = None, note: str = "") -> None:
                if done is None:
                    progress.advance(task)
                else:
                    progress.update(task, completed=done, total=total, note=note)

            yield advance
    finally:
        _showing.reset(before)


@contextmanager
def watching(title: str, given: Callable[..., object] | None, total: int | None = None) -> Iterator[Callable[..., Any]]:
    """Give what to call with (steps done, steps in all): the user's function or else, where somebody looks, a bar."""
    if given is None and _is_looked_at():
        with bar(title, total) as advance:
            yield advance
    else:
        yield given or (lambda *_: None)


@contextmanager
def ticking(title: str, given: Callable[[int, int], object] | None, total: int) -> Iterator[Callable[[], None]]:
    """Give what to call after each of some steps; see :func:`watching`."""
    done = 0
    with watching(title, given, total) as told:

        def tick() -> None:
            nonlocal done
            done += 1
            told(done, total)

        yield tick


def each(items: Iterable[Item], advance: Callable[[], Any]) -> Iterator[Item]:
    """Give the items in order; call ``advance`` after the work on each."""
    for item in items:
        yield item
        advance()


@contextmanager
def training_bar(
    given: Callable[[str, int, int, float], object] | None,
) -> Iterator[Callable[[str, int, int, float], object] | None]:
    """Give what to call with (stage, steps done, steps in all, loss), as :func:`watching` does, or None."""
    if given is not None or not _is_looked_at():
        yield given
        return
    with bar("train") as advance:
        yield lambda stage, step, total, loss: advance(step, total, f"{stage}, loss {loss:.3f}")


def _is_looked_at() -> bool:
    """Whether stderr is a terminal without a bar, and this the first of the processes of a run."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return terminal and not _showing.get() and os.environ.get("RANK", "0") == "0"
