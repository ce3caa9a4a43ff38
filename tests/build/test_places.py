# SPDX-License-Identifier: Apache-2.0
"""The native libraries do not tell where they were built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gohsp_kernels
from gohsp_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = sorted(Path(gohsp_kernels.__file__).parent.glob("*.so"))


def test_a_message_names_the_source_file_by_its_place_in_the_tree() -> None:
    if not (library := _native.load()):
        pytest.skip(library.reason)
    with pytest.raises(RuntimeError, match="columns: wanted ascending ones") as error:
        torch.ops.gohsp_kernels.cpu_plan(torch.tensor([3, 1]), 16, False)
    assert f"{ROOT}/" not in str(error.value)
    assert " csrc/torch/cpu_ops.cpp:" in str(error.value)


@pytest.mark.parametrize("library", LIBRARIES, ids=[path.name.partition(".")[0] for path in LIBRARIES])
def test_a_library_holds_no_path_of_its_builder(library: Path) -> None:
    held = library.read_bytes()
    for folder in (ROOT, Path(torch.__file__).parent / "include"):
        assert f"{folder}/".encode() not in held
