# SPDX-License-Identifier: Apache-2.0
"""Random models give the masked dense model's results in each instruction set that this machine has."""

from __future__ import annotations

import json

import pytest

from .scale import TIMES
from .test_native import python

checks = pytest.importorskip("gohsp_kernels._checks", reason="the checks module is not built")

SETS = checks.capabilities()
"""The best first, "scalar" last."""


@pytest.mark.slow
@pytest.mark.parametrize("capability", SETS if TIMES > 1 else sorted({SETS[0], SETS[-1]}))
def test_random_models(capability: str) -> None:
    count = 50 * TIMES if TIMES > 1 else 24
    seed = 100 + SETS.index(capability)
    run = python("-m", "tests.attack.numerics", str(seed), str(count), GOHSP_CPU_CAPABILITY=capability)
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    told = json.loads(run.stdout)
    faults = told.pop("faults")
    print(json.dumps({"seed": seed, **told}, indent=1))
    assert told["capability"] == capability and told["models"] == count
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:10]])
    assert told["checks"]["error"] >= 4 * count and told["checks"]["split batch"] >= 3 * count
