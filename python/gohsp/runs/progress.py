# SPDX-License-Identifier: Apache-2.0
"""Steps of a long run: a progress bar while one lasts, a line with its time when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

Item = TypeVar("Item")


@dataclass
class Steps:
    """The steps done so far, with the seconds that each took."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """One step. Yields `advance`, which moves the bar on by one, or to `advance(done, total)`."""
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        counter = () if total is None else (MofNCompleteColumn(),)
        start = time.perf_counter()
        with Progress(*columns, *counter, console=self.console, transient=True) as progress:
            task = progress.add_task(title, total=total)

            def advance(done: int | None = None, total: int | None = None) -> None:
                if done is None:
                    progress.advance(task)
                else:
                    progress.update(task, completed=done, total=total)

            yield advance
        self.seconds[title] = time.perf_counter() - start
        self.console.print(f"[green]✓[/] {escape(title)} [dim]{self.seconds[title]:.1f} s[/]", highlight=False)


def each(items: Iterable[Item], advance: Callable[[], None]) -> Iterator[Item]:
    """The items in order; calls `advance` after the work on each."""
    for item in items:
        yield item
        advance()
