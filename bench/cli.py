# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m bench <routine>``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from bench.gpu import paper_model, static
from bench.harness import contenders, environment
from bench.harness.cases import Case
from bench.harness.environment import Settings, available_cores
from bench.harness.results import DEFAULT_PATH
from bench.routines import (
    content,
    contention,
    end_to_end,
    operators,
    proportion,
    pruning,
    roofline,
    sublayers,
    training_step,
)
from bench.studies import keyframes, one_shot, trained
from gohsp.recipe import read_recipe


def spread(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Give each further value of an option its own name: ``--batch 1 8`` becomes ``--batch 1 --batch 8``."""
    result: list[str] = []
    option, values = "", 0
    for argument in arguments:
        if argument.startswith("--"):
            option, values = argument, 0
        else:
            if option in options and values > 0:
                result.append(option)
            values += 1
        result.append(argument)
    return result


class SpreadCommand(TyperCommand):
    """A command whose options that may be repeated also take several values at once."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {name for parameter in self.params for name in parameter.opts if getattr(parameter, "multiple", 0)}
        return super().parse_args(ctx, spread(args, repeatable))


app = typer.Typer(
    help="Benchmarks of gohsp against what else runs a pruned vision transformer on a CPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

Models = Annotated[list[str], typer.Option("--model", help="Models, by timm's names.")]
Presets = Annotated[
    list[str],
    typer.Option("--preset", help="What is kept: dense, HEADSxNEURONS, ragged, ragged:SHARE, base35 or mask files."),
]
Batches = Annotated[list[int], typer.Option("--batch", min=1, help="Images at a time.")]
Names = Annotated[list[str], typer.Option("--contenders", help="Contenders that are compared; all by default.")]
ImageSize = Annotated[int | None, typer.Option(help="Side of the images in pixels; the model's own by default.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of every contender; one a core by default.")]
Rounds = Annotated[int, typer.Option(min=1, help="Timed spans of each contender.")]
Out = Annotated[Path, typer.Option(help="CSV file that results are appended to.")]
BackendList = Annotated[bool, typer.Option("--backend-list", help="List the contenders, who can run here, and exit.")]

MODEL, PRESET, BATCH, ROUNDS = ["deit_small_patch16_224"], ["4x960"], [1, 8], 20
TRAINING_BATCH = [8]
THREADS = available_cores()
CONTENDERS = list(contenders.CONTENDERS)
TARGETS = list(static.SHARED_BYTES)
console = Console()


Routine = Callable[[Sequence[Case], Sequence[int], Settings], Sequence[str]]
"""Measures cases at batches; returns the names of those that were refused for a wrong result."""


def command_over_cases(name: str, routine: Routine, about: str, batches: list[int] = BATCH) -> None:
    """Add the command of a routine that asks for cases and batches and for nothing else.

    Args:
        name: Name of the command.
        routine: What it runs.
        about: The command's help.
        batches: The default of ``--batch``.
    """

    @app.command(name, cls=SpreadCommand, help=about)
    def command(
        model: Models = MODEL,
        preset: Presets = PRESET,
        batch: Batches = batches,
        image_size: ImageSize = None,
        threads: Threads = THREADS,
        rounds: Rounds = ROUNDS,
        out: Out = DEFAULT_PATH,
    ) -> None:
        _finish(routine(_cases(model, preset, image_size), batch, _settings(threads, rounds, out)))


@app.command("end-to-end", cls=SpreadCommand)
def end_to_end_command(
    model: Models = MODEL,
    preset: Presets = PRESET,
    batch: Batches = BATCH,
    names: Names = CONTENDERS,
    image_size: ImageSize = None,
    threads: Threads = THREADS,
    rounds: Rounds = ROUNDS,
    out: Out = DEFAULT_PATH,
    backend_list: BackendList = False,
) -> None:
    """Whole models, from images to logits."""
    if backend_list:
        _list_contenders()
    else:
        _finish(end_to_end.run(_cases(model, preset, image_size), batch, names, _settings(threads, rounds, out)))


command_over_cases("sublayers", sublayers.run, "Attention and MLP sublayers alone, against the same in PyTorch.")


@app.command("kernels")
def kernels_command(
    threads: Threads = THREADS,
    rounds: Rounds = ROUNDS,
    out: Out = DEFAULT_PATH,
) -> None:
    """The operators packed_linear and ragged_attention over shapes, against the same in PyTorch."""
    _finish(operators.run(_settings(threads, rounds, out)))


@app.command("accuracy")
def accuracy_command(
    study: Annotated[str, typer.Argument(help=f"The study: one of {', '.join(one_shot.STUDIES)}.")],
    data: Annotated[Path, typer.Option(help="CIFAR-10 as a folder with train/ and test/, a subfolder a class.")],
    out: Annotated[Path, typer.Option(help="Folder of the CSV files.")] = one_shot.DEFAULT_FOLDER,
    train: Annotated[int, typer.Option(min=10, help="Images that heads are fitted on.")] = 3000,
    test: Annotated[int, typer.Option(min=10, help="Images that top-1 is counted on.")] = 2000,
    calibration: Annotated[int, typer.Option(min=1, help="Images that pruning looks at, without labels.")] = 256,
    minutes: Annotated[float | None, typer.Option(help="Begin no new row after so many minutes.")] = None,
    times: Annotated[
        bool,
        typer.Option("--times", help="Measure what the rows cost instead, on a quiet machine; one-shot is drawn too."),
    ] = False,
) -> None:
    """What pruning keeps of the accuracy of a real ViT-Small on CIFAR-10; a stopped study goes on where it was."""
    if study not in one_shot.STUDIES:
        raise typer.BadParameter(f"study: wanted one of {', '.join(one_shot.STUDIES)}, got {study}")
    if times:
        from bench.harness import charts

        one_shot.add_times(out / f"{study}.csv")
        if study == "one-shot":  # whose rows are points of a line
            charts.draw_accuracy(out / f"{study}.csv", out / f"{study}.svg")
        return
    one_shot.run(study, data, out, train=train, test=test, calibration=calibration, minutes=minutes)


@app.command("keyframes")
def keyframes_command(
    data: Annotated[Path, typer.Option(help="CIFAR-10 as a folder with train/ and test/, a subfolder a class.")],
    out: Annotated[Path, typer.Option(help="Folder of the CSV file.")] = one_shot.DEFAULT_FOLDER,
    train: Annotated[int, typer.Option(min=10, help="Images that the head is fitted on.")] = 2000,
    calibration: Annotated[int, typer.Option(min=1, help="Images that pruning looks at, without labels.")] = 128,
    streams: Annotated[int, typer.Option(min=1, help="Windows that drift, each over a test image.")] = 48,
    frames: Annotated[int, typer.Option(min=1, help="Frames of each.")] = 32,
    seed: Annotated[int, typer.Option(help="Draws the streams and the calibration images.")] = 0,
) -> None:
    """Video: the dense model on key frames and the pruned one in between, against the dense model alone."""
    keyframes.run(data, out, train=train, calibration=calibration, streams=streams, frames=frames, seed=seed)


@app.command("trained", cls=SpreadCommand)
def trained_command(
    data: Annotated[Path, typer.Option(help="CIFAR-10 as a folder with train/ and test/, a subfolder a class.")],
    recipe: Annotated[Path, typer.Option(help="Model, images, pruning and training of all runs.")] = trained.RECIPE,
    methods: Annotated[list[str], typer.Option(help="Methods that are compared.")] = list(trained.METHODS),  # noqa: B006
    seeds: Annotated[list[int], typer.Option(help="Seeds; each method is run once for each.")] = [0, 1, 2],  # noqa: B006
    precision: Annotated[
        str, typer.Option(help="Precision of training: bf16, for CPUs that have AMX, or no, for float32.")
    ] = "no",
    again: Annotated[
        int,
        typer.Option(
            "--again",
            count=True,
            help="Prune the dense models that this study ended with, and train all once more; twice for twice more.",
        ),
    ] = 0,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate instead of the recipe's.")] = None,
    times: Annotated[
        bool, typer.Option("--times", help="Measure what the models cost instead, on a quiet machine.")
    ] = False,
    work: Annotated[Path, typer.Option(help="Folder of the runs, which go on where they were.")] = trained.WORK,
    out: Annotated[Path, typer.Option(help="Folder of the CSV files.")] = one_shot.DEFAULT_FOLDER,
) -> None:
    """Top-1 after light training: dense, gohsp, magnitude, Taylor and Torch-Pruning, all trained alike."""
    changes: dict[str, dict[str, Any]] = {"data": {"source": str(data)}, "fit": {"precision": precision}}
    if lr is not None:
        changes["fit"]["lr"] = lr
    name, own = "trained" + again * "-again", trained.changed(read_recipe(recipe), changes)
    if times:
        trained.add_times(own, methods, work, out / f"{name}-times.csv", again=again)
        return
    trained.run(own, methods, seeds, work, out / f"{name}.csv", again=again)


command_over_cases(
    "roofline",
    roofline.run,
    "gohsp's sublayers against the machine's limits, and where the rest of the time goes.",
)


@app.command("contention", cls=SpreadCommand)
def contention_command(
    model: Models = MODEL,
    preset: Presets = PRESET,
    batch: Batches = BATCH,
    names: Names = CONTENDERS,
    image_size: ImageSize = None,
    threads: Threads = THREADS,
    rounds: Rounds = ROUNDS,
    out: Out = DEFAULT_PATH,
) -> None:
    """Whole models beside another process that spins on one core."""
    _finish(contention.run(_cases(model, preset, image_size), batch, names, _settings(threads, rounds, out)))


@app.command("proportion", cls=SpreadCommand)
def proportion_command(
    model: Annotated[str, typer.Option(help="The model, by timm's name.")] = MODEL[0],
    preset: Presets = ["5x1248", "4x960", "3x768", "2x480", "ragged:0.8", "ragged:0.6"],  # noqa: B006 (typer copies it)
    batch: Batches = BATCH,
    threads: Threads = THREADS,
    rounds: Rounds = ROUNDS,
    out: Out = DEFAULT_PATH,
) -> None:
    """Whether gohsp's time falls in proportion to the multiply-accumulates that are removed."""
    _finish(proportion.run(model, preset, batch, _settings(threads, rounds, out)))


@app.command("pruning", cls=SpreadCommand)
def pruning_command(
    model: Models = MODEL,
    images: Annotated[int, typer.Option(min=1, help="Calibration images.")] = 256,
    image_size: ImageSize = None,
    threads: Threads = THREADS,
    rounds: Rounds = 3,
    out: Out = DEFAULT_PATH,
) -> None:
    """What gohsp.prune itself takes, quiet and beside another process that spins on one core."""
    _finish(pruning.run(model, images, image_size, _settings(threads, rounds, out)))


command_over_cases(
    "content",
    content.run,
    "What a model that is not frozen pays for telling at each call whether its weights have changed.",
)


command_over_cases(
    "training",
    training_step.run,
    "A step of fine-tuning: the compact model against the dense one, masked and not.",
    TRAINING_BATCH,
)


@app.command("gpu-model", cls=SpreadCommand)
def gpu_model_command(
    model: Models = list(paper_model.PRESETS),  # noqa: B006 (typer copies it)
    batch: Batches = list(paper_model.BATCHES),  # noqa: B006
) -> None:
    """Bytes and times of the Triton launches on GPUs that are not here: modelled from data sheets, not measured."""
    paper_model.run(model, batch)


@app.command("gpu-static", cls=SpreadCommand)
def gpu_static_command(
    target: Annotated[
        list[str], typer.Option(help=f"GPUs that the figures are for: some of {', '.join(TARGETS)}.")
    ] = TARGETS,
    triton: Annotated[bool, typer.Option(help="Compile Triton's kernels too; takes minutes the first time.")] = True,
) -> None:
    """Registers, shared memory and occupancy of the GPU kernels, read from the binaries; needs no GPU."""
    raise typer.Exit(static.run(target, triton, console))


@app.command("plot")
def plot_command(
    source: Annotated[Path, typer.Option("--from", help="CSV file of results.")] = DEFAULT_PATH,
    out: Annotated[Path | None, typer.Option(help="Directory of the charts; that of the CSV file by default.")] = None,
) -> None:
    """Charts (SVG) from the CSV file alone."""
    # Here, because matplotlib belongs to an extra of the package.
    from bench.harness import charts

    for path in charts.draw_all(source, out or source.parent):
        console.print(f"wrote {path}")


def _cases(models: Sequence[str], presets: Sequence[str], image_size: int | None) -> list[Case]:
    return [Case(model, preset, image_size) for model in models for preset in presets]


def _settings(threads: int, rounds: int, out: Path) -> Settings:
    torch.set_num_threads(threads)
    return Settings(threads, rounds, out, console)


def _finish(refused: Sequence[str]) -> None:
    if refused:
        console.print(f"refused for a wrong result: {', '.join(sorted({*refused}))}", style="bold red", markup=False)
        raise typer.Exit(1)


def _list_contenders() -> None:
    table = Table("contender", "version", "can run here")
    for name, contender in contenders.CONTENDERS.items():
        reason = contenders.why_not(name)
        table.add_row(name, environment.version_of(contender.library), f"no: {reason}" if reason else "yes")
    console.print(table)
