# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: functions that are to be compared take turns, so that a slow minute of the machine hits all.

Timing one function a hundred times and then the next compares two moments of the machine as much as two functions.
Here each round times every function once, in a fresh random order, and a ratio is the median over the rounds of the
ratio within a round. Before each timed call the function settles: the call before it belonged to another function,
whose data fill the caches and whose idle threads may still spin, which nobody meets who runs one of them alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Seconds that one function took, a value a round; the rounds of all functions timed together correspond."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def p20(self) -> float:
        return self.percentile(20)

    @property
    def p80(self) -> float:
        return self.percentile(80)

    def percentile(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent))

    def ratio_to(self, other: Timing) -> float:
        """How many times as long as `other` this took: the median of the ratios within a round."""
        return float(np.median(np.divide(self.seconds, other.seconds)))


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 30,
    warmup: int = 3,
    settle: int = 1,
    seed: int = 0,
    after_round: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Time `functions` side by side; returns a Timing for each name, in the order given.

    Each function must return only when its work is done (on a GPU: synchronise inside it). Every one is called
    `warmup` times before the first round, and `settle` times, untimed, before each timed call. `after_round` is called
    outside the timed spans, to show progress.
    Raises ValueError where there is nothing to time.
    """
    if not functions:
        raise ValueError("functions must name at least one function to time; got none")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1; got {rounds}")
    for function in functions.values():
        for _ in range(warmup):
            function()

    order = list(functions)
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            function = functions[name]
            for _ in range(settle):
                function()
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
        if after_round is not None:
            after_round()
    return {name: Timing(tuple(values)) for name, values in seconds.items()}
