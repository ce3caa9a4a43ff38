# SPDX-License-Identifier: Apache-2.0
"""Hook of mkdocs: the pages of the root are on the site too, and links mean there what they mean in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
PAGES |= {"CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"(\]\()([^)\s#]+)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links to where a file stands on the site; what is not on it is left as text."""
    folder = ROOT if page.file.src_uri in PAGES.values() else ROOT / "docs"

    def moved(match: re.Match[str]) -> str:
        target = match[2]
        if "://" in target or target in PAGES.values():
            return match[0]
        path = (folder / target).resolve().relative_to(ROOT).as_posix()
        return match[1] + PAGES.get(path, path.removeprefix("docs/"))

    markdown = LINK.sub(moved, markdown)
    return re.sub(r"\[([^\]]+)\]\(((?:recipes|examples)/[^)]*)\)", r"`\2`", markdown)
