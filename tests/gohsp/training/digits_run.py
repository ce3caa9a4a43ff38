# SPDX-License-Identifier: Apache-2.0
"""A small training run on scikit-learn's digits through all stages, and ways of interrupting it.

Run as a script it is one process of a run that several share: ``digits_run.py FOLDER``, under a launcher.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import gohsp
from gohsp.training import checkpoint

FINAL = "final.safetensors"
CALLS = "calls"


class Digits:
    """The first digits, [1, 8, 8]; augmented with draws of all three generators if they are noisy."""

    def __init__(
        self, count: int = 48, first: int = 0, noisy: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        from sklearn.datasets import load_digits

        found = load_digits()
        self.images = torch.tensor(found.images[first : first + count], dtype=dtype)[:, None] / 8 - 1
        self.labels, self.noisy = found.target[first : first + count].tolist(), noisy

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        import numpy as np

        image = self.images[index]
        if self.noisy:
            image = image * random.uniform(0.5, 1) + 0.1 * float(np.random.rand()) + 0.1 * torch.randn(())
        return image, self.labels[index]


def make_vit(**options: Any) -> VisionTransformer:
    """Two blocks of 4 heads x 8 on 32 features; 5 tokens of an 8 x 8 image."""
    sizes: dict[str, Any] = {"img_size": 8, "patch_size": 4, "in_chans": 1, "num_classes": 10}
    sizes |= {"embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VisionTransformer(**{**sizes, **options})


def make_plan(model: VisionTransformer) -> gohsp.ModelMask:
    """Three heads and 40 neurons in the first block, two and 24 in the second."""
    plan = gohsp.ModelMask.full(model)
    for block, heads, hidden in zip(plan.blocks, (3, 2), (40, 24), strict=True):
        block.heads[heads:] = False
        block.hidden[hidden:] = False
    return plan


FIT = gohsp.Fit(epochs=2, batch_size=16, lr=3e-3, warmup_epochs=0, smoothing=0.0, mixup=0.0, cutmix=0.0)
ADMM = gohsp.Admm(epochs=3, rho=300, rho_max=3000, projections=3)
DISTILL = gohsp.Distillation(weight=0.3, temperature=2.0, features=0.5)
EVEN = [torch.full((4,), 0.25, dtype=torch.float64)] * 2


def run(
    directory: Path | None,
    fit: gohsp.Fit = FIT,
    noisy: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> gohsp.TrainResult:
    """All stages: 9 steps of ADMM, 6 of fine-tuning."""
    model = make_vit(**({"drop_path_rate": 0.2, "proj_drop_rate": 0.1} if noisy else {})).to(dtype)
    return gohsp.train(
        model,
        Digits(noisy=noisy, dtype=dtype),
        fit=fit,
        admm=ADMM,
        plan=make_plan(model),
        importance=EVEN,
        test=Digits(20, first=48, dtype=dtype),
        directory=directory,
        **options,
    )


def noisy_run(directory: Path) -> None:
    """A run with every source of randomness and a checkpoint after each step; leaves its final weights."""
    fit = FIT.model_copy(update={"mixup": 0.5, "cutmix": 0.5, "smoothing": 0.1, "clip": 1.0})
    result = run(directory, fit, noisy=True, distill=DISTILL, checkpoint_steps=1)
    save_file(result.model.state_dict(), directory / FINAL)


def counted_run(directory: Path, last: int | None = None) -> None:
    """Do the noisy run and leave how many calls and returns of functions it took; or die by SIGKILL at one of them.

    A moment that is counted in calls is the same share of the run however busy the machine is.
    """
    passed = 0

    def count(*_: object) -> None:
        nonlocal passed
        passed += 1
        if passed == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    noisy_run(directory)
    sys.setprofile(None)
    (directory / CALLS).write_text(str(passed))


def in_child(work: Callable[[], object]) -> bool:
    """Do some work in a forked process; return whether it came to its end, or was killed with SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert os.waitstatus_to_exitcode(status) == 0, "the run failed"
    return True


def killed_while_writing(directory: Path, moment: str, number: int) -> None:
    """Do the noisy run, but die by SIGKILL while the checkpoint of some number is written."""
    written, save, replace = 0, checkpoint.save_file, os.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def save_or_die(tensors: Any, path: Path, metadata: Any) -> None:
        nonlocal written
        written += 1
        save(tensors, path, metadata)
        if written == number and moment == "half written":
            os.truncate(path, path.stat().st_size // 2)
            die()

    def replace_or_die(source: Path, target: Path) -> None:
        is_checkpoint = Path(target).suffix == ".safetensors"
        if is_checkpoint and written == number and moment == "before the rename":
            die()
        replace(source, target)
        if is_checkpoint and written == number and moment == "after the rename":
            die()

    checkpoint.save_file, os.replace = save_or_die, replace_or_die  # type: ignore[assignment]
    noisy_run(directory)


def final_weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / FINAL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    outcome = run(folder, dtype=torch.float64, distill=DISTILL)
    state = PartialState()
    print(f"process {state.process_index} of {state.num_processes} over {state.backend}")
    if state.is_main_process:
        save_file(outcome.model.state_dict(), folder / FINAL)
