# SPDX-License-Identifier: Apache-2.0
"""The budget solver: exact costs, closeness to the target, order of the steps, floors, targets out of reach."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gohsp import ModelMask, count
from gohsp.budget import BlockBudget, BlockPlan, Step, allocate, parse_target
from gohsp.count import BlockSize

HEADS, WIDTH, HIDDEN, DIM = 3, 64, 768, 192


def steps_of(losses: list[float], size: int, heads: list[int] | None = None) -> list[Step]:
    return [Step(size, loss, None if heads is None else heads[index]) for index, loss in enumerate(losses)]


def plans_for(model: Any, queues: list[dict[str, list[Step]]], tokens: int = 10) -> list[BlockPlan]:
    dense = BlockSize(HEADS * WIDTH, HEADS * WIDTH, HIDDEN, DIM, DIM, DIM, DIM)
    return [BlockPlan(block, dense, HEADS, tokens, queue) for block, queue in zip(model.blocks, queues, strict=True)]


def random_queues(seed: int, kinds: tuple[str, ...], blocks: int = 2) -> list[dict[str, list[Step]]]:
    generator = torch.Generator().manual_seed(seed)

    def losses(number: int) -> list[float]:
        scale = 10 ** (2 * torch.rand(1, generator=generator).item())
        return (torch.rand(number, generator=generator, dtype=torch.float64) * scale).sort().values.tolist()

    def heads(repeats: int, number: int) -> list[int]:
        order = torch.randperm(HEADS, generator=generator).tolist()
        return [head for _ in range(repeats) for head in order][:number]

    made = {
        "heads": lambda: steps_of(losses(2), 1, heads(1, 2)),
        "hidden": lambda: steps_of(losses(47), 16),
        "qk": lambda: steps_of(losses(21), 8, heads(7, 21)),
        "v": lambda: steps_of(losses(21), 8, heads(7, 21)),
    }
    return [{kind: made[kind]() for kind in kinds} for _ in range(blocks)]


def mask_of(model: Any, budgets: list[BlockBudget]) -> ModelMask:
    """A mask with those numbers; which ones is of no account for the cost, but heads keep a channel each."""
    mask = ModelMask.full(model)
    for block, budget in zip(mask.blocks, budgets, strict=True):
        block.heads[budget.heads :] = False
        block.hidden[budget.hidden :] = False
        for name in ("qk", "v"):
            channels = torch.zeros(WIDTH, budget.heads, dtype=torch.bool).flatten()
            channels[: getattr(budget, name)] = True
            kept = torch.zeros_like(block.v)
            kept[: budget.heads] = channels.view(WIDTH, budget.heads).T
            setattr(block, name, kept)
    return mask


GROUP_SETS = [("heads", "hidden"), ("hidden",), ("heads", "hidden", "qk", "v"), ("qk", "v")]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kinds=st.sampled_from(GROUP_SETS),
    kind=st.sampled_from(["params", "macs"]),
    share=st.floats(0.78, 1.0),
)
@example(seed=0, kinds=GROUP_SETS[0], kind="params", share=0.9999999999999999)
def test_the_result_is_counted_exactly_and_just_below_the_target(make_model, seed, kinds, kind, share) -> None:
    model = make_model()
    dense = count(model)
    total = getattr(dense, kind)
    plans = plans_for(model, random_queues(seed, kinds), dense.tokens)
    budgets = allocate(plans, kind, share, total)
    got = getattr(count(model, mask=mask_of(model, budgets)), kind)
    assert got == total - sum(getattr(c, kind) for c in dense.blocks) + sum(plan.cost(kind) for plan in plans)
    assert got - share * total < 1e-6  # whole numbers: over by less than that is rounding of the share
    for plan in plans:
        for group in kinds:
            if plan.last(group) is not None:
                before = plan.cost(kind)
                plan.put_back(group)
                assert got + plan.cost(kind) - before > share * total
                plan.take(group)
    for budget in budgets:
        assert 1 <= budget.heads <= HEADS
        assert budget.hidden >= 16 and budget.hidden % 16 == 0
        assert budget.heads * 8 <= min(budget.qk, budget.v)
        assert max(budget.qk, budget.v) <= budget.heads * WIDTH


def test_the_whole_model_is_kept_at_a_share_of_one(make_model) -> None:
    model = make_model()
    budgets = allocate(plans_for(model, random_queues(0, ("heads", "hidden"))), "params", 1.0, count(model).params)
    assert budgets == [BlockBudget(HEADS, HEADS * WIDTH, HEADS * WIDTH, HIDDEN)] * 2


def test_cheap_blocks_and_groups_pay_first(make_model) -> None:
    model = make_model()
    queues = [
        {"heads": steps_of([1e6, 1e6], 1, [0, 1]), "hidden": steps_of([1e-3] * 47, 16)},
        {"heads": steps_of([1e6, 1e6], 1, [0, 1]), "hidden": steps_of([1.0] * 47, 16)},
    ]
    first, second = allocate(plans_for(model, queues), "params", 0.85, count(model).params)
    assert first.hidden < HIDDEN and first.heads == HEADS
    assert second == BlockBudget(HEADS, HEADS * WIDTH, HEADS * WIDTH, HIDDEN)


def test_loss_is_weighed_against_cost_saved(make_model) -> None:
    """A head loses ten times as much as a tile of neurons but saves almost eight times as much: the tile goes."""
    model = make_model()
    tile, head = 16 * (2 * DIM + 1), 4 * WIDTH * DIM + 3 * WIDTH
    total = count(model).params
    for loss, heads in ((0.9 * head / tile, HEADS - 1), (1.1 * head / tile, HEADS)):
        queues = [{"heads": steps_of([loss], 1, [0]), "hidden": steps_of([1.0] * 47, 16)}, {"heads": [], "hidden": []}]
        first, _ = allocate(plans_for(model, queues), "params", 1 - head / total, total)
        assert first.heads == heads


def test_a_cheap_step_behind_a_dear_one_does_not_hide_its_price(make_model) -> None:
    model = make_model()
    queues = [
        {"hidden": steps_of([5.0] + [0.0] * 46, 16)},
        {"hidden": steps_of([1.0] * 47, 16)},
    ]
    first, second = allocate(plans_for(model, queues), "params", 0.9, count(model).params)
    assert first.hidden == HIDDEN
    assert second.hidden < HIDDEN


def test_what_an_overshoot_frees_goes_to_the_dearest_that_fits(make_model) -> None:
    """One head has to go for less than its size; three tiles of neurons that went before it come back."""
    model = make_model()
    tile, head = 16 * (2 * DIM + 1), 4 * WIDTH * DIM + 3 * WIDTH
    total = count(model).params
    queues = [
        {"heads": steps_of([10.0], 1, [0]), "hidden": steps_of([0.1, 0.2, 0.3], 16)},
        {"heads": [], "hidden": []},
    ]
    first, _ = allocate(plans_for(model, queues), "params", 1 - (head + tile) / total, total)
    assert (first.heads, first.hidden) == (HEADS - 1, HIDDEN - 16)


def test_channels_of_a_head_that_has_gone_are_neither_taken_nor_put_back(make_model) -> None:
    plan = plans_for(make_model(depth=1), [{"heads": steps_of([1.0], 1, [1]), "v": steps_of([1.0, 2.0], 8, [1, 2])}])[0]
    plan.take("v")
    assert plan.budget().v == HEADS * WIDTH - 8
    plan.take("heads")
    assert plan.budget() == BlockBudget(2, 2 * WIDTH, 2 * WIDTH, HIDDEN)
    assert plan.last("v") is None
    assert plan.next("v") == Step(8, 2.0, 2)
    plan.take("v")
    assert plan.next("v") is None
    with pytest.raises(ValueError, match="v has no step left"):
        plan.take("v")
    plan.put_back("v")
    plan.put_back("heads")
    assert plan.budget() == BlockBudget(3, 3 * WIDTH, 3 * WIDTH - 8, HIDDEN)
    plan.put_back("v")
    assert plan.budget().v == 3 * WIDTH


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_target_out_of_reach_names_the_least_that_can_be_kept(make_model, kind: str) -> None:
    model = make_model()
    dense = count(model)
    total = getattr(dense, kind)

    def solve(share: float) -> list[BlockBudget]:
        return allocate(plans_for(model, random_queues(1, ("heads", "hidden")), dense.tokens), kind, share, total)

    with pytest.raises(
        ValueError, match=rf"target: 0.1 of the {kind} is out of reach with groups heads, hidden"
    ) as error:
        solve(0.1)
    least = float(re.findall(r"0\.\d+$", str(error.value))[0])
    assert solve(least + 1e-4) == [BlockBudget(1, WIDTH, WIDTH, 16)] * 2
    with pytest.raises(ValueError, match="out of reach"):
        solve(least - 1e-4)


def test_targets_are_read() -> None:
    assert parse_target({"params": 0.5}) == ("params", 0.5)
    assert parse_target({"macs": 1}) == ("macs", 1.0)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (0.5, TypeError, "target: wanted a mapping such as {'params': 0.65}, got float"),
        ({"ms": 0.5}, ValueError, "target: wanted one of params or macs, such as"),
        ({}, ValueError, "target: wanted one of params or macs, such as"),
        ({"params": 0.5, "macs": 0.5}, ValueError, "target: wanted one of params or macs, such as"),
        ({"params": 0.0}, ValueError, "target: wanted a share of params above 0 and at most 1, got 0.0"),
        ({"params": 65}, ValueError, "target: wanted a share of params above 0 and at most 1, got 65"),
        ({"macs": float("nan")}, ValueError, "target: wanted a share of macs above 0 and at most 1, got nan"),
        ({"macs": "half"}, ValueError, "target: wanted a share of macs above 0 and at most 1, got 'half'"),
        ({"params": True}, ValueError, "target: wanted a share of params above 0 and at most 1, got True"),
    ],
)
def test_wrong_targets_are_refused(target, error, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        parse_target(target)
