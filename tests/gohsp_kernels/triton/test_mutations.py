# SPDX-License-Identifier: Apache-2.0
"""The list of faults fits the Triton kernels as they are. Running it takes minutes."""

from __future__ import annotations

import pytest

from tests.faults import ROOT

from .mutations import Mutation, _all


@pytest.mark.parametrize("mutation", _all(), ids=lambda mutation: f"{mutation.file}, {mutation.what}")
def test_each_fault_is_found_in_the_source_once(mutation: Mutation) -> None:
    source = ROOT / "gohsp_kernels" / "triton" / mutation.file
    assert source.read_text().count(mutation.old) == 1
