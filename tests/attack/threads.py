# SPDX-License-Identifier: Apache-2.0
"""Models between threads, forks, workers and garbage: ``python -m tests.attack.threads SEED TIMES``.

A process of its own, because it forks and changes the number of threads, and because what hangs is ended from outside.
Each trial is named on stderr before it begins. Prints how many calls each made, all of which gave what the same model
gives alone: a frozen model to the bit.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import gohsp
import gohsp_kernels as gk

BATCHES = (1, 2, 3, 5, 8)
PAGE = resource.getpagesize()
LIMIT = 120  # seconds after which a fork is taken for one that hangs
ROOM = 8 * 2**20  # bytes that the process may grow by in a run of any length


def plain(seed: int, side: int = 32) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
    return VisionTransformer(img_size=side, **sizes).eval()


def small(seed: int, side: int = 32) -> Any:
    """Return a compressed model whose blocks are ragged."""
    dense = plain(seed, side)
    keep = {"heads": 0.7, "qk": 0.7, "v": 0.7, "hidden": 0.6}
    return gohsp.compress(dense, gohsp.ModelMask.random(dense, keep, torch.Generator().manual_seed(seed))).eval()


def forms(seed: int = 0) -> dict[str, nn.Module]:
    """Return one model as compressed, frozen, and frozen with each kind of weights that runs here."""
    model = small(seed)
    found: dict[str, nn.Module] = {"compressed": model}
    for weights in ("float32", "int8", "bfloat16"):
        if gk.can_run("cpu", weights=weights):
            found[f"frozen {weights}"] = gohsp.freeze(model, weights=weights)
    return found


def answer(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(images)


class Judge:
    """Models, images, and what each model gives for each batch when nothing else goes on."""

    def __init__(self, seed: int) -> None:
        self.models = forms()
        self.images = torch.randn(max(BATCHES), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        self.wanted = {(n, b): self.call(n, b) for n in self.models for b in BATCHES}
        self.calls = 0

    def call(self, name: str, batch: int) -> Tensor:
        return answer(self.models[name], self.images[:batch])

    def look(self, name: str, batch: int, found: Tensor | None = None) -> None:
        """Call a model, unless somebody has, and compare."""
        found = self.call(name, batch) if found is None else found
        wanted = self.wanted[name, batch]
        same = torch.allclose(found, wanted, rtol=1e-4, atol=1e-5) if name == "compressed" else found.equal(wanted)
        assert same, f"{name}, batch {batch}: {float((found - wanted).abs().max())} off"
        self.calls += 1

    def look_at_all(self) -> None:
        for name, batch in self.wanted:
            self.look(name, batch)


def in_threads(works: list[Callable[[], object]]) -> None:
    """Do some work in threads, and raise what one of them raised."""
    faults: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def forked(work: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        signal.alarm(LIMIT)
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"the fork ended with {status}"


def forks(judge: Judge, times: int, draws: random.Random) -> None:
    """A fork whose parent has called no model of its own yet, one whose parent has, and one of that."""
    fresh = Judge.__new__(Judge)
    fresh.__dict__.update(judge.__dict__, models=forms())
    for _ in range(2 * times):
        forked(fresh.look_at_all)
        fresh.look_at_all()
        forked(lambda: forked(fresh.look_at_all))
        judge.calls += 2 * len(judge.wanted)


def endings(judge: Judge, times: int, draws: random.Random) -> None:
    """Daemon threads in a call while the interpreter ends: that ends as it does with a plain model, or better.

    With a plain model of timm PyTorch aborts, mostly.
    """

    def for_ever(model: nn.Module) -> None:
        while True:
            answer(model, judge.images)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for _ in range(max(1, times // 2)):
        statuses = {}
        for name, model in {"plain": plain(0), **judge.models}.items():
            child = os.fork()
            if child == 0:
                signal.alarm(LIMIT)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where Python tells how it aborts
                for _ in range(3):
                    threading.Thread(target=for_ever, args=(model,), daemon=True).start()
                time.sleep(0.1 * draws.random())
                sys.exit()  # through main, as a program ends
            statuses[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert set(statuses.values()) <= {0, statuses["plain"]}, statuses
        judge.calls += len(statuses)


def changing_threads(judge: Judge, times: int, draws: random.Random) -> None:
    """Calls from 2 to 8 threads while the number of torch's threads changes."""
    before = torch.get_num_threads()
    for count in (2, 4, 8):
        done = threading.Event()
        cases = [draws.sample(sorted(judge.wanted), len(judge.wanted)) for _ in range(count)]

        def change(done: threading.Event = done) -> None:
            while not done.is_set():
                torch.set_num_threads(draws.choice((1, 2, 3, 4)))
                time.sleep(1e-4)

        def call(mine: list[tuple[str, int]]) -> None:
            for _ in range(2 * times):
                for name, batch in mine:
                    judge.look(name, batch)

        def calls(cases: list[Any] = cases, done: threading.Event = done) -> None:
            try:
                in_threads([partial(call, mine) for mine in cases])
            finally:
                done.set()

        in_threads([change, calls])
    torch.set_num_threads(before)


def garbage(judge: Judge, times: int, draws: random.Random) -> None:
    """Models that are made, called and dropped, and collected, while other threads call theirs."""

    def make() -> None:
        for number in range(4 * times):
            made = forms(number)
            for model in made.values():
                answer(model, judge.images[:2])
            made["self"] = made  # type: ignore[assignment]  # so that only the collector ends them
            del made, model
            gc.collect()

    def call() -> None:
        for _ in range(4 * times):
            judge.look_at_all()

    in_threads([make, make, call, call])


def by_asyncio(judge: Judge, times: int, draws: random.Random) -> None:
    """``asyncio.to_thread``, as servers do it."""

    async def ask() -> None:
        cases = [draws.choice(sorted(judge.wanted)) for _ in range(32)]
        found = await asyncio.gather(*(asyncio.to_thread(judge.call, name, batch) for name, batch in cases))
        for (name, batch), logits in zip(cases, found, strict=True):
            judge.look(name, batch, logits)

    for _ in range(2 * times):
        asyncio.run(ask())


class Answers(Dataset[Any]):
    """Logits that the workers of a loader compute."""

    def __init__(self, judge: Judge, name: str) -> None:
        self.model, self.images = judge.models[name], judge.images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return answer(self.model, self.images[index : index + 1])[0]


def load(judge: Judge, start: str) -> None:
    for name in judge.models:
        loader = DataLoader(Answers(judge, name), 3, num_workers=2, multiprocessing_context=start, timeout=120)
        found = torch.cat(list(loader))
        alone = torch.cat([answer(judge.models[name], image[None]) for image in judge.images])
        assert torch.allclose(found, alone, rtol=1e-4, atol=1e-5) if name == "compressed" else found.equal(alone), name
        judge.calls += len(found)


def loaders_that_fork(judge: Judge, times: int, draws: random.Random) -> None:
    """Workers of a DataLoader, forked from a process that has used several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    judge.look_at_all()
    for _ in range(times):
        load(judge, "fork")
    torch.set_num_threads(threads)


def loaders_that_spawn(judge: Judge, times: int, draws: random.Random) -> None:
    """The same in new processes, which get the models as pickles."""
    load(judge, "spawn")


def multiprocessing_by_spawn(judge: Judge, times: int, draws: random.Random) -> None:
    """A pool of new processes."""
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        for name, batch in judge.wanted:
            found = pool.apply_async(answer, (judge.models[name], judge.images[:batch])).get(timeout=120)
            judge.look(name, batch, found)


def used() -> tuple[int, int, int]:
    """Return bytes in memory, open files and threads."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    return resident, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def long_run(judge: Judge, times: int, draws: random.Random) -> None:
    """Calls with other batches, tokens and weights each time, models made and dropped: nothing grows."""
    model = {side: small(side, side) for side in (16, 32, 48)}
    frozen = {side: gohsp.freeze(model[side]) for side in model}

    def go(calls: int) -> None:
        for number in range(calls):
            side, batch = draws.choice((16, 32, 48)), draws.randrange(1, 17)
            images = torch.randn(batch, 3, side, side)
            if number % 10 == 0:
                with torch.no_grad():
                    next(model[side].parameters()).add_(1e-3)
                frozen[side] = gohsp.freeze(model[side])
            if number % 50 == 0:
                model[side] = small(number, side)
            answer((model if number % 2 else frozen)[side], images)
            judge.calls += 1

    go(400)
    gc.collect()
    before = used()
    go(1000 + 200 * times)
    gc.collect()
    after = used()
    print(f"memory: {before[0] / 2**20:.1f} to {after[0] / 2**20:.1f} MiB", file=sys.stderr)
    assert after[0] <= before[0] + ROOM, f"memory grew from {before[0]} to {after[0]} bytes"
    assert after[1:] == before[1:], f"open files and threads were {before[1:]}, are {after[1:]}"


QUICK = (forks, endings, long_run, by_asyncio, changing_threads, garbage, loaders_that_fork)
LONG = (loaders_that_spawn, multiprocessing_by_spawn)  # each process imports torch and timm


def main(seed: int, times: int) -> None:
    torch.set_num_threads(1)
    judge, told = Judge(seed), {}
    for trial in (*QUICK, *LONG) if times > 1 else QUICK:
        print(trial.__name__, file=sys.stderr, flush=True)
        judge.calls, started = 0, time.perf_counter()
        trial(judge, times, random.Random(seed))
        told[trial.__name__] = judge.calls
        print(f"{judge.calls} calls, {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
