# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: tables in the terminal, results.json, and one self-contained report.html."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gohsp.files import write_text

KEPT = ("QK", "V", "MLP")
PALE, DEEP = (236, 241, 250), (22, 62, 138)  # ends of the colour scale for importance


@dataclass(frozen=True)
class Scale:
    """A scale of colours for the importance of heads: from half of an even share, pale, to one and a half, deep."""

    heads: int

    def share(self, score: float) -> float:
        """Where `score` lies on the scale, 0 to 1; an even share of the block lies in the middle."""
        return min(max(score * self.heads - 0.5, 0.0), 1.0)

    def color(self, score: float) -> str:
        """The colour of `score` as #rrggbb."""
        return "#" + "".join(f"{round(a + self.share(score) * (b - a)):02x}" for a, b in zip(PALE, DEEP, strict=True))

    def ink(self, score: float) -> str:
        """A colour of writing that can be read on the colour of `score`."""
        return "#ffffff" if self.share(score) > 0.55 else "#1c2430"


def si(value: float) -> str:
    """A large count in three significant digits: 14.3 M, 2.97 G."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{value:g}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"


def scientific(value: float | None) -> str:
    """A distance: 0 and large ones as they are, small ones by their power of ten."""
    if value is None:
        return ""
    return f"{value:.1e}" if 0 < value < 1e-3 else f"{value:.3g}"


def render(results: dict[str, Any]) -> str:
    """The report as one HTML page that refers to nothing outside itself."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(si=si, percent=percent, scientific=scientific)
    by_name = {row["name"]: row for row in results["rows"]}

    def slowest(batch: str) -> float:
        return max(row["ms"][batch]["p80"] for row in results["rows"] if row["ms"])

    page = environment.get_template("report.html.j2")
    return page.render(**results, by_name=by_name, scale=Scale(results["geometry"]["num_heads"]), slowest=slowest)


def write(results: dict[str, Any], out: Path) -> Path:
    """Write results.json and report.html into the folder `out`; returns the report's path."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(out / "report.html", render(results))
    return out / "report.html"


def table_of(title: str, first: str, others: Iterable[str]) -> Table:
    """An empty table that fits 80 columns: names on the left, numbers on the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def heads_table(results: dict[str, Any]) -> Table:
    """Importance of each head (block x head) on its colour, pruned heads struck through, and what the block kept."""
    scale = Scale(results["geometry"]["num_heads"])
    heads = [f"head {head}" for head in range(results["geometry"]["num_heads"])]
    table = table_of("Importance of each head, % (struck out: pruned), and what was kept", "block", [*heads, *KEPT])
    for index, (block, left) in enumerate(zip(results["importance"], results["kept"], strict=True)):
        cells = []
        for score, alive in zip(block, left["heads"], strict=True):
            style = f"{scale.ink(score)} on {scale.color(score)}" + ("" if alive else " strike")
            cells.append(Text(f" {100 * score:4.1f} ", style=style))
        table.add_row(str(index), *cells, str(sum(left["qk"])), str(sum(left["v"])), str(left["hidden"]))
    return table


def models_table(results: dict[str, Any]) -> Table:
    """The comparison of the models, a row each."""
    title = "The models, and their ms an image at batch 1 and 8 (ratio: to gohsp's)"
    names = ("params", "MACs", "top-1", "distance", "ms, 1", "ratio", "ms, 8", "ratio")
    table = table_of(title, "model", names)
    for row in results["rows"]:
        cells = [row["name"], si(row["params"]), si(row["macs"]), percent(row["top1"]), scientific(row["distance"])]
        for batch, time in row["ms"].items():
            cells += [f"{time['median']:.2f}", f"{row['times_gohsp'][batch]:.2f}"]
        table.add_row(*cells, style="bold green" if row["name"] == "gohsp" else "")
    table.caption = "distance: of the logits from the masked dense model's, relative norm"
    table.caption_justify = "left"
    return table


def show(results: dict[str, Any], console: Console) -> None:
    """Print the tables and the notes."""
    console.print()
    console.print(heads_table(results))
    console.print()
    console.print(models_table(results))
    for row in results["rows"]:
        if row["note"]:
            console.print(f"[yellow]{row['name']}[/]: {escape(row['note'])}")
    system = results["machine"]
    told = f"{system['processor']}, {system['threads']} threads; kernels: {system['kernels']}"
    console.print(told, style="dim", markup=False)
