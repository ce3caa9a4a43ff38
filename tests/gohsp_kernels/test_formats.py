# SPDX-License-Identifier: Apache-2.0
"""A weight format from outside: the page about it in docs/extending.md, done as it is printed in a copy of the tree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.faults import ROOT

from .mutations import Build

RUN = """
import torch
import gohsp_kernels as gk
from gohsp_kernels import chain, cpu
from gohsp_kernels.formats import FORMATS
from gohsp_kernels.testing import Maker, error
from tests.gohsp_kernels.test_chain import bound

maker, features = Maker(1), 40
attention = maker.attention_sublayer(0, 0, features, [8, 3], [8, 5], 17, 20)
calls = [attention, maker.mlp_sublayer((0,), features, 31, 9, 11)]
x = maker.normal(2, 13, features)
frozen = gk.SublayerChain([bound(call) for call in calls]).frozen(features, weights="w16")
truth = x.double()
for call in calls:
    truth = FORMATS["w16"].reference(chain.descriptor(bound(call)), truth)
words = sum(sublayer.panels.numel() for sublayer in frozen.sublayers)
whole = sum(cpu.packed(chain.descriptor(bound(call)), features).panels.numel() for call in calls)
print(error(frozen(x), truth), words / whole)
"""


def printed(page: str, language: str) -> str:
    """The first block of code in a language on a part of the page."""
    found = re.search(rf"^( *)```{language}\n(.*?)^ *```$", page, re.M | re.S)
    assert found is not None
    return textwrap.dedent(found[2])


@pytest.mark.slow
def test_the_page_about_weight_formats_is_enough(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "extending.md").read_text().partition("## A weight format")[2].partition("\n## ")[0]
    line, include = re.search(r"`(X\(w16, .*\))`", page), re.search(r"`(#include .*)`", page)
    assert line is not None and include is not None

    def extend(folder: Path) -> None:
        def edit(file: str, old: str, new: str) -> None:
            text = (folder / file).read_text()
            assert text.count(old) == 1
            (folder / file).write_text(text.replace(old, new))

        (folder / "csrc" / "cpu" / "formats" / "w16.h").write_text(printed(page, "cpp"))
        edit("csrc/cpu/product.h", '#include "formats/int8.h"\n', f'#include "formats/int8.h"\n{include[1]}\n')
        edit("csrc/common/wire.h", "X(int8, Int8, Char, true)", f"X(int8, Int8, Char, true) {line[1]}")
        ours = textwrap.indent(printed(page, "python").rstrip() + ",\n", " " * 8)
        edit("gohsp_kernels/formats.py", "    for f in (\n", f"    for f in (\n{ours}")

    Build(tmp_path, extend)
    path = f"{tmp_path}:{tmp_path / 'python'}"
    environment = {**os.environ, "PYTHONPATH": path, "GOHSP_CPU_CAPABILITY": "scalar"}
    run = subprocess.run([sys.executable, "-c", RUN], cwd=tmp_path, env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-3000:]
    error, size = map(float, run.stdout.split())
    assert error < 1e-6
    assert 0.5 < size < 0.6
