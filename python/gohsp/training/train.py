# SPDX-License-Identifier: Apache-2.0
"""Training: soft-mask ADMM on the dense-shaped model, hard pruning, fine-tuning of the compact model.

What GOHSP's public record fixes: soft pruning guided by the graph, optimisation, hard pruning with fine-tuning. Which
optimisation, and every number of it, is ours. Fine-tuning works on the compact layers, so a step costs what the pruned
model costs and not what the dense one does.

Accelerate spreads a run over processes and machines; timm gives the optimiser, the schedule, the losses and mixup.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from gohsp.arguments import check_callable, check_kind, check_path, check_sequence, check_whole
from gohsp.compress import compress
from gohsp.files import alone
from gohsp.masks.mask import ModelMask
from gohsp.models.registry import family_of, is_compressed
from gohsp.progress import training_bar
from gohsp.pruning.prune import PruneResult
from gohsp.recipe import Admm, Distillation, Fit
from gohsp.serialization import digest_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from gohsp.training.losses import Distilled
    from gohsp.training.soft_mask_admm import SoftMaskAdmm


@dataclass(frozen=True)
class TrainResult:
    """What :func:`train` made.

    Attributes:
        model: The trained model, in evaluation mode, on the device that it was trained on: compact, or dense where the
            start was dense and nothing was to be pruned.
        mask: What is kept of the dense model.
        history: One mapping an epoch, with those of the columns of metrics.csv that apply.
    """

    model: nn.Module
    mask: ModelMask
    history: list[dict[str, Any]]


def train(
    start: PruneResult | nn.Module,
    data: Any,
    *,
    fit: Fit | None = None,
    admm: Admm | None = None,
    plan: PruneResult | ModelMask | None = None,
    importance: Sequence[Tensor] | None = None,
    distill: Distillation | None = None,
    teacher: nn.Module | None = None,
    test: Any | None = None,
    directory: str | Path | None = None,
    checkpoint_steps: int | None = None,
    workers: int = 0,
    seed: int = 0,
    on_step: Callable[[str, int, int, float], object] | None = None,
) -> TrainResult:
    """Train a pruned model, or prune one while it trains.

    ``train(gohsp.prune(...), data)`` fine-tunes what was pruned without training. ``train(dense, data, admm=Admm(),
    plan=gohsp.prune(dense, ...))`` goes through all stages: ADMM with a soft mask, with the counts that the plan gives
    each block; a hard mask; fine-tuning. ``train(dense, data)`` trains the dense model, to compare with.

    Every process of a run that ``accelerate launch`` or ``torchrun`` started calls this alike. A run that has a
    directory goes on where its checkpoint is; killed at any moment and called again, it ends with the weights that it
    would have ended with (on a CPU to the bit; on a GPU as far as its kernels repeat themselves).

    Args:
        start: What :func:`gohsp.prune` gave, a compressed model, or a dense vision transformer that gohsp knows. It is
            not changed.
        data: Map-style data set of (image tensor [C, height, width], class). Augmentation may use Python's, NumPy's and
            torch's default generators; they are seeded for each image.
        fit: How to train; see :class:`gohsp.recipe.Fit`.
        admm: Settings of stages 1 and 2, for a dense start; None leaves them out.
        plan: For ADMM: how many heads and neurons each block keeps.
        importance: For ADMM: scores of the heads (:func:`gohsp.rank_heads`); those in the plan's report by default.
        distill: Learn from a teacher as well.
        teacher: Gives logits; a dense start is its own teacher by default.
        test: Data set to measure on after each epoch.
        directory: Where checkpoint.safetensors and metrics.csv go. Processes must share it. No other run may train
            there, or :func:`gohsp.save` write there, until this one has ended.
        checkpoint_steps: Write a checkpoint after so many steps, besides those at the ends of epochs.
        workers: Processes that load images, for each training process.
        seed: Of everything that is drawn.
        on_step: Called with (stage, steps done, steps in all, loss) after each step, in the first process. By default a
            bar shows them where stderr is a terminal.

    Raises:
        ImportError: Accelerate is not installed.
        TypeError: The start is of no kind that is known.
        ValueError: Arguments do not fit each other, the directory holds the checkpoint of another run, or somebody else
            works in it.
    """
    from gohsp.training.loop import Loop, Stage

    check_kind("fit", fit, (Fit, NoneType), "a Fit")
    check_kind("admm", admm, (Admm, NoneType), "an Admm")
    check_kind("distill", distill, (Distillation, NoneType), "a Distillation")
    check_kind("plan", plan, (PruneResult, ModelMask, NoneType), "a PruneResult or a ModelMask")
    check_kind("teacher", teacher, (nn.Module, NoneType), "a model")
    _check_data("data", data)
    if test is not None:
        _check_data("test", test)
    if directory is not None:
        check_path("directory", directory)
    if checkpoint_steps is not None:
        check_whole("checkpoint_steps", checkpoint_steps, 1)
    if importance is not None:
        check_sequence("importance", importance, "scores of the heads, a tensor a block")
        for block in importance:
            check_kind("importance", block, Tensor, "a tensor a block")
    check_whole("workers", workers, 0)
    check_whole("seed", seed, 0)
    check_callable("on_step", on_step)
    model, mask = _start(start)
    accelerator, fit = make_accelerator(), fit or Fit()
    _check(model, admm, plan, distill, teacher)
    if distill is not None:
        teacher = copy.deepcopy(model if teacher is None else teacher)
    scores = _scores(plan, importance)
    wanted = plan.mask if isinstance(plan, PruneResult) else plan or mask
    loop = Loop(
        accelerator=accelerator,
        data=data,
        test=test,
        fit=fit,
        seed=seed,
        settings=_settings(model, teacher, wanted, scores, (fit, admm, distill), seed, len(data)),
        distilled=_distilled(teacher, distill, accelerator.device),
        directory=None if directory is None else Path(directory),
        checkpoint_steps=checkpoint_steps,
        workers=workers,
    )
    with (
        training_bar(on_step if accelerator.is_main_process else None) as loop.on_step,
        _alone_in(loop.directory, accelerator),
    ):
        saved = loop.find_checkpoint()
        if admm is not None:
            if saved is None or saved.stage == "admm":
                pruner = _pruner(model, wanted, scores, admm, accelerator)
                loop.run(Stage("admm", admm.epochs, admm.lr or fit.lr), model, saved, pruner)
                saved, mask = None, pruner.mask()
            else:
                mask = ModelMask.from_dict(saved.value("mask", dict))
            model = compress(model, mask)
        loop.mask = mask
        if fit.epochs:
            loop.run(Stage("finetune", fit.epochs, fit.lr), model, saved)
    return TrainResult(model.eval(), mask, loop.history)


def _check_data(name: str, data: Any) -> None:
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")) or isinstance(data, str | bytes | dict):
        hint = "; pass its dataset" if isinstance(data, DataLoader) else ""
        raise TypeError(f"{name}: wanted a map-style data set of (image, class), got {type(data).__name__}{hint}")


def make_accelerator() -> Accelerator:
    """Return Accelerate's view of this process and of those that it shares a run with.

    Raises:
        ImportError: Accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("gohsp.train works on Accelerate; install it: pip install accelerate") from error
    # Told nothing, Accelerate takes processes without a GPU for as many runs of one process each.
    return Accelerator(cpu=not torch.accelerator.is_available())


@contextmanager
def _alone_in(directory: Path | None, accelerator: Accelerator) -> Iterator[None]:
    """Make the directory of a run, and hold it in the block: the first process does, which alone writes there."""
    if directory is None or not accelerator.is_main_process:
        yield
        return
    directory.mkdir(parents=True, exist_ok=True)
    with alone(directory):
        yield


def _start(start: PruneResult | nn.Module) -> tuple[nn.Module, ModelMask]:
    """Return a model that may be changed, and what it keeps."""
    if isinstance(start, PruneResult):
        return compress(start.model, start.mask), start.mask
    if not isinstance(start, nn.Module):
        raise TypeError(f"start: wanted a PruneResult or a model, got {type(start).__name__}")
    family_of(start)  # or it cannot be copied
    model = copy.deepcopy(start)
    return model, ModelMask.of(model) if is_compressed(model) else ModelMask.full(model)


def _check(
    model: nn.Module,
    admm: Admm | None,
    plan: PruneResult | ModelMask | None,
    distill: Distillation | None,
    teacher: nn.Module | None,
) -> None:
    compressed = is_compressed(model)
    if compressed and admm is not None:
        raise ValueError("admm: wanted none for a start that is pruned already; it prunes a dense model")
    if (admm is None) != (plan is None):
        raise ValueError("admm, plan: wanted both, to prune while training, or neither")
    if (teacher is None) > (distill is None or not compressed):
        raise ValueError(
            "teacher: wanted one to distil from, because the start is pruned already; give the dense model"
        )
    if teacher is not None and distill is None:
        raise ValueError("teacher: wanted none without settings for distill")
    if teacher is not None and distill is not None and distill.features and _stream(teacher) != _stream(model):
        raise ValueError(
            f"teacher: wanted a residual stream of {_stream(model)} like the student's, for distill.features; "
            f"it has {_stream(teacher)}"
        )


def _stream(model: nn.Module) -> str:
    try:
        family = family_of(model)
    except TypeError:  # a teacher may be of no family
        return "no vision transformer"
    blocks, tokens, features = family.stream_shape(model)
    return f"{blocks} blocks x {tokens} tokens x {features} features"


def _distilled(
    teacher: nn.Module | None, settings: Distillation | None, device: torch.device
) -> Callable[[nn.Module], Distilled] | None:
    if teacher is None or settings is None:
        return None
    from gohsp.training.losses import Distilled

    on_device = teacher.to(device)
    return lambda loss: Distilled(loss, on_device, settings)


def _scores(plan: PruneResult | ModelMask | None, importance: Sequence[Tensor] | None) -> Sequence[Tensor]:
    if plan is None:
        return ()
    if importance is not None:
        return importance
    if not isinstance(plan, PruneResult):
        raise ValueError("importance: wanted scores (gohsp.rank_heads), because a bare mask as plan has none")
    return plan.report.importance


def _pruner(
    model: nn.Module, mask: ModelMask, importance: Sequence[Tensor], settings: Admm, accelerator: Accelerator
) -> SoftMaskAdmm:
    from accelerate.utils import broadcast

    from gohsp.training.soft_mask_admm import SoftMaskAdmm

    return SoftMaskAdmm(model.to(accelerator.device), mask, importance, settings, agree=broadcast)


def _settings(
    model: nn.Module,
    teacher: nn.Module | None,
    mask: ModelMask,
    importance: Sequence[Tensor],
    sections: tuple[Fit, Admm | None, Distillation | None],
    seed: int,
    images: int,
) -> dict[str, Any]:
    """Return what decides how a run ends, by the name under which a user knows it."""
    fit, admm, distill = (None if part is None else part.model_dump(mode="json") for part in sections)
    named = {"fit": fit, "admm": admm, "distill": distill, "seed": seed, "number of images": images}
    scores = [block.tolist() for block in importance]
    weights = {"start": digest_weights(model), "teacher": None if teacher is None else digest_weights(teacher)}
    return {**named, **weights, "mask": mask.to_dict(), "importance": scores}
