# SPDX-License-Identifier: Apache-2.0
"""A public call leaves the state of the process as it was: when it ends well, and when it fails anywhere in the middle.

The state is what a user sees of it: generators, threads, modes and flags of torch, handlers, filters, the environment,
the folder, open files. Calls are broken off by an exception at the n-th call of a function of the two packages.
"""

from __future__ import annotations

import decimal
import gc
import inspect
import locale
import logging
import os
import pickle
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch.multiprocessing
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from typer.main import get_command

import gohsp
import gohsp_kernels as gk
from gohsp.demo import machine
from gohsp.training.evaluation import evaluate
from gohsp_command import cli
from gohsp_kernels import _cache, testing

from .scale import TIMES

accelerate = pytest.importorskip("accelerate")

PACKAGES = tuple(str(Path(package.__file__).parent) for package in (gohsp, gk))
NUMERICS = {
    "cuda.matmul": ("fp32_precision",),
    "cudnn": ("enabled", "benchmark", "deterministic", "fp32_precision"),
    "mkldnn": ("enabled", "fp32_precision"),
}


def snapshot() -> dict[str, Any]:
    """What of the process a user sees, by name."""
    state: dict[str, Any] = {
        "random": random.getstate(),
        "numpy.random": pickle.dumps(np.random.get_state()),
        "torch.random": torch.get_rng_state().tolist(),
        "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")],
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
        ),
        "default dtype and device": (torch.get_default_dtype(), torch.get_default_device()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "attention": [
            getattr(torch.backends.cuda, f"{kind}_sdp_enabled")()
            for kind in ("flash", "mem_efficient", "math", "cudnn")
        ],
        "denormals": bool(torch.full((64,), 1e-40).mul(1.0).count_nonzero() == 64),
        "numpy errors": np.geterr(),
        "print options": vars(torch._tensor_str.PRINT_OPTS).copy(),
        "hooks of all modules": [
            dict(getattr(nn.modules.module, f"_global_{k}")) for k in ("forward_hooks", "forward_pre_hooks")
        ],
        "backend": gk.dispatch.selected(),
        "signal handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "hooks of Python": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.gettrace()),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "limits of Python": (sys.getrecursionlimit(), gc.isenabled(), gc.get_threshold(), sys.getswitchinterval()),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": [(log.level, list(log.handlers), log.disabled) for log in map(logging.getLogger, LOGS)],
        "environment": dict(os.environ),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "locale": locale.setlocale(locale.LC_ALL),
        "decimal": repr(decimal.getcontext()),
        "threads": set(threading.enumerate()),
        "open files": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0,
        "sharing of tensors": torch.multiprocessing.get_sharing_strategy(),
    }
    for name, flags in NUMERICS.items():
        module: Any = torch.backends
        for part in name.split("."):
            module = getattr(module, part)
        state[name] = [getattr(module, flag) for flag in flags]
    umask = os.umask(0o022)
    os.umask(umask)
    return {**state, "umask": umask}


LOGS = ("", "gohsp", "gohsp_kernels", "torch", "timm", "accelerate")


def changes(before: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What is another now, before and after."""
    for thread in set(threading.enumerate()) - before["threads"]:
        thread.join(5)  # rich lets the thread of a progress bar end by itself
    after = snapshot()
    after["threads"] |= before["threads"]
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


class Broken(BaseException):
    """What no ``except Exception`` of a library takes for its own."""


class Interrupted:
    """Raises in the n-th call of a function of the two packages; counts them.

    Generators are left out: one that goes on may be about to put something back.
    """

    def __init__(self, at: int | None = None) -> None:
        self.at, self.count = at, 0

    def _look(self, frame: Any, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGES) and not code.co_flags & inspect.CO_GENERATOR:
            self.count += 1
            if self.count == self.at:
                raise Broken

    def __enter__(self) -> Interrupted:
        sys.setprofile(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


class Data:
    """A few labelled images; with noise from all generators, which training seeds, if they are noisy."""

    def __init__(self, noisy: bool = False) -> None:
        self.noisy = noisy

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.randn(()) + random.random() + float(np.random.rand()) if self.noisy else 0.0
        return IMAGES[index] + noise, index % 3


def vit(depth: int = 2, mlp_ratio: float = 2.0) -> VisionTransformer:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "num_classes": 3}
    with torch.random.fork_rng(devices=[]):
        return VisionTransformer(**sizes, depth=depth, mlp_ratio=mlp_ratio, init_values=0.1).eval()


IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
FIT = gohsp.Fit(epochs=1, batch_size=4, warmup_epochs=0)


def mask_of(model: nn.Module) -> gohsp.ModelMask:
    return gohsp.ModelMask.random(model, 0.7, torch.Generator().manual_seed(2))


def small() -> Any:
    model = vit()
    return gohsp.compress(model, mask_of(model))


def backward() -> None:
    model = small().train()
    model(IMAGES).sum().backward()


def saved(folder: Path) -> None:
    gohsp.save(small(), folder / "model")
    gohsp.load(folder / "model")(IMAGES)


def files(folder: Path) -> None:
    mask = mask_of(vit())
    mask.save(folder / "mask.json")
    assert gohsp.ModelMask.load(folder / "mask.json") == mask
    mask.summary(vit())


def measured(folder: Path) -> None:
    table = gohsp.LatencyTable.measure(vit(depth=1, mlp_ratio=0.7), rounds=1)
    table.save(folder / "latency.json")
    gohsp.LatencyTable.load(folder / "latency.json")


def trained(folder: Path) -> None:
    gohsp.train(
        vit(),
        Data(noisy=True),
        fit=FIT,
        admm=gohsp.Admm(epochs=1),
        plan=gohsp.prune(vit(), [IMAGES], target={"params": 0.8}),
        distill=gohsp.Distillation(features=0.1),
        test=Data(),
        directory=folder / "run",
        checkpoint_steps=1,
    )


def operators() -> None:
    for call in testing.samples().values():
        with gk.use_backend("cpu"):
            call.run()
        call.run("reference")


def exported() -> None:
    program = torch.export.export(small(), (IMAGES,))
    program.module()(IMAGES)


def command(*arguments: str) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        with suppress(SystemExit):
            get_command(cli.app).main([argument.format(folder=folder) for argument in arguments], "gohsp")

    return run


CALLS: dict[str, Callable[[Path], object]] = {
    "rank_heads": lambda _: [gohsp.rank_heads(vit(), [IMAGES], kind, high_is="auto") for kind in ("cka", "attention")],
    "synthesise": lambda _: gohsp.synthesise(vit(), 2, steps=1),
    "prune": lambda _: gohsp.prune(vit(), [IMAGES], target={"params": 0.7}, refine=1),
    "prune by ADMM": lambda _: gohsp.prune(vit(), [IMAGES], target={"macs": 0.7}, optimiser="admm", method="taylor"),
    "compress": lambda _: small(),
    "densify": lambda _: gohsp.densify(small())(IMAGES),
    "count": lambda _: gohsp.count(small()),
    "forward": lambda _: small()(IMAGES),
    "backward": lambda _: backward(),
    "freeze": lambda _: [gohsp.freeze(small(), weights=form)(IMAGES) for form in ("float32", "int8")],
    "save and load": saved,
    "masks": files,
    "LatencyTable": measured,
    "evaluate": lambda _: evaluate(small(), Data()),
    "train": trained,
    "operators": lambda _: operators(),
    "poisoned": lambda _: poisoned(),
    "describe the machine": lambda _: machine.describe(),
    "gohsp info": command("info"),
    "gohsp report": command("report", "{folder}"),
}
SLOW = {"export": lambda _: exported()}


def poisoned() -> None:
    with testing.poisoned():
        testing.samples()["packed_linear"].run("reference")


@pytest.fixture(autouse=True)
def unusual() -> Any:
    """A state in which a default that is put back shows."""
    backup = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    with warnings.catch_warnings():
        yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = True
    random.setstate(backup[0])
    np.random.set_state(backup[1])
    torch.set_rng_state(backup[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", {**CALLS, **SLOW})
def test_a_call_leaves_the_process_as_it_was(name: str, tmp_path: Path) -> None:
    before = snapshot()
    {**CALLS, **SLOW}[name](tmp_path)
    assert changes(before) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_so_does_one_that_fails_in_the_middle(name: str, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    with Interrupted() as whole:
        CALLS[name](tmp_path / "whole")
    generator = random.Random(name)
    broken = 0
    for i in range(2 * TIMES):
        folder = tmp_path / str(i)
        folder.mkdir()
        before, at = snapshot(), generator.randint(1, whole.count)
        try:
            with Interrupted(at):
                CALLS[name](folder)
        except Broken:
            broken += 1
        assert changes(before) == {}, at
    print(f"{name}: {broken} broken off of {2 * TIMES}, in {whole.count} calls")


def test_threads_that_keep_packed_weights_at_once_do_not_take_each_others() -> None:
    """What a CUDA graph reads by its address has to outlive its place in the cache, whoever captures beside it."""
    entered, left = threading.Barrier(2), threading.Event()
    weights, kept = [torch.ones(3), torch.ones(3)], {}

    def first() -> None:
        with _cache.keeping() as kept[0]:
            entered.wait(10)
            _cache.up_to_date(None, [weights[0]], (), lambda: "first")
            entered.wait(10)
        left.set()

    def second() -> None:
        entered.wait(10)
        with _cache.keeping() as kept[1]:
            entered.wait(10)
            left.wait(10)
            _cache.up_to_date(None, [weights[1]], (), lambda: "second")

    workers = [threading.Thread(target=function) for function in (first, second)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert kept == {0: ["first"], 1: ["second"]}
