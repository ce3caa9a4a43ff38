# SPDX-License-Identifier: Apache-2.0
"""Budgets: how many heads, channels and neurons each block keeps so that the whole model costs what was asked for.

One solver over all blocks and kinds of groups together. It takes steps from queues, always the step that loses least
for each unit of cost that it saves, until the target is met, and then puts back what still fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gohsp.count import BlockSize, count_block

COSTS = ("params", "macs")
GROUPS = ("heads", "hidden", "qk", "v")


@dataclass(frozen=True)
class Step:
    """One step of an elimination, as the budget sees it.

    Attributes:
        size: Channels or neurons that go; for heads 1.
        loss: What it costs, on a scale that the blocks share.
        head: The head that goes or gives channels; None for neurons.
    """

    size: int
    loss: float
    head: int | None = None


@dataclass(frozen=True)
class BlockBudget:
    """What a block keeps: heads, QK and V channels summed over the kept heads, neurons."""

    heads: int
    qk: int
    v: int
    hidden: int


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


class BlockPlan:
    """The state of one block while its budget is being found.

    Args:
        block: The dense block, for its cost.
        dense: Its widths.
        heads: H.
        tokens: N.
        queues: Steps by kind of group, in the order in which they have to be taken.
    """

    def __init__(self, block: Any, dense: BlockSize, heads: int, tokens: int, queues: Mapping[str, list[Step]]) -> None:
        self.block, self.dense, self.tokens = block, dense, tokens
        self.widths = {"qk": [dense.qk // heads] * heads, "v": [dense.v // heads] * heads}
        self.alive = [True] * heads
        self.hidden = dense.hidden
        self.queues = {kind: _never_cheaper(steps) for kind, steps in queues.items()}
        self.taken: dict[str, list[Step]] = {kind: [] for kind in queues}

    def budget(self) -> BlockBudget:
        """Return what the block keeps now."""
        return BlockBudget(sum(self.alive), self._width("qk"), self._width("v"), self.hidden)

    def cost(self, kind: str) -> int:
        """Return the block's parameters or MACs now."""
        kept = self.budget()
        d = self.dense
        size = BlockSize(kept.qk, kept.v, kept.hidden, d.attn_in, d.attn_out, d.mlp_in, d.mlp_out)
        return int(getattr(count_block(self.block, size, self.tokens), kind))

    def next(self, group: str) -> Step | None:
        """Return the step that would be taken next: the first of the queue whose head is still there."""
        index = self._next_index(group)
        return None if index is None else self.queues[group][index]

    def take(self, group: str) -> None:
        """Take the next step of a queue.

        Raises:
            ValueError: There is none.
        """
        index = self._next_index(group)
        if index is None:
            raise ValueError(f"group: {group} has no step left")
        step = self.queues[group].pop(index)
        self.taken[group].append(step)
        self._apply(group, step, -1)

    def last(self, group: str) -> Step | None:
        """Return the step that was taken last, if there is one and it can be put back."""
        step = self.taken[group][-1] if self.taken[group] else None
        return step if step is not None and self._applies(group, step) else None

    def put_back(self, group: str) -> None:
        """Undo the step that was taken last."""
        step = self.taken[group].pop()
        self.queues[group].insert(0, step)
        self._apply(group, step, 1)

    def _apply(self, group: str, step: Step, sign: int) -> None:
        if group == "hidden":
            self.hidden += sign * step.size
        elif group == "heads":
            assert step.head is not None
            self.alive[step.head] = sign > 0
        else:
            assert step.head is not None
            self.widths[group][step.head] += sign * step.size

    def _next_index(self, group: str) -> int | None:
        return next((i for i, step in enumerate(self.queues[group]) if self._applies(group, step)), None)

    def _applies(self, group: str, step: Step) -> bool:
        """Return whether a step means anything now: channels of a head that has gone cannot go or come back."""
        return group not in self.widths or (step.head is not None and self.alive[step.head])

    def _width(self, kind: str) -> int:
        return sum(width for width, alive in zip(self.widths[kind], self.alive, strict=True) if alive)


def allocate(plans: list[BlockPlan], kind: str, share: float, dense_total: int) -> list[BlockBudget]:
    """Find what each block keeps so that the model costs at most a share of what the dense model costs.

    Steps are taken in the order of their loss for each unit of cost saved, over all blocks and groups together. Were
    the losses of each queue convex and the steps small, no other choice of the same cost would lose less. The last step
    may overshoot, so afterwards whatever fits is put back, the dearest first: the result is below the target by less
    than any single step that could still be put back.

    Args:
        plans: The blocks, whole. They are changed.
        kind: "params" or "macs".
        share: Of the dense model's cost to keep, above 0 and at most 1. Costs are whole numbers: one that is above
            ``share * dense_total`` by less than a millionth is on the target, not over it.
        dense_total: The dense model's cost, with all that is outside the blocks.

    Raises:
        ValueError: The target cannot be reached; the message names the nearest share that can.
    """
    costs = [plan.cost(kind) for plan in plans]
    outside = dense_total - sum(costs)
    # Costs are whole numbers; a share that was computed from one has to admit it in spite of rounding.
    limit = math.floor(share * dense_total + 1e-6)
    offers = {index: _offers(plan, kind) for index, plan in enumerate(plans)}
    while outside + sum(costs) > limit:
        options = [(density, index, group) for index, block in offers.items() for group, density in block.items()]
        if not options:
            least = (outside + sum(costs)) / dense_total
            raise ValueError(
                f"target: {share:.4g} of the {kind} is out of reach with groups "
                f"{', '.join(plans[0].queues)}; the least that can be kept is {least:.4f}"
            )
        _, index, group = min(options)
        plans[index].take(group)
        costs[index] = plans[index].cost(kind)
        offers[index] = _offers(plans[index], kind)
    _put_back_what_fits(plans, kind, limit - outside)
    return [plan.budget() for plan in plans]


def _never_cheaper(steps: list[Step]) -> list[Step]:
    """Raise the loss of each step to that of the dearest before it: nobody gets the one without the other."""
    raised, highest = [], 0.0
    for step in steps:
        highest = max(highest, step.loss)
        raised.append(Step(step.size, highest, step.head))
    return raised


def _offers(plan: BlockPlan, kind: str) -> dict[str, float]:
    """Return, for each group that can give a step, the step's loss for each unit of cost that it saves."""
    before, found = plan.cost(kind), {}
    for group in plan.queues:
        step = plan.next(group)
        if step is not None:
            plan.take(group)
            found[group] = step.loss / (before - plan.cost(kind))
            plan.put_back(group)
    return found


def _put_back_what_fits(plans: list[BlockPlan], kind: str, limit: float) -> None:
    while True:
        room = limit - sum(plan.cost(kind) for plan in plans)
        fitting = []
        for index, plan in enumerate(plans):
            before = plan.cost(kind)
            for group in plan.queues:
                step = plan.last(group)
                if step is None:
                    continue
                plan.put_back(group)
                added = plan.cost(kind) - before
                plan.take(group)
                if added <= room:
                    fitting.append((step.loss / added, index, group))
        if not fitting:
            return
        _, index, group = max(fitting)
        plans[index].put_back(group)
