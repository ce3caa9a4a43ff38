# SPDX-License-Identifier: Apache-2.0
"""The version: that of the installed distribution, which pyproject.toml alone states."""

import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.version import Version

import gohsp

ROOT = Path(__file__).parents[2]


@pytest.fixture
def read_again():
    """A function that runs gohsp/__init__.py again; afterwards it is run once more, as it was."""
    yield lambda: importlib.reload(gohsp).__version__
    importlib.reload(gohsp)


def test_the_version_is_that_of_pyproject():
    # With a regular expression, because Python 3.10 has no tomllib.
    stated = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert [gohsp.__version__] == stated


def test_what_is_not_installed_has_a_version_too(monkeypatch, read_again):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", missing)
        assert Version(read_again()).local == "source"
