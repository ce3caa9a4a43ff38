# SPDX-License-Identifier: Apache-2.0
"""Settings of the whole test run."""

from __future__ import annotations

import os

import pytest

# Triton reads this when it is first imported, which timm does; so it must stand before everything. It lets the Triton
# kernels run on CPU tensors. Nothing else here uses Triton: on the CPU, torch.compile generates C++.
os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="compile all of Triton's kernels for all GPUs")
