# SPDX-License-Identifier: Apache-2.0
"""Every command that writes, killed at any moment: called again, it ends with what it would have ended with."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import matplotlib.figure  # noqa: F401  forks shall not import it one by one
import pytest
import sklearn.datasets  # noqa: F401
import yaml
from accelerate.state import AcceleratorState

from .kills import POINTS, contents, fork, in_child, killed_at, status_of
from .scale import TIMES
from .work import PIECES, RECIPE, Stage, command

QUICK = ("prune over another", "train by ADMM", "report", "bench results", "mask and latency")

pytestmark = pytest.mark.slow


def kill(stage: Stage, draws: random.Random) -> tuple[str, bool]:
    """Kill the work at a moment, or at a call that writes; return when, and whether there was something to kill."""
    points = [point for point in POINTS if stage.calls[point]]
    if draws.random() < 0.5:
        moment = draws.random() * stage.takes
        return f"after {moment:.3f} s", in_child(stage.piece.work, kill_after=moment)
    point = draws.choice(points)
    number = draws.randrange(2, 2 * stage.calls[point] + 2)
    return f"at {point} {number}", in_child(partial(killed_at, point, number, stage.piece.work))


@pytest.mark.parametrize("name", QUICK if TIMES == 1 else PIECES)
def test_what_is_killed_ends_the_same_when_it_is_called_again(tmp_path: Path, name: str, seed: int) -> None:
    draws, killed, stage = random.Random(seed), 0, Stage(tmp_path, PIECES[name])
    for number in range(TIMES):
        stage.set()
        when, died = kill(stage, draws)
        killed += died
        assert not in_child(stage.piece.work)
        assert contents(stage.here) == stage.wanted, f"seed {seed}, kill {number} {when}"
    print(f"{name}: tried {TIMES}, killed {killed}, held {TIMES}, failed 0, seed {seed}")


@pytest.mark.parametrize("name", ["prune over another", *(["train by ADMM"] if TIMES > 1 else [])])
def test_what_is_asked_to_end_ends_the_same_when_it_is_called_again(tmp_path: Path, name: str, seed: int) -> None:
    draws, stage = random.Random(seed), Stage(tmp_path, PIECES[name])
    for number in range(TIMES):
        for sent in (signal.SIGTERM, signal.SIGINT):
            stage.set()
            point = draws.choice([point for point in POINTS if stage.calls[point]])
            call = draws.randrange(2, 2 * stage.calls[point] + 2)
            status = status_of(fork(partial(killed_at, point, call, stage.piece.work, sent)))
            assert status in (0, 128 + sent), f"seed {seed}, number {number}, {point} {call}"
            assert not in_child(stage.piece.work)
            assert contents(stage.here) == stage.wanted, f"seed {seed}, number {number}, {point} {call}"
    print(f"{name}, asked to end: tried {2 * TIMES}, held {2 * TIMES}, failed 0, seed {seed}")


def one_of_two(work: Callable[[], None], rank: int, port: int) -> None:
    """Do some work as one of two processes, as a launcher of torch or of Accelerate starts them."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    AcceleratorState._reset_state(reset_partial_state=True)  # what this process was before
    work()


def together(work: Callable[[], None], kill_after: float | None = None, first: int = 0) -> bool:
    """Do some work in two processes; perhaps kill both, as launchers do. Return whether both came to their end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = [fork(partial(one_of_two, work, rank, port)) for rank in (0, 1)]
    if kill_after is not None:
        time.sleep(kill_after)
        for rank in (first, 1 - first):
            os.kill(children[rank], signal.SIGKILL)
    statuses = [status_of(child) for child in children]
    assert kill_after is not None or statuses == [0, 0]
    return statuses == [0, 0]


def test_several_processes_that_are_killed_end_the_same(tmp_path: Path, seed: int) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    work = command("train", "--recipe", "../recipe.yaml", "--out", "run", "--admm-epochs", 2)
    draws, killed = random.Random(seed), 0
    for number in range(-1, TIMES):
        here = tmp_path / f"run {number}"
        here.mkdir()
        os.chdir(here)
        if number < 0:
            started = time.perf_counter()
            assert together(work)
            takes, wanted = time.perf_counter() - started, contents(here)
            continue
        killed += not together(work, draws.uniform(0, 0.9) * takes, draws.randrange(2))
        assert together(work)
        assert contents(here) == wanted, f"seed {seed}, kill {number}"
        shutil.rmtree(here)
    print(f"two processes: tried {TIMES}, killed {killed}, held {TIMES}, failed 0, seed {seed}")
