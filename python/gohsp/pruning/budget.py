# SPDX-License-Identifier: Apache-2.0
"""Budgets: how many heads, channels, neurons and columns each block keeps so that the model costs what was asked for.

Every sublayer offers a list of options, from whole to bare, each with its exact cost and what it is expected to lose.
Picking one option a sublayer, so that the costs stay within the target and the losses sum to the least, is the
multiple-choice knapsack problem, which :func:`solve` solves by dynamic programming over all sublayers together.
:func:`soft_solve` is the same with its minimum smoothed, so that what is picked can be differentiated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gohsp.count import BlockSize, count_block
from gohsp.models.base import OpenBlock

COSTS = ("params", "macs", "ms")
ATTENTION_GROUPS = ("heads", "qk", "v", "attn_in", "attn_out")
MLP_GROUPS = ("hidden", "mlp_in", "mlp_out")
GROUPS = ATTENTION_GROUPS + MLP_GROUPS

CELLS = 1 << 16  # into which the room between the least and the target is divided; costs are rounded up to one
SOFT_CELLS = 1 << 10  # the same where all options of all cells are kept for a gradient


@dataclass(frozen=True)
class Step:
    """One step of an elimination, as the budget sees it.

    Attributes:
        size: Channels, neurons or columns that go; for heads 1.
        loss: What it costs, on a scale that the blocks share.
        head: The head that goes or gives channels; None for neurons and columns.
    """

    size: int
    loss: float
    head: int | None = None


@dataclass(frozen=True)
class BlockBudget(BlockSize):
    """What a block keeps: heads, QK and V channels summed over these, neurons, residual features read and written."""


@dataclass(frozen=True)
class Option:
    """One way to cut a sublayer: its cost, its loss, and the widths (fields of :class:`BlockBudget`) that it sets."""

    cost: float
    loss: float
    widths: Mapping[str, int]


BlockCost = Callable[[BlockBudget], tuple[float, float]]  # of the attention half and of the MLP half


def parse_target(target: Mapping[str, float]) -> tuple[str, float]:
    """Return the kind of cost and the share of it to keep.

    Raises:
        TypeError: The target is not a mapping.
        ValueError: It does not name exactly one known cost, or the share is not above 0 and at most 1.
    """
    if not isinstance(target, Mapping):
        raise TypeError(f"target: wanted a mapping such as {{'params': 0.65}}, got {type(target).__name__}")
    if len(target) != 1 or next(iter(target)) not in COSTS:
        raise ValueError(
            f"target: wanted one of {' or '.join(COSTS)}, such as {{'params': 0.65}}, got {dict(target)!r}"
        )
    ((kind, share),) = target.items()
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"target: wanted a share of {kind} above 0 and at most 1, got {share!r}")
    return kind, float(share)


def counted(block: OpenBlock, attended: tuple[int, int], kind: str) -> BlockCost:
    """Return the exact cost of a dense block's halves, in "params" or "macs", as a function of what it keeps.

    Args:
        block: The dense block.
        attended: How many tokens it sees, and to how many each of them attends.
        kind: "params" or "macs".
    """

    def cost(budget: BlockBudget) -> tuple[float, float]:
        found = count_block(block, budget, attended)
        return getattr(found, f"attn_{kind}"), getattr(found, f"mlp_{kind}")

    return cost


@dataclass(frozen=True)
class BlockPlan:
    """What the budget knows of one block.

    Attributes:
        full: The block whole.
        queues: Steps by kind of group, in the order in which they have to be taken.
        cost: Of the block's halves.
    """

    full: BlockBudget
    queues: Mapping[str, Sequence[Step]]
    cost: BlockCost

    def options(self, half: int, floors: Mapping[str, float]) -> list[Option]:
        """Return the options of the attention half (0) or the MLP half (1), from whole to bare.

        Each follows from the one before by one step: of the groups' next steps the one that loses least for each unit
        of cost saved. With a single kind of group this order is the elimination's own.

        Args:
            half: 0 or 1.
            floors: The least share of a kind of group that stays.
        """
        state = _HalfState(self, ATTENTION_GROUPS if half == 0 else MLP_GROUPS, floors)
        options = [Option(self.cost(self.full)[half], 0.0, state.widths())]
        while True:
            offers = []
            for group, step in state.offers():
                widths = state.widths_after(group, step)
                cost = self.cost(replace(self.full, **widths))[half]
                saved = max(options[-1].cost - cost, 1e-12 * options[0].cost)
                offers.append((step.loss / saved, group, step, Option(cost, options[-1].loss + step.loss, widths)))
            if not offers:
                return options
            _, group, step, option = min(offers, key=lambda offer: offer[0])
            state.take(group, step)
            options.append(option)


class _HalfState:
    """The widths of half a block while its options are being listed."""

    def __init__(self, plan: BlockPlan, groups: Iterable[str], floors: Mapping[str, float]) -> None:
        self.queues = {group: _never_cheaper(plan.queues[group]) for group in groups if group in plan.queues}
        self.kept = {group: getattr(plan.full, group) for group in groups}
        self.least = {group: floors.get(group, 0.0) * width for group, width in self.kept.items()}
        heads = plan.full.heads
        self.head_widths = {group: [getattr(plan.full, group) // heads] * heads for group in ("qk", "v")}
        self.alive = [True] * heads

    def widths(self) -> dict[str, int]:
        return dict(self.kept)

    def offers(self) -> list[tuple[str, Step]]:
        """Return the next step of each group that can give one: channels of a head that has gone do not count."""
        found = []
        for group, queue in self.queues.items():
            while queue and group in ("qk", "v") and not self.alive[self._head(queue[0])]:
                queue.pop(0)
            if queue and self.widths_after(group, queue[0])[group] >= self.least[group]:
                found.append((group, queue[0]))
        return found

    def widths_after(self, group: str, step: Step) -> dict[str, int]:
        """Return the widths that a step would leave."""
        after = self.widths()
        after[group] -= step.size
        if group == "heads":
            for name, widths in self.head_widths.items():
                after[name] -= widths[self._head(step)]
        return after

    def take(self, group: str, step: Step) -> None:
        self.kept = self.widths_after(group, step)
        self.queues[group].pop(0)
        if group == "heads":
            self.alive[self._head(step)] = False
        elif group in ("qk", "v"):
            self.head_widths[group][self._head(step)] -= step.size

    @staticmethod
    def _head(step: Step) -> int:
        assert step.head is not None
        return step.head


def allocate(
    plans: Sequence[BlockPlan],
    share: float,
    outside: float,
    floors: Mapping[str, float] | None = None,
    dense: float | None = None,
) -> list[BlockBudget]:
    """Find what each block keeps so that the model costs at most a share of what the dense model costs.

    Args:
        plans: The blocks.
        share: Of the dense model's cost to keep, above 0 and at most 1. Where costs are whole numbers, one that is
            above ``share * dense`` by less than a millionth is on the target, not over it.
        outside: Cost of all that is not in the blocks.
        floors: The least share of a kind of group that stays in each block.
        dense: Cost of the dense model; None where its blocks cost what whole compact ones do. They cost less where some
            of q, k and v lack a bias, because the compact ones have one for all.

    Raises:
        ValueError: The target cannot be reached; the message names the nearest share that can.
    """
    choices = [plan.options(half, floors or {}) for plan in plans for half in (0, 1)]
    if dense is None:
        dense = outside + sum(options[0].cost for options in choices)
    least = outside + sum(min(option.cost for option in options) for options in choices)
    # A share that was computed from a whole number has to admit it in spite of rounding.
    limit = share * dense + 1e-6
    if least > limit:
        groups = ", ".join(plans[0].queues)
        raise ValueError(
            f"target: {share:.4g} of the cost is out of reach with groups {groups}; "
            f"the least that can be kept is {math.ceil(1e4 * least / dense) / 1e4:.4f}"
        )
    picked = [options[index] for options, index in zip(choices, solve(choices, limit - outside), strict=True)]
    return [
        replace(plan.full, **attention.widths, **mlp.widths)
        for plan, attention, mlp in zip(plans, picked[::2], picked[1::2], strict=True)
    ]


def solve(choices: Sequence[Sequence[Option]], limit: float) -> list[int]:
    """Pick one option of each choice so that the costs sum to at most ``limit`` and the losses to the least.

    Dynamic programming over the room above the least possible cost, in cells of a 65536th of it. Costs are rounded up
    to a cell, so the sum never exceeds the limit; what the rounding leaves is spent afterwards on whatever single
    change gains most for its cost.

    Raises:
        ValueError: Nothing fits.
    """
    cells = _in_cells(choices, limit, CELLS)
    best = np.zeros(CELLS + 1)  # least loss of the choices so far for each room
    takes = np.zeros((len(choices), CELLS + 1), dtype=np.int32)
    for row, (options, sizes) in enumerate(zip(choices, cells, strict=True)):
        following = np.full(CELLS + 1, np.inf)
        for index, (option, size) in enumerate(zip(options, sizes, strict=True)):
            if size > CELLS:
                continue
            losses = best[: CELLS + 1 - size] + option.loss
            better = losses < following[size:]
            following[size:][better] = losses[better]
            takes[row, size:][better] = index
        best = following
    picks, left = [0] * len(choices), CELLS
    for row in reversed(range(len(choices))):
        picks[row] = int(takes[row, left])
        left -= cells[row][picks[row]]
    return _spend_the_rest(choices, picks, limit)


def soft_solve(
    choices: Sequence[Sequence[Option]],
    losses: Sequence[Tensor],
    limit: float,
    temperature: float,
    cells: int = SOFT_CELLS,
) -> Tensor:
    """Return the least loss that fits, as :func:`solve` finds it, with the minimum smoothed by entropy.

    With L the sum of the losses of a pick of one option of each choice, it is ``-T log sum exp(-L / T)`` over all picks
    that fit. The smooth minimum goes through the recursion of the dynamic programme, step by step, and its gradient
    by the losses is the distribution of what is picked; both are those of Mensch and Blondel (2018), who do it for
    paths. For a knapsack it is ours. As T falls to 0 the value becomes the least loss and the distribution certain.
    Differentiable twice, so that a training can go through the distribution; see :func:`expected_choices`.

    Args:
        choices: The costs of the options; their own losses are not looked at.
        losses: In their place, one tensor [options] a choice.
        limit: Of the sum of the costs.
        temperature: T, above 0, on the scale of the losses.
        cells: Into which the room above the least cost is divided. Costs are rounded up to one, and what the rounding
            leaves is not spent.

    Raises:
        ValueError: Nothing fits, or the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: wanted one above 0, got {temperature}")
    best = torch.zeros_like(losses[0][:1]).expand(cells + 1)
    room = torch.arange(cells + 1, device=best.device)
    for sizes, added in zip(_in_cells(choices, limit, cells), losses, strict=True):
        left = room - torch.tensor([min(size, cells + 1) for size in sizes], device=best.device)[:, None]
        exponents = -(best[left.clamp_min(0)] + added[:, None]) / temperature
        best = -temperature * exponents.masked_fill(left < 0, -math.inf).logsumexp(dim=0)
    return best[-1]


def expected_choices(
    choices: Sequence[Sequence[Option]],
    losses: Sequence[Tensor],
    limit: float,
    temperature: float,
    cells: int = SOFT_CELLS,
) -> list[Tensor]:
    """Return how likely each option is, [options] a choice: the gradient of :func:`soft_solve` by the losses.

    Every pick that has a part in it fits, so that its costs do on average. Differentiable where the losses are.
    """
    with torch.enable_grad():
        own = [loss if loss.requires_grad else loss.detach().requires_grad_() for loss in losses]
        value = soft_solve(choices, own, limit, temperature, cells)
        return list(torch.autograd.grad(value, own, create_graph=any(of.requires_grad for of in losses)))


def _in_cells(choices: Sequence[Sequence[Option]], limit: float, count: int) -> list[list[int]]:
    """Return what each option costs above the least of its choice, rounded up to cells of the room that there is.

    Raises:
        ValueError: Nothing fits.
    """
    floor = [min(option.cost for option in options) for options in choices]
    room = limit - sum(floor)
    if room < 0:
        raise ValueError(f"limit: wanted at least {sum(floor)}, got {limit}")
    cell = max(room, 1e-300) / count  # with no room at all, only what costs nothing more fits
    return [
        [math.ceil((option.cost - least) / cell) for option in options]
        for options, least in zip(choices, floor, strict=True)
    ]


def _spend_the_rest(choices: Sequence[Sequence[Option]], picks: list[int], limit: float) -> list[int]:
    while True:
        spent = sum(options[pick].cost for options, pick in zip(choices, picks, strict=True))
        gains = []
        for row, (options, pick) in enumerate(zip(choices, picks, strict=True)):
            for index, option in enumerate(options):
                added, gain = option.cost - options[pick].cost, options[pick].loss - option.loss
                if gain > 0 and spent + added <= limit:
                    gains.append((gain / max(added, 1e-12 * limit), row, index))
        if not gains:
            return picks
        _, row, index = max(gains)
        picks[row] = index


def _never_cheaper(steps: Sequence[Step]) -> list[Step]:
    """Raise the loss of each step to that of the dearest before it: nobody gets the one without the other."""
    raised, highest = [], 0.0
    for step in steps:
        highest = max(highest, step.loss)
        raised.append(Step(step.size, highest, step.head))
    return raised
