# SPDX-License-Identifier: Apache-2.0
"""The site of the documentation builds without a warning, and its pages name what there is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gohsp
import gohsp_kernels

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "WARNING" not in done.stderr
    pages = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "guide.html", "faq.html", "api.html", "changelog.html"} <= pages
    assert "unlabelled images" in (tmp_path / "site" / "api.html").read_text(encoding="utf-8")


def test_the_page_of_the_api_has_all_that_is_exported() -> None:
    named = set(re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE))
    left_out = {"gohsp_kernels.ACTIVATIONS", "gohsp.GraphedModel"}  # a table of names; there as gohsp_kernels' own
    for module in (gohsp, gohsp_kernels):
        assert {f"{module.__name__}.{name}" for name in module.__all__} - left_out <= named
