# SPDX-License-Identifier: Apache-2.0
"""A clock for tests of what is timed: it goes on when it is told to, so no test depends on how busy the machine is."""

from __future__ import annotations


class Clock:
    """Stands where a module has :mod:`time`. Give it seconds that are sums of powers of two, and nothing is rounded."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def go_on(self, seconds: float) -> None:
        self.now += seconds
