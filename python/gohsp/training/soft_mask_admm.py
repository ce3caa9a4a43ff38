# SPDX-License-Identifier: Apache-2.0
"""Soft-mask ADMM on a dense-shaped model: the heads that the graph points to and the neurons that matter least fade.

The task is min L(W) over weights W whose pruned groups are zero: so many heads and so many neurons of each block stay.
ADMM (Boyd et al., 2011, in scaled form) splits it: W goes down L + rho/2 ||W - Z + U||^2, Z is the projection of W + U
onto the constraint, and U sums up what is left between them. GOHSP's public record says that the
graph's importance is a soft guide to such an optimisation; the soft mask, its cosine and the rule for rho are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gohsp.masks.mask import ModelMask
from gohsp.models.base import BlockGeometry, Geometry, OpenModel
from gohsp.models.registry import open_model
from gohsp.recipe import Admm

ADMM_GROUPS = ("heads", "hidden")
"""What it prunes."""


@dataclass
class _Split:
    """One weight matrix W of a block, with Z and U; ``by_group`` views any of the three as [groups, ...]."""

    block: int
    heads: bool
    weight: Tensor
    z: Tensor
    u: Tensor
    by_group: Callable[[Tensor], Tensor]


class SoftMaskAdmm:
    """The constraint, Z, U and rho of a model in training.

    Groups are heads (rows of qkv, columns of proj) and neurons (row of fc1, column of fc2). Biases take no part: what a
    bias adds goes through the columns that fade. How many groups stay is given, block by block; which ones is decided
    anew at each projection.

    Args:
        model: Dense vision transformer that gohsp knows; its weights are W.
        plan: How much each block keeps: its counts of heads and neurons are taken, and nothing else.
        importance: Scores of the heads, [H] a block, high = keep; see :func:`gohsp.rank_heads`.
        settings: See :class:`gohsp.recipe.Admm`.
        agree: Makes a tensor the same in all processes.

    Raises:
        ValueError: The plan does not fit the model or prunes anything but heads and neurons, or the importance does not
            fit it.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ModelMask,
        importance: Sequence[Tensor],
        settings: Admm,
        agree: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        opened = open_model(model)
        plan.check_fits(opened.geometry)
        self.size, self.settings, self.agree = opened.geometry, settings, agree
        self.full = ModelMask.full_of(opened)
        self.counts = [_counts(index, plan, self.full) for index in range(self.size.depth)]
        self.guide = _guide(importance, self.size, settings.guidance)
        self.rho, self.softness, self.residual = settings.rho, 1.0, 0.0
        self.splits = list(_split(opened))
        self.kept = self._choose()

    @torch.no_grad()
    def pull_(self, lr: float) -> None:
        """Do the quadratic term's part of a W step: the proximal step of rho/2 ||W - Z + U||^2 with the step size lr.

        It comes after the optimiser's step on L alone, as AdamW's weight decay does, and for the same reason: through
        Adam's normalisation a penalty loses its scale, W follows Z at a pace that rho does not set, and U runs away.
        """
        share = lr * self.rho / (1 + lr * self.rho)
        for part in self.splits:
            part.weight.lerp_(part.z - part.u, share)

    @torch.no_grad()
    def project(self, progress: float) -> float:
        """Do the Z step and the U step, and let rho grow.

        Z keeps the heads of largest guided norm and multiplies the others by the soft mask; of the neurons it keeps
        those of largest norm and sets the others to zero, which is the Euclidean projection.

        Args:
            progress: Share of the stage that is done, from 0 to 1.

        Returns:
            The residual ||W - Z|| / ||W|| over all matrices.
        """
        settings = self.settings
        self.softness = 0.5 * (1 + math.cos(math.pi * min(1.0, progress / settings.anneal)))
        self.kept = self._choose()
        gap = total = torch.zeros((), dtype=torch.float64, device=self.splits[0].z.device)
        for part in self.splits:
            kept = self.kept[part.heads][part.block]
            torch.add(part.weight, part.u, out=part.z)
            part.by_group(part.z)[~kept] *= self.softness if part.heads else 0.0
            difference = part.weight - part.z
            part.u.add_(difference)
            gap, total = gap + difference.double().square().sum(), total + part.weight.double().square().sum()
        grown = max(self.rho, min(settings.rho_max, self.rho * settings.rho_growth))
        # U is the multiplier over rho, so it shrinks as rho grows.
        for part in self.splits:
            part.u.mul_(self.rho / grown)
        self.rho = grown
        self.residual = float(self.agree((gap / total).sqrt()))
        return self.residual

    @property
    def converged(self) -> bool:
        """Whether the soft mask is at zero and the residual below the tolerance."""
        return self.softness == 0.0 and self.residual < self.settings.tolerance

    def mask(self) -> ModelMask:
        """Return the mask of the groups that the last projection kept."""
        mask = ModelMask([block.clone() for block in self.full.blocks], self.full.model, self.full.geometry)
        for index, block in enumerate(mask.blocks):
            block.heads, block.hidden = self.kept[True][index].cpu().clone(), self.kept[False][index].cpu().clone()
        return mask

    def tensors(self) -> dict[str, Tensor]:
        """Return Z, U and what is kept, by name, for a checkpoint."""
        named = {f"{name}.{i}": getattr(part, name) for name in "zu" for i, part in enumerate(self.splits)}
        return {**named, "kept.heads": self.kept[True], "kept.hidden": self.kept[False]}

    def values(self) -> dict[str, float]:
        """Return the numbers that belong to them."""
        return {"rho": self.rho, "softness": self.softness, "residual": self.residual}

    def restore(self, tensors: dict[str, Tensor], values: dict[str, float]) -> None:
        """Take back what :meth:`tensors` and :meth:`values` gave."""
        for index, part in enumerate(self.splits):
            part.z.copy_(tensors[f"z.{index}"])
            part.u.copy_(tensors[f"u.{index}"])
        device = self.splits[0].z.device
        self.kept = {True: tensors["kept.heads"].to(device), False: tensors["kept.hidden"].to(device)}
        self.rho, self.softness, self.residual = values["rho"], values["softness"], values["residual"]

    @torch.no_grad()
    def _choose(self) -> dict[bool, Tensor]:
        """Return which heads (True) and neurons (False) have the largest norms of W + U: bool [blocks, groups]."""
        energy: dict[tuple[bool, int], Tensor] = {}
        for part in self.splits:
            squares = part.by_group(part.weight + part.u).double().square().flatten(1).sum(dim=1)
            energy[part.heads, part.block] = energy.get((part.heads, part.block), 0) + squares
        kept: dict[bool, list[Tensor]] = {True: [], False: []}
        for (heads, index), squares in energy.items():
            scores = squares.sqrt() * (self.guide[index].to(squares) if heads else 1.0)
            kept[heads].append(_largest(scores, self.counts[index][heads]))
        return {heads: self.agree(torch.stack(rows).to(torch.uint8)).bool() for heads, rows in kept.items()}


def _counts(index: int, plan: ModelMask, full: ModelMask) -> dict[bool, int]:
    block, whole = plan.blocks[index].clone(), full.blocks[index].clone()
    whole.heads, whole.hidden = block.heads, block.hidden
    # What is set for the channels of a pruned head means nothing.
    block.qk[~block.heads] = block.v[~block.heads] = True
    if whole != block:
        raise ValueError(
            f"plan: wanted one that prunes heads and hidden neurons only, for ADMM, but blocks[{index}] prunes "
            f"channels or columns; prune with groups={ADMM_GROUPS} for a plan, or fine-tune the model that "
            "gohsp.compress makes of it instead"
        )
    return {True: int(block.heads.sum()), False: int(block.hidden.sum())}


def _guide(importance: Sequence[Tensor], size: Geometry, guidance: float) -> list[Tensor]:
    shapes = [tuple(scores.shape) for scores in importance]
    wanted = [(block.num_heads,) for block in size.blocks]
    if shapes != wanted:
        raise ValueError(f"importance: wanted {size.depth} tensors of shapes {wanted}, got shapes {shapes}")
    return [(len(scores) * scores.double()) ** guidance for scores in importance]


def _split(opened: OpenModel) -> Iterator[_Split]:
    for index, block in enumerate(opened.blocks):
        size, mlp, read, write = block.geometry, block.mlp, block.attention.read, block.attention.write
        matrices: list[tuple[nn.Linear, bool, Callable[[Tensor], Tensor]]] = [
            *((layer, True, partial(read.rows_by_head, num_heads=size.num_heads)) for layer in read.layers),
            *((layer, True, partial(write.columns_by_head, num_heads=size.num_heads)) for layer in write.layers),
            *((layer, False, partial(_rows, size=size)) for layer in mlp.read.layers),
            *((layer, False, _columns) for layer in mlp.write.layers),
        ]
        for linear, is_attention, by_group in matrices:
            z = linear.weight.detach().clone()
            yield _Split(index, is_attention, linear.weight, z, torch.zeros_like(z), by_group)


def _rows(weight: Tensor, size: BlockGeometry) -> Tensor:
    """View the rows of neurons, and of their gates where these lie below each other, as [M, parts, inputs]."""
    return weight.view(-1, size.hidden, weight.shape[1]).transpose(0, 1)


def _columns(weight: Tensor) -> Tensor:
    return weight.T


def _largest(scores: Tensor, count: int) -> Tensor:
    kept = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    # Stable, so that equal scores are decided alike everywhere.
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept
