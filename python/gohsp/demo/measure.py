# SPDX-License-Identifier: Apache-2.0
"""The models that the demo compares, and what it measures of each: size, accuracy, agreement, time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp import timing
from gohsp.demo.data import BATCH, Images
from gohsp.progress import each
from gohsp.runs.classifier import Classifier, collect, top1
from gohsp.runs.progress import Steps
from gohsp_kernels import formats

Model = Callable[[Tensor], Tensor]

DENSE, MASKED, SLICED, COMPILED, GOHSP = "dense", "masked dense", "sliced PyTorch", "torch.compile", "gohsp"
ROUNDED = {f"gohsp, {weights}": weights for weights in formats.ROUNDED}
"""Rows of frozen models whose weights are rounded, and what :func:`gohsp.freeze` calls the weights."""
ABOUT = {
    DENSE: "the model as it was trained",
    MASKED: "full shape, pruned entries set to zero",
    SLICED: "pruned entries left out, plain PyTorch modules (gohsp.densify)",
    COMPILED: "the sliced model under torch.compile",
    GOHSP: "pruned entries left out, run by gohsp's kernels (gohsp.freeze)",
    **{name: f"the same, {formats.FORMATS[weights].about}" for name, weights in ROUNDED.items()},
}
ROUNDS = {1: 60, BATCH: 20}  # how often each model is timed, by batch size


@dataclass
class Row:
    """One model of the comparison; a row of the table.

    `distance` is the relative norm ||logits - masked|| / ||masked|| to the masked dense model over the test images,
    `same_class` the share of them that both give the same class. `ms` holds milliseconds an image (median, p20, p80)
    by batch size and `times_gohsp` how many times as long as gohsp that is. `note` says why a model could not run.
    """

    name: str
    about: str
    params: int
    macs: int
    top1: float | None = None
    distance: float | None = None
    same_class: float | None = None
    ms: dict[str, dict[str, float]] = field(default_factory=dict)
    times_gohsp: dict[str, float] = field(default_factory=dict)
    note: str = ""


def sized(name: str, classifier: Classifier, image_size: int) -> Row:
    """A row with the parameters and the MACs an image of a dense or compressed classifier, the head's included."""
    cost = gohsp.count(classifier.backbone, image_size)
    head = classifier.head
    params = cost.params + sum(p.numel() for p in head.parameters())
    return Row(name, ABOUT[name], params, cost.macs + head.weight.numel())


def relative_distance(logits: Tensor, reference: Tensor) -> float:
    """||logits - reference|| / ||reference||, in float64."""
    reference = reference.double()
    return ((logits.double() - reference).norm() / reference.norm()).item()


def compile_for(model: nn.Module, images: Tensor) -> Model:
    """`model` under torch.compile, compiled for every batch size that is timed before it is returned.

    images: float32 [>= BATCH, 3, size, size]. Raises what the compiler raises, if anything does.
    """
    compiled = torch.compile(model, dynamic=False)
    for size in ROUNDS:
        compiled(images[:size])
    return compiled


def judge(row: Row, logits: Tensor, masked: Tensor, labels: Tensor) -> None:
    """Fill in accuracy and agreement from the test images' logits [n, classes] and the masked dense model's."""
    row.top1 = top1(logits, labels)
    row.distance = relative_distance(logits, masked)
    row.same_class = (logits.argmax(dim=1) == masked.argmax(dim=1)).double().mean().item()


def time_rows(
    rows: Mapping[str, Row], models: Mapping[str, Model], images: Tensor, after_round: Callable[[], object]
) -> None:
    """Time all `models` in turns at each batch size; writes milliseconds an image into `rows` of the same names.

    images: float32 [>= BATCH, 3, size, size].
    """
    for size, rounds in ROUNDS.items():
        batch = images[:size].contiguous()
        calls = {name: partial(model, batch) for name, model in models.items()}
        timings = timing.interleave(calls, rounds, after_round=after_round)
        for name, measured in timings.items():
            scale = 1000 / size
            rows[name].ms[str(size)] = {q: getattr(measured, q) * scale for q in ("median", "p20", "p80")}
            rows[name].times_gohsp[str(size)] = measured.ratio_to(timings[GOHSP])


@torch.no_grad()
def compare(
    classifiers: Mapping[str, Classifier],
    compressed: Classifier,
    test: Images,
    image_size: int,
    compiler: bool,
    steps: Steps,
) -> tuple[dict[str, Row], dict[str, Tensor]]:
    """Judge and time the dense, masked, sliced and gohsp classifiers; where `compiler` says so the sliced one under
    torch.compile as well, which takes some minutes for heads of many widths.

    Where there is none for some form of weights, its row says so. `compressed` is the pruned one as it is before it is
    frozen, which tells its size.

    Returns the rows of the table and the logits [n, classes] on the test images, both by the names of `ABOUT`.
    """
    cut = sized(GOHSP, compressed, image_size)
    rows = {name: sized(name, classifiers[name], image_size) for name in (DENSE, MASKED)}
    rows |= {name: Row(name, ABOUT[name], cut.params, cut.macs) for name in (SLICED, COMPILED, GOHSP, *ROUNDED)}
    for name in ROUNDED.keys() - classifiers.keys():
        rows[name].note = f"could not run here: {gk.can_run('cpu', weights=ROUNDED[name]).reason}"

    example = next(test.batches(BATCH))
    models: dict[str, Model] = dict(classifiers)
    if not compiler:
        del rows[COMPILED]
    else:
        with steps.step("torch.compile of the sliced model, some minutes"):
            try:
                models[COMPILED] = compile_for(classifiers[SLICED], example)
            except Exception as error:  # whatever stops the compiler: the other rows stand, and this one says why
                reason = str(error).strip().partition("\n")[0]
                rows[COMPILED].note = f"could not compile here: {type(error).__name__}: {reason}"

    logits = {}
    total = len(models) * test.batch_count(BATCH)
    with steps.step(f"logits of {len(test)} test images, {len(models)} models", total) as advance:
        for name, model in models.items():
            logits[name] = collect(model, each(test.batches(BATCH), advance))
    for name, result in logits.items():
        judge(rows[name], result, logits[MASKED], test.labels)
    with steps.step("timing, in turns, at batch 1 and 8", sum(ROUNDS.values())) as advance:
        time_rows(rows, models, example, advance)
    return rows, logits
