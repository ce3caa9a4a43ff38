# SPDX-License-Identifier: Apache-2.0
"""What the tests of the CUDA kernels share: running and checking a call in emulation."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.gohsp_kernels import cases

# Loading it registers the emulated kernels for tensors on the CPU.
checks: Any = pytest.importorskip("gohsp_kernels._checks_cuda", reason="the checks module is not built")

run = partial(cases.run, backend="cuda")
check = partial(cases.check, backend="cuda")
