# SPDX-License-Identifier: Apache-2.0
"""Steps of a long run: a progress bar while one lasts, a line with its time when it is over."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape

from gohsp.progress import bar


@dataclass
class Steps:
    """The steps done so far, with the seconds that each took."""

    console: Console
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
        """One step. Yields `advance`, which moves the bar on by one, or to `advance(done, total)`."""
        start = time.perf_counter()
        with bar(title, total, self.console) as advance:
            yield advance
        self.seconds[title] = time.perf_counter() - start
        self.console.print(f"[green]✓[/] {escape(title)} [dim]{self.seconds[title]:.1f} s[/]", highlight=False)
