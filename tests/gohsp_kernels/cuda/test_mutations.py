# SPDX-License-Identifier: Apache-2.0
"""The list of faults fits the kernels as they are, and names tests that there are. Running it takes minutes."""

from __future__ import annotations

import pytest

from tests.faults import check_fits, check_note

from .mutations import MUTATIONS, SOURCES, TESTS


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_fault_still_fits_the_source(name: str) -> None:
    check_fits(MUTATIONS[name], SOURCES, TESTS)


def test_the_note_lists_them_all() -> None:
    check_note("cuda.md", MUTATIONS)
