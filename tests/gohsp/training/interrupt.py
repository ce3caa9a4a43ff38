# SPDX-License-Identifier: Apache-2.0
"""Interrupt runs and finish them: ``interrupt.py FOLDER``. A process of its own, because it forks: no threads here."""

from __future__ import annotations

import json
import random
import sys
from functools import partial
from pathlib import Path

import digits_run as runs
import torch

MOMENTS = ("half written", "before the rename", "after the rename")
KILLS = 4

torch.set_num_threads(1)
root = Path(sys.argv[1])


def fresh(name: str) -> Path:
    (root / name).mkdir()
    return root / name


def finish(name: str) -> None:
    assert runs.in_child(partial(runs.noisy_run, root / name))


whole = fresh("whole")
assert runs.in_child(partial(runs.counted_run, whole))
calls = int((whole / runs.CALLS).read_text())

random_moments = fresh("random moments")
killed = 0
for _ in range(KILLS):
    moment = int(random.uniform(0.1, 0.6) * calls)
    killed += not runs.in_child(partial(runs.counted_run, random_moments, moment))
finish("random moments")

for moment in MOMENTS:
    folder = fresh(moment)
    # Of 15 checkpoints, one a step, the 4th is one of ADMM; the 8th after going on is one of fine-tuning.
    for number in (4, 8):
        assert not runs.in_child(partial(runs.killed_while_writing, folder, moment, number))
    finish(moment)

print(json.dumps({"killed": killed}))
