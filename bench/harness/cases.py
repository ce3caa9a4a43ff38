# SPDX-License-Identifier: Apache-2.0
"""What is measured: a timm model with random weights and what a preset keeps of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import gohsp
from gohsp.count import Count

SEED = 2301
NAMED_PRESETS: Mapping[str, str] = {"base35": "8x1920"}
"""Shapes with a name. base35: DeiT-Base with 35 % of its parameters gone, as 4x960 is of DeiT-Small."""

DEFAULT_RAGGED_SHARE = 0.7


@dataclass(frozen=True)
class Case:
    """A model and what is kept of it, as data.

    Attributes:
        model: timm's name of the architecture.
        preset: "dense"; "4x960" (heads x neurons in each block); "ragged" or "ragged:0.5" (mean share kept);
            "base35"; or the path of a mask file.
        image_size: Side of the images in pixels; None takes the model's own.
    """

    model: str
    preset: str
    image_size: int | None = None

    @property
    def label(self) -> str:
        size = "" if self.image_size is None else f"@{self.image_size}"
        return f"{self.model}{size}/{Path(self.preset).name}"


@dataclass(frozen=True)
class Workload:
    """The models of a case. They share nothing that a contender may change.

    Attributes:
        case: What was asked for.
        dense: The unpruned model, fp32, in evaluation mode.
        mask: What is kept of it.
        uniform: (heads, neurons) where every block keeps just the first so many of both, else None.
    """

    case: Case
    dense: Any
    mask: gohsp.ModelMask
    uniform: tuple[int, int] | None

    @cached_property
    def masked(self) -> nn.Module:
        """The dense model with the pruned entries set to zero: what the mask means."""
        return self.mask.apply_(copy.deepcopy(self.dense))

    def masked_in_double(self) -> Any:
        """Return a copy of the masked dense model in float64: what every contender is checked against."""
        return copy.deepcopy(self.masked).double()

    @cached_property
    def compressed(self) -> Any:
        return gohsp.compress(self.dense, self.mask)

    @cached_property
    def sliced(self) -> Any:
        """The compressed model as plain PyTorch."""
        return gohsp.densify(self.compressed)

    @cached_property
    def dense_count(self) -> Count:
        return gohsp.count(self.dense)

    @cached_property
    def count(self) -> Count:
        return gohsp.count(self.dense, mask=self.mask)

    def images(self, batch: int) -> Tensor:
        """Return random images [batch, C, height, width], the same in every process."""
        height, width = self.dense.patch_embed.img_size
        channels = self.dense.patch_embed.proj.in_channels
        return torch.randn(batch, channels, height, width, generator=_generator())


def load(case: Case) -> Workload:
    """Make the models of a case, with seeded random weights.

    Raises:
        ValueError: The preset is none of those that :class:`Case` names, or does not fit the model.
        RuntimeError: timm does not know the model.
    """
    dense = _model(case)
    mask, uniform = _mask(dense, case.preset)
    mask.validate(dense)
    return Workload(case, dense, mask, uniform)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _model(case: Case) -> Any:
    size = {} if case.image_size is None else {"img_size": case.image_size}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = timm.create_model(case.model, pretrained=False, **size).eval()
        _make_constants_matter(model)
    return model.requires_grad_(False)


@torch.no_grad()
def _make_constants_matter(model: nn.Module) -> None:
    """Give biases and norms values of a trained model's size: timm starts them at 0 and 1, where errors hide."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.05)
        elif re.search(r"gamma(_[12])?$", name):  # timm's Eva has gamma_1 and gamma_2
            parameter.uniform_(0.5, 1.0)
        elif name.endswith("bias_table"):
            parameter.normal_(std=0.5)
        elif "norm" in name and parameter.dim() == 1:
            parameter.normal_(mean=1.0, std=0.1)


def _mask(model: nn.Module, preset: str) -> tuple[gohsp.ModelMask, tuple[int, int] | None]:
    preset = NAMED_PRESETS.get(preset, preset)
    full = gohsp.ModelMask.full(model)
    if preset == "dense":
        return full, (full.geometry.num_heads, full.geometry.hidden)
    if shape := re.fullmatch(r"(\d+)x(\d+)", preset):
        heads, hidden = int(shape[1]), int(shape[2])
        return gohsp.ModelMask.keep_first(model, heads, hidden), (heads, hidden)
    if share := re.fullmatch(r"ragged(?::(0?\.\d+|1))?", preset):
        return ragged(full, float(share[1] or DEFAULT_RAGGED_SHARE)), None
    if Path(preset).is_file():
        return gohsp.ModelMask.load(preset), None
    raise ValueError(
        "preset: wanted dense, HEADSxNEURONS such as 4x960, ragged, ragged:SHARE, "
        f"{', '.join(NAMED_PRESETS)} or a mask file; got {preset!r}"
    )


def ragged(mask: gohsp.ModelMask, share: float = DEFAULT_RAGGED_SHARE) -> gohsp.ModelMask:
    """Cut a full mask, in place, to one in which no two heads, blocks or matrices are alike.

    Every head of every block, and every other field, draws the share that it keeps from an interval of half-width 0.25
    (less near 0 and 1) around ``share``, and then draws which. A quarter of the heads goes. QK channels stay where the
    model has a q and k norm.

    Args:
        mask: The full mask of a model.
        share: Mean share kept, in (0, 1].
    """
    generator = _generator()
    for block in mask.blocks:
        block.heads &= _choose(block.heads.numel(), 0.75, generator)
        for field in ("qk", "v"):
            if field == "qk" and any(size.qk_whole for size in mask.geometry.blocks):
                continue
            for head in getattr(block, field):
                head &= _choose(head.numel(), _draw(share, generator), generator)
        for field in ("hidden", "attn_in", "attn_out", "mlp_in", "mlp_out"):
            kept = getattr(block, field)
            kept &= _choose(kept.numel(), _draw(share, generator), generator)
    return mask


def _draw(share: float, generator: torch.Generator) -> float:
    spread = min(0.25, share, 1 - share)
    return share + spread * float(2 * torch.rand((), generator=generator) - 1)


def _choose(size: int, share: float, generator: torch.Generator) -> Tensor:
    kept = torch.zeros(size, dtype=torch.bool)
    kept[torch.randperm(size, generator=generator)[: max(1, round(share * size))]] = True
    return kept
