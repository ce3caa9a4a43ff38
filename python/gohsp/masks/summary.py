# SPDX-License-Identifier: Apache-2.0
"""The table of a mask, as text: what each block keeps, and what that costs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from gohsp.count import Count
from gohsp.masks.layout import BlockLayout
from gohsp.models.base import BlockGeometry, Geometry

_COLUMNS = ("block", "heads", "qk widths", "v widths", "hidden", "attn in/out", "mlp in/out", "params", "MACs")


def table(
    title: str,
    layouts: Sequence[BlockLayout],
    geometry: Geometry,
    pruned: Count,
    dense: Count,
    alone: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a table of what each block keeps: heads, widths, neurons, columns, and shares of params and MACs.

    Args:
        title: Stands above it.
        layouts: What each block keeps.
        geometry: Sizes of the dense model.
        pruned, dense: Costs with the mask and without.
        alone: Names of blocks that stay as they are, with the reason; they stand below.
    """
    rows = Table(title=title)
    for name in _COLUMNS:
        rows.add_column(name, justify="left" if "widths" in name else "right")
    for index, (layout, size) in enumerate(zip(layouts, geometry.blocks, strict=True)):
        rows.add_row(str(index), *_kept(layout, size), *_shares_kept(pruned.blocks[index], dense.blocks[index]))
    rows.add_section()
    rows.add_row("model", *[""] * 6, *_shares_kept(pruned, dense))
    text = io.StringIO()
    Console(file=text, width=200, color_system=None).print(rows)
    return text.getvalue() + "".join(f"as it is: {name} ({reason})\n" for name, reason in alone)


def _kept(layout: BlockLayout, size: BlockGeometry) -> tuple[str, ...]:
    heads = f"{len(layout.heads)}/{size.num_heads}"
    hidden = f"{layout.hidden.numel()}/{size.hidden}"
    attn = f"{_number(layout.attn_in, size)}/{_number(layout.attn_out, size)}"
    mlp = f"{_number(layout.mlp_in, size)}/{_number(layout.mlp_out, size)}"
    return heads, _widths(layout.qk_widths), _widths(layout.v_widths), hidden, attn, mlp


def _number(columns: Tensor | None, size: BlockGeometry) -> int:
    return size.dim if columns is None else columns.numel()


def _widths(widths: Sequence[int]) -> str:
    if len(widths) > 1 and len(set(widths)) == 1:
        return f"{len(widths)} x {widths[0]}"
    return " ".join(map(str, widths)) or "-"


def _shares_kept(pruned: Any, dense: Any) -> tuple[str, str]:
    params = f"{pruned.params / 1e6:.3f} M  {pruned.params / dense.params:4.0%}"
    macs = f"{pruned.macs / 1e6:.1f} M  {pruned.macs / dense.macs:4.0%}"
    return params, macs
