# SPDX-License-Identifier: Apache-2.0
"""Models between threads, forks, workers, garbage and the end of the interpreter: right results, nothing hangs."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gohsp_kernels import _native

from .scale import TIMES

ROOT = Path(__file__).parents[2]
LIMIT = 300 + 60 * TIMES  # seconds

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not _native.load(), reason=_native.load().reason)]


def test_threads_forks_workers_garbage_and_the_end() -> None:
    seed = random.SystemRandom().randrange(2**32)
    command = [sys.executable, "-m", "tests.attack.threads", str(seed), str(TIMES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-4000:]}"
    for trial, calls in json.loads(done.stdout).items():
        print(f"{trial}: tried {calls}, held {calls}, failed 0, seed {seed}")
