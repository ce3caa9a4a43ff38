# SPDX-License-Identifier: Apache-2.0
"""The list of faults fits the kernels as they are, and names tests that there are. Running it takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from .mutations import MUTATIONS, SOURCES


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_fault_still_fits_the_source(name: str) -> None:
    mutation = MUTATIONS[name]
    assert (SOURCES / mutation.file).read_text().count(mutation.old) == 1
    assert mutation.old != mutation.new
    assert f"def {mutation.test}(" in (Path(__file__).parent / "test_numerics.py").read_text()


def test_the_note_lists_them_all() -> None:
    note = (Path(__file__).parents[2] / "docs" / "cuda.md").read_text()
    assert all(name in note for name in MUTATIONS)
