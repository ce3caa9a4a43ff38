# SPDX-License-Identifier: Apache-2.0
"""Randomness as a function of where in a run one is, so that there is no generator's state to save or to lose.

What is drawn for an image depends on the seed, the stage, the epoch and the image alone; what a step draws (mixup,
dropout, drop path) on the seed, the stage, the step and the process. A run that goes on after it was killed, with any
number of workers, therefore draws what it would have drawn.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch

ORDER, IMAGE, STEP = range(3)  # what a key is for; it leads the key, so that no two uses draw the same numbers


@contextmanager
def seeded(*key: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's generators by a key, and put them back afterwards.

    Args:
        key: Non-negative numbers.
        device: A GPU whose generator is seeded as well.
    """
    words = [int(word) for word in np.random.SeedSequence(key).generate_state(3)]
    # The generators themselves: torch.manual_seed and fork_rng ask every device first, which takes its time.
    generators = [torch.default_generator]
    if device is not None and device.type == "cuda":
        generators.append(torch.cuda.default_generators[torch.cuda.current_device()])
    with ExitStack() as before:
        before.callback(random.setstate, random.getstate())
        before.callback(np.random.set_state, np.random.get_state())
        for generator in generators:
            before.callback(generator.set_state, generator.get_state())
            generator.manual_seed(words[2])
        random.seed(words[0])
        np.random.seed(words[1])
        yield
