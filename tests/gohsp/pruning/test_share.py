# SPDX-License-Identifier: Apache-2.0
"""Processes that share the images find what one process with all of them finds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gohsp
from gohsp.pruning.share import Share

from . import shared_run as runs

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[3]


@pytest.mark.slow
def test_two_processes_over_gloo_find_what_one_finds(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "python")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [*launch, str(HERE / "shared_run.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("shared: the processes found different masks") == 2
    for name, options in runs.WAYS.items():
        alone = runs.run([*runs.share(0), *runs.share(1)], **options)
        for process in range(2):
            together = load_file(tmp_path / f"{name}-{process}.safetensors")
            assert together.keys() == alone.keys()
            for key, value in alone.items():
                torch.testing.assert_close(together[key], value, rtol=1e-7, atol=1e-9, msg=f"{name}: {key}")


def test_shares_of_every_so_many_images_are_those_of_all() -> None:
    numbers, sizes = torch.arange(50), (20, 3, 0, 27)
    for step in (1, 2, 7, 30):
        taken, first = [], 0
        for size in sizes:
            taken.append(numbers[first : first + size][Share(first, size, 50, True).every(step)])
            first += size
        assert torch.equal(torch.cat(taken), numbers[::step])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared": True}, "shared: wanted a process group"),
        ({"shared": 1}, "shared: wanted True or False, got int"),
    ],
)
def test_who_is_alone_cannot_share(options: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        gohsp.prune(runs.model(), [runs.images()], **options)  # type: ignore[arg-type]
