# SPDX-License-Identifier: Apache-2.0
"""The loop that every stage of training runs, with its checkpoints and its metrics."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Attention
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gohsp.compress import compress
from gohsp.files import cut, write_text
from gohsp.masks.mask import ModelMask
from gohsp.models.base import logits_of
from gohsp.models.registry import family_of
from gohsp.recipe import Fit
from gohsp.training import checkpoint
from gohsp.training.batches import BatchKeys, check_labels, training_batches
from gohsp.training.checkpoint import Checkpoint
from gohsp.training.evaluation import evaluate
from gohsp.training.losses import Distilled, make_loss, make_mixup, watch
from gohsp.training.seeds import STEP, seeded
from gohsp.training.soft_mask_admm import SoftMaskAdmm

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.csv"
STAGES = ("admm", "finetune")
COLUMNS = ("stage", "epoch", "step", "loss", "lr", "rho", "softness", "residual", "test_loss", "top1", "seconds")


@dataclass(frozen=True)
class Stage:
    """One of :data:`STAGES`: for how many epochs at most, and with which peak learning rate."""

    name: str
    epochs: int
    lr: float


@dataclass
class Loop:
    """What all stages of a run share.

    Attributes:
        accelerator: Its processes share each batch.
        data, test: Map-style data sets of (image, label); ``test`` may be None.
        fit: How to train.
        seed: Of everything that is drawn.
        settings: What a checkpoint has to have been written with, as plain values.
        distilled: Makes a loss on the labels one that also has a teacher; None without one.
        directory: Where the checkpoint and the metrics go; None for nowhere.
        checkpoint_steps: Write a checkpoint after so many steps, besides those at the ends of epochs.
        workers: Processes that load images.
        on_step: Told (stage, steps done, steps in all, loss).
        mask: What the model in training keeps, where that is settled; checkpoints hold it.
        history: A mapping an epoch.
    """

    accelerator: Accelerator
    data: Any
    test: Any | None
    fit: Fit
    seed: int
    settings: dict[str, Any]
    distilled: Callable[[nn.Module], Distilled] | None = None
    directory: Path | None = None
    checkpoint_steps: int | None = None
    workers: int = 0
    on_step: Callable[[str, int, int, float], object] | None = None
    mask: ModelMask | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    def find_checkpoint(self) -> Checkpoint | None:
        """Return where this run was interrupted, with its history taken over; None if it starts.

        Raises:
            ValueError: The checkpoint is of a run with other settings, or processes see different ones.
        """
        path = None if self.directory is None else self.directory / CHECKPOINT
        saved = checkpoint.read(path) if path is not None and path.is_file() else None
        steps = torch.tensor([-1 if saved is None else saved.step], device=self.accelerator.device)
        if len(self.accelerator.gather(steps).unique()) > 1:
            raise ValueError(f"directory: wanted one that all processes share, but they find different files in {path}")
        if saved is None:
            return None
        if other := sorted(k for k, v in self.settings.items() if saved.value("settings", dict).get(k) != v):
            raise ValueError(
                f"directory: {path} belongs to a run with another {', '.join(other)}; go on with the same settings, "
                "or start in another directory"
            )
        history = saved.value("history", list)
        if not all(isinstance(row, dict) and row.keys() <= set(COLUMNS) for row in history):
            raise ValueError(f"{path}: history: wanted mappings of {', '.join(COLUMNS)}")
        self.history[:] = history
        self._write_metrics()
        return saved

    def run(self, stage: Stage, model: nn.Module, saved: Checkpoint | None, admm: SoftMaskAdmm | None = None) -> None:
        """Train a model, in place, from where a checkpoint left it to the end of a stage."""
        with by_products(model, self.fit.precision == "bf16" and self.accelerator.device.type == "cpu"):
            self._run(stage, model, saved, admm)

    def _run(self, stage: Stage, model: nn.Module, saved: Checkpoint | None, admm: SoftMaskAdmm | None) -> None:
        per_epoch = self._steps_per_epoch()
        total = stage.epochs * per_epoch
        wrapped = self._prepare(model)
        optimizer = create_optimizer_v2(model, opt=self.fit.optimizer, lr=stage.lr, weight_decay=self.fit.weight_decay)
        schedule = self._schedule(optimizer, total, per_epoch)
        step, loss_before = 0, 0.0
        if saved is not None:
            step, loss_before = saved.step, saved.value("loss", float)
            _restore(saved, model, optimizer, admm)
            if saved.done:
                return
        losses = _Losses(self.accelerator, loss_before)
        update = self._update(stage, model, wrapped, optimizer, admm)
        started = time.perf_counter()
        for images, labels in self._batches(stage, step, total):
            schedule(step)
            loss = update(step, images, labels)
            losses.add(loss)
            step += 1
            if admm is not None and (step % max(1, per_epoch // admm.settings.projections) == 0 or step == total):
                admm.project(step / total)
            epoch_ends = step % per_epoch == 0
            done = step == total or (admm is not None and admm.converged)
            if epoch_ends or done:
                row = {"stage": stage.name, "epoch": -(-step // per_epoch), "step": step}
                row |= {"loss": losses.mean(step % per_epoch or per_epoch), "lr": optimizer.param_groups[0]["lr"]}
                row |= self._measure(model, admm) | {"seconds": round(time.perf_counter() - started, 3)}
                self.history.append(row)
                losses.reset()
                started = time.perf_counter()
            if epoch_ends or done or (self.checkpoint_steps and step % self.checkpoint_steps == 0):
                self._save(Checkpoint(stage.name, step, done, *_state(model, optimizer, admm)), losses.total())
            if self.on_step is not None:
                self.on_step(stage.name, step, total, float(loss))
            if done:
                return

    def _steps_per_epoch(self) -> int:
        size, processes = self.fit.batch_size, self.accelerator.num_processes
        if size % processes:
            raise ValueError(f"fit.batch_size: wanted a multiple of the {processes} processes, got {size}")
        if size > len(self.data):
            raise ValueError(f"fit.batch_size: wanted at most the {len(self.data)} images that there are, got {size}")
        return len(self.data) // size

    def _prepare(self, model: nn.Module) -> nn.Module:
        """Return the model, on its device, as the processes share it; the parameters stay the given model's."""
        model.to(self.accelerator.device).train()
        if self.accelerator.num_processes == 1:
            return model
        devices = None if self.accelerator.device.type == "cpu" else [self.accelerator.device]
        # Not Accelerator.prepare: whether parameters go unused is known only here, for this model. A block without
        # heads or neurons has some that no gradient reaches.
        empty = any(parameter.numel() == 0 for parameter in model.parameters())
        return DistributedDataParallel(model, device_ids=devices, find_unused_parameters=empty)

    def _schedule(self, optimizer: torch.optim.Optimizer, total: int, per_epoch: int) -> Callable[[int], None]:
        fit = self.fit
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=fit.scheduler,
            num_epochs=total,
            min_lr=fit.min_lr,
            warmup_lr=fit.warmup_lr,
            # A stage shorter than the warm-up would never see its learning rate.
            warmup_epochs=min(round(fit.warmup_epochs * per_epoch), total // 2),
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        return scheduler.step_update

    def _batches(self, stage: Stage, first: int, last: int) -> Any:
        keys = BatchKeys(
            images=len(self.data),
            batch_size=self.fit.batch_size,
            first=first,
            last=last,
            seed=self.seed,
            stage=STAGES.index(stage.name),
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        return training_batches(self.data, keys, self.workers, pin=self.accelerator.device.type == "cuda")

    def _update(
        self,
        stage: Stage,
        model: Any,
        wrapped: nn.Module,
        optimizer: torch.optim.Optimizer,
        admm: SoftMaskAdmm | None,
    ) -> Callable[[int, Tensor, Tensor], Tensor]:
        """Return the function that makes one step and gives its loss on this process's images."""
        device, process = self.accelerator.device, self.accelerator.process_index
        classes = family_of(model).classes(model)
        mixup, on_labels = make_mixup(self.fit, classes), make_loss(self.fit)
        distilled = None if self.distilled is None else self.distilled(on_labels)
        half = self.fit.precision == "bf16"

        def update(step: int, images: Tensor, labels: Tensor) -> Tensor:
            check_labels(labels, classes)
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            key = (STEP, self.seed, STAGES.index(stage.name), step, process)
            with seeded(*key, device=device), torch.autocast(device.type, torch.bfloat16, enabled=half):
                if mixup is not None:
                    images, labels = mixup(images, labels)
                with watch(model, on=distilled is not None and distilled.watches) as stream:
                    logits = logits_of(wrapped(images))
                logits = logits.float() if half else logits
                loss = on_labels(logits, labels) if distilled is None else distilled(logits, labels, images, stream)
            optimizer.zero_grad()
            self.accelerator.backward(loss)
            if self.fit.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), self.fit.clip)
            optimizer.step()
            if admm is not None:
                admm.pull_(optimizer.param_groups[0]["lr"])
            return loss.detach()

        return update

    def _measure(self, model: nn.Module, admm: SoftMaskAdmm | None) -> dict[str, float]:
        """Return where ADMM stands, and what the model, cut to its mask, does on the test images."""
        row = {} if admm is None else admm.values()
        if self.test is None:
            return row
        small = model if admm is None else compress(model, admm.mask())
        found = evaluate(small, self.test, workers=self.workers, accelerator=self.accelerator)
        return {**row, "test_loss": found["loss"], "top1": found["top1"]}

    def _save(self, state: Checkpoint, loss: float) -> None:
        if self.directory is None or not self.accelerator.is_main_process:
            return
        mask = None if self.mask is None else self.mask.to_dict()
        state.values.update(loss=loss, mask=mask, history=self.history, settings=self.settings)
        checkpoint.write(self.directory / CHECKPOINT, state)
        self._write_metrics()

    def _write_metrics(self) -> None:
        # Whole and from the history: rows appended by a run that was killed before its checkpoint would stand twice.
        if self.directory is None or not self.accelerator.is_main_process:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.history)
        write_text(self.directory / METRICS, text.getvalue())


@contextmanager
def by_products(model: nn.Module, on: bool) -> Iterator[None]:
    """Have timm's own attention make its two products: PyTorch's fused backward pass in bfloat16 takes a CPU several
    times as long. Modules of ours choose for themselves."""
    # The fused form does not look at ``scale``; where that is another, the two are not the same function.
    changed = [m for m in model.modules() if on and isinstance(m, Attention) and m.fused_attn]
    changed = [m for m in changed if m.scale == m.head_dim**-0.5]
    for module in changed:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in changed:
            module.fused_attn = True


class _Losses:
    """Sum of the losses of an epoch so far, over all processes."""

    def __init__(self, accelerator: Accelerator, before: float) -> None:
        self.accelerator, self.before = accelerator, before
        self.here = torch.zeros((), dtype=torch.float64, device=accelerator.device)

    def add(self, loss: Tensor) -> None:
        self.here += loss / self.accelerator.num_processes

    def total(self) -> float:
        """Return the sum; what is summed up here goes over into it, so that a run that goes on adds alike."""
        self.before += float(self.accelerator.reduce(self.here))
        self.here = torch.zeros_like(self.here)
        return self.before

    def mean(self, steps: int) -> float:
        return self.total() / steps

    def reset(self) -> None:
        self.before = 0.0


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, admm: SoftMaskAdmm | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and plain values of a checkpoint."""
    moments, numbers = checkpoint.pack_optimizer(optimizer)
    parts = {"model": model.state_dict(), "optimizer": moments, "admm": {} if admm is None else admm.tensors()}
    tensors = {f"{part}.{name}": value for part, named in parts.items() for name, value in named.items()}
    return tensors, {"optimizer": numbers, "admm": {} if admm is None else admm.values()}


def _restore(saved: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, admm: SoftMaskAdmm | None) -> None:
    checkpoint.unpack_optimizer(optimizer, saved.part("optimizer"), saved.value("optimizer", dict))
    try:
        model.load_state_dict(saved.part("model"))
        if admm is not None:
            admm.restore(saved.part("admm"), saved.value("admm", dict))
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"checkpoint: wanted that of such a run, but {cut(error)}") from error
