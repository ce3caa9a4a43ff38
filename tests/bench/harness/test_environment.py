# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gohsp_kernels as gk
from bench.harness import environment


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A repository of one commit that the benchmark takes for its own."""
    (tmp_path / "bench" / "results").mkdir(parents=True)
    for name in ("code.py", "bench/results/results.csv"):
        (tmp_path / name).write_text("1\n")
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    for command in (("init", "-q"), ("add", "-A"), (*identity, "commit", "-q", "-m", "first")):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    environment.commit.cache_clear()
    yield tmp_path
    environment.commit.cache_clear()


def test_commit_is_that_of_the_checkout(repository: Path) -> None:
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert environment.commit() == head[:12]


def test_changed_code_makes_the_commit_dirty(repository: Path) -> None:
    (repository / "code.py").write_text("2\n")
    assert environment.commit().endswith("-dirty")


def test_results_and_untracked_files_do_not_make_it_dirty(repository: Path) -> None:
    (repository / "bench/results/results.csv").write_text("2\n")
    (repository / "new.py").write_text("2\n")
    assert not environment.commit().endswith("-dirty")


def test_without_a_repository_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path / "nowhere")
    environment.commit.cache_clear()
    assert environment.commit() == "unknown"
    environment.commit.cache_clear()


def test_cpu_has_a_name_and_cores() -> None:
    assert environment.cpu_name().strip()
    assert environment.available_cores() >= 1


@pytest.mark.parametrize(
    ("ours", "theirs", "shown"),
    [
        ("avx2", "AVX2", "avx2"),
        ("avx2", "AVX512", "gohsp avx2, torch avx512"),
        ("neon", "DEFAULT", "gohsp neon, torch default"),
        (None, "AVX512", "avx512"),
    ],
)
def test_instruction_sets_show_where_they_differ(
    ours: str | None, theirs: str, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gk, "can_run", lambda backend: gk.Support(ours is not None))
    monkeypatch.setattr(environment.cpu, "capability", lambda: ours)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: theirs)
    assert environment.instruction_set() == shown


def test_versions_are_those_installed() -> None:
    assert environment.version_of("timm").count(".") >= 2
    assert environment.version_of("no-such-distribution") == "source"
