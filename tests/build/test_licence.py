# SPDX-License-Identifier: Apache-2.0
"""Every source file says which licence it has."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "gohsp_kernels", "python", "bench", "tests", "tools", "examples", "recipes", ".ci", ".github")
KINDS = {".py", ".h", ".cpp", ".cu", ".cuh", ".inl", ".def", ".cmake", ".yaml", ".yml", ".j2", ".sh", ""}


def test_every_source_file_says_its_licence() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    others = ("Makefile", "CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt", "CITATION.cff")
    files += [ROOT / name for name in others]
    sources = [p for p in files if p.suffix in KINDS and not any("cache" in part for part in p.parts)]
    assert len(sources) > 200
    assert not [str(p.relative_to(ROOT)) for p in sources if "SPDX-License-Identifier" not in p.read_text()[:200]]
