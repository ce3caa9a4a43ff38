# SPDX-License-Identifier: Apache-2.0
"""The budget solver against brute force: exact costs, closeness to the target, floors, what is out of reach."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gohsp import ModelMask, count
from gohsp.models.registry import open_model
from gohsp.pruning.budget import (
    GROUPS,
    BlockBudget,
    BlockPlan,
    Option,
    Step,
    allocate,
    counted,
    expected_choices,
    parse_target,
    soft_solve,
    solve,
)

HEADS, WIDTH, HIDDEN, DIM = 3, 64, 768, 192
SPAN = HEADS * WIDTH
FULL = BlockBudget(HEADS, SPAN, SPAN, HIDDEN, DIM, DIM, DIM, DIM)
TILE, HEAD = 16 * (2 * DIM + 1), 4 * WIDTH * DIM + 3 * WIDTH  # parameters


def steps_of(losses: list[float], size: int, heads: list[int] | None = None) -> list[Step]:
    return [Step(size, loss, None if heads is None else heads[index]) for index, loss in enumerate(losses)]


def plans_for(
    model: Any, queues: list[dict[str, list[Step]]], kind: str = "params", tokens: int = 10
) -> list[BlockPlan]:
    pairs = zip(open_model(model).blocks, queues, strict=True)
    return [BlockPlan(FULL, queue, counted(block, (tokens, tokens), kind)) for block, queue in pairs]


def outside(model: Any, kind: str = "params") -> int:
    found = count(model)
    return getattr(found, kind) - sum(getattr(block, kind) for block in found.blocks)


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
        **{name: lambda: steps_of(losses(11), 16) for name in ("attn_in", "attn_out", "mlp_in", "mlp_out")},
    }
    return [{kind: made[kind]() for kind in kinds} for _ in range(blocks)]


def mask_of(model: Any, budgets: list[BlockBudget]) -> ModelMask:
    """A mask with those numbers; which ones is of no account for the cost, but heads keep a channel each."""
    mask = ModelMask.full(model)
    for block, budget in zip(mask.blocks, budgets, strict=True):
        for name in ("heads", "hidden", "attn_in", "attn_out", "mlp_in", "mlp_out"):
            getattr(block, name)[getattr(budget, name) :] = False
        for name in ("qk", "v"):
            channels = torch.zeros(WIDTH, budget.heads, dtype=torch.bool).flatten()
            channels[: getattr(budget, name)] = True
            kept = torch.zeros_like(block.v)
            kept[: budget.heads] = channels.view(WIDTH, budget.heads).T
            setattr(block, name, kept)
    return mask


GROUP_SETS = [("heads", "hidden"), ("hidden",), ("heads", "hidden", "qk", "v"), ("qk", "v"), GROUPS]


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kinds=st.sampled_from(GROUP_SETS),
    kind=st.sampled_from(["params", "macs"]),
    share=st.floats(0.78, 1.0),
)
@example(seed=0, kinds=GROUP_SETS[0], kind="params", share=0.9999999999999999)
def test_the_result_is_counted_exactly_and_nothing_more_fits(make_model, seed, kinds, kind, share) -> None:
    model = make_model()
    total = getattr(count(model), kind)
    plans = plans_for(model, random_queues(seed, kinds), kind)
    budgets = allocate(plans, share, outside(model, kind))
    got = getattr(count(model, mask=mask_of(model, budgets)), kind)
    assert got == outside(model, kind) + sum(sum(p.cost(b)) for p, b in zip(plans, budgets, strict=True))
    limit = share * total + 1e-6  # whole numbers: over by less than that is rounding of the share
    assert got <= limit
    for plan, budget in zip(plans, budgets, strict=True):
        for half in (0, 1):
            options = plan.options(half, {})
            mine = next(o for o in options if all(getattr(budget, name) == w for name, w in o.widths.items()))
            assert all(got - mine.cost + o.cost > limit for o in options if o.loss < mine.loss)
        assert 1 <= budget.heads <= HEADS
        assert budget.hidden >= 16 and budget.hidden % 16 == 0
        assert budget.heads * 8 <= min(budget.qk, budget.v)
        assert max(budget.qk, budget.v) <= budget.heads * WIDTH
        assert min(budget.attn_in, budget.attn_out, budget.mlp_in, budget.mlp_out) >= 16


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10)), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(0, 80),
)
def test_solve_finds_the_least_loss_of_all_choices(table: list[list[tuple[int, float]]], room: int) -> None:
    choices = [[Option(cost, loss, {}) for cost, loss in row] for row in table]
    limit = sum(min(option.cost for option in options) for options in choices) + room

    def total(picks: Any, name: str) -> float:
        return sum(getattr(options[pick], name) for options, pick in zip(choices, picks, strict=True))

    picks = solve(choices, limit)
    assert total(picks, "cost") <= limit
    every = product(*(range(len(options)) for options in choices))
    # Costs are rounded up to a cell, of which the room has 65536: so much less is the least that must be reached.
    best = min(total(p, "loss") for p in every if total(p, "cost") <= limit - len(choices) * room / 65536)
    assert total(picks, "loss") <= best + 1e-9


ROOM = 64  # whole cells of one, and of a 1024th, and of a 65536th: no cost is rounded
TABLES = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 10)), min_size=1, max_size=5), min_size=1, max_size=4
)


def soft_problem(table: list[list[tuple[int, float]]]) -> tuple[list[list[Option]], list[Any], float]:
    choices = [[Option(cost, loss, {}) for cost, loss in row] for row in table]
    losses = [torch.tensor([loss for _, loss in row], dtype=torch.float64, requires_grad=True) for row in table]
    return choices, losses, sum(min(option.cost for option in options) for options in choices) + ROOM


def picks_that_fit(choices: list[list[Option]], limit: float) -> list[tuple[int, ...]]:
    every = product(*(range(len(options)) for options in choices))
    return [p for p in every if sum(options[i].cost for options, i in zip(choices, p, strict=True)) <= limit]


@settings(max_examples=40, deadline=None)
@given(TABLES, st.floats(0.1, 10))
def test_the_soft_solution_weighs_all_picks_that_fit(table: list[list[tuple[int, float]]], heat: float) -> None:
    choices, losses, limit = soft_problem(table)
    fits = picks_that_fit(choices, limit)
    totals = torch.stack([sum(loss[i] for loss, i in zip(losses, p, strict=True)) for p in fits]).detach()
    wanted = -heat * torch.logsumexp(-totals / heat, dim=0)
    torch.testing.assert_close(soft_solve(choices, losses, limit, heat, ROOM), wanted)
    likely = torch.softmax(-totals / heat, dim=0)
    for row, found in enumerate(expected_choices(choices, losses, limit, heat, ROOM)):
        by_hand = torch.zeros_like(found).index_add(0, torch.tensor([p[row] for p in fits]), likely)
        torch.testing.assert_close(found, by_hand, rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(TABLES)
def test_the_soft_solution_becomes_the_exact_one_as_it_cools(table: list[list[tuple[int, float]]]) -> None:
    choices, losses, limit = soft_problem(table)
    picks = solve(choices, limit)
    least = sum(options[pick].loss for options, pick in zip(choices, picks, strict=True))
    assert soft_solve(choices, losses, limit, 1e-4).item() == pytest.approx(least, abs=1e-3)
    ranked = sorted(
        sum(options[i].loss for options, i in zip(choices, p, strict=True)) for p in picks_that_fit(choices, limit)
    )
    if len(ranked) == 1 or ranked[1] - ranked[0] > 0.01:  # where it is the only one
        for found, pick in zip(expected_choices(choices, losses, limit, 1e-4), picks, strict=True):
            assert found.argmax() == pick and found[pick].item() == pytest.approx(1)


def test_the_soft_solution_can_be_differentiated_twice() -> None:
    """The value, and the distribution of what is picked; some options do not fit at all."""
    choices, losses, limit = soft_problem(
        [[(0, 1.0), (30, 0.4), (90, 0.0)], [(5, 2.0), (45, 0.1)], [(0, 3.0), (50, 1.0)]]
    )

    def value(*losses: Any) -> Any:
        return soft_solve(choices, losses, limit, 0.7, ROOM)

    def likely(*losses: Any) -> Any:
        return tuple(expected_choices(choices, losses, limit, 0.7, ROOM))

    assert torch.autograd.gradcheck(value, losses)
    assert torch.autograd.gradcheck(likely, losses)
    assert likely(*losses)[0][2] == 0


def test_expected_choices_of_losses_without_gradient_fit_on_average() -> None:
    choices, losses, limit = soft_problem([[(0, 4.0), (40, 0.0)], [(0, 4.0), (50, 0.0)]])
    with torch.no_grad():
        found = expected_choices(choices, [loss.detach() for loss in losses], limit, 1.0, ROOM)
    cost = sum(
        float(likely @ torch.tensor([float(option.cost) for option in options], dtype=torch.float64))
        for options, likely in zip(choices, found, strict=True)
    )
    assert not any(likely.requires_grad for likely in found)
    assert 30 < cost <= limit
    assert [likely.sum().item() for likely in found] == pytest.approx([1, 1])


@pytest.mark.parametrize("heat", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_above_zero_is_refused(heat: float) -> None:
    choices, losses, limit = soft_problem([[(1, 1.0)]])
    with pytest.raises(ValueError, match="temperature: wanted one above 0"):
        soft_solve(choices, losses, limit, heat)
    with pytest.raises(ValueError, match="limit: wanted at least 1, got 0"):
        soft_solve(choices, losses, 0, 1.0)


def test_solve_beats_taking_the_cheapest_step_first() -> None:
    """The ratio rule takes the small step, after which the large one no longer fits."""
    choices = [
        [Option(10, 0.0, {}), Option(9, 0.5, {})],
        [Option(10, 0.0, {}), Option(7, 2.0, {})],
    ]
    assert solve(choices, 17) == [0, 1]


def test_costs_that_miss_the_limit_by_less_than_a_cell_are_not_taken() -> None:
    choices = [[Option(0.0, 1.0, {}), Option(1.0, 0.0, {})]] * 2
    assert sum(solve(choices, 2.0)) == 2
    assert sum(solve(choices, 2.0 - 1e-6)) == 1


def test_a_limit_below_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="limit: wanted at least 3, got 2"):
        solve([[Option(3, 0.0, {})]], 2)


def test_the_whole_model_is_kept_at_a_share_of_one(make_model) -> None:
    model = make_model()
    assert allocate(plans_for(model, random_queues(0, ("heads", "hidden"))), 1.0, outside(model)) == [FULL] * 2


def test_cheap_blocks_and_groups_pay_first(make_model) -> None:
    model = make_model()
    queues = [
        {"heads": steps_of([1e6, 1e6], 1, [0, 1]), "hidden": steps_of([1e-3] * 47, 16)},
        {"heads": steps_of([1e6, 1e6], 1, [0, 1]), "hidden": steps_of([1.0] * 47, 16)},
    ]
    first, second = allocate(plans_for(model, queues), 0.85, outside(model))
    assert first.hidden < HIDDEN and first.heads == HEADS
    assert second == FULL


def test_loss_is_weighed_against_cost_saved(make_model) -> None:
    """A head saves almost eight times as much as a tile of neurons: it goes where it loses less than eight tiles do."""
    model = make_model()
    total = count(model).params
    for loss, heads in ((7.5, HEADS - 1), (8.5, HEADS)):
        queues = [{"heads": steps_of([loss], 1, [0]), "hidden": steps_of([1.0] * 47, 16)}, {"heads": [], "hidden": []}]
        first, _ = allocate(plans_for(model, queues), 1 - 0.98 * HEAD / total, outside(model))
        assert first.heads == heads


def test_options_of_a_half_follow_the_loss_for_each_unit_saved(make_model) -> None:
    """A head saves sixteen times as much as a tile of V channels."""
    model = make_model(depth=1)
    tiles = HEAD / (8 * (2 * DIM + 1))
    assert tiles == pytest.approx(16, rel=0.01)
    for loss, heads in ((15.0, HEADS - 1), (17.0, HEADS)):
        queue = {"heads": steps_of([loss], 1, [0]), "v": steps_of([1.0], 8, [1])}
        (plan,) = plans_for(model, [queue])
        assert plan.options(0, {})[1].widths["heads"] == heads


def test_a_cheap_step_behind_a_dear_one_does_not_hide_its_price(make_model) -> None:
    model = make_model()
    queues = [
        {"hidden": steps_of([5.0] + [0.0] * 46, 16)},
        {"hidden": steps_of([1.0] * 47, 16)},
    ]
    first, second = allocate(plans_for(model, queues), 0.9, outside(model))
    assert first.hidden == HIDDEN
    assert second.hidden < HIDDEN


def test_channels_of_a_head_that_has_gone_are_not_taken(make_model) -> None:
    """Head 1 leaves with what is left of it, and only head 2 has channels to give after that."""
    model = make_model(depth=1)
    queue = {"heads": steps_of([1.0], 1, [1]), "v": steps_of([1e-6, 2.0, 2.0], 8, [1, 1, 2])}
    (plan,) = plans_for(model, [queue])
    widths = [(o.widths["heads"], o.widths["qk"], o.widths["v"]) for o in plan.options(0, {})]
    assert widths == [
        (3, SPAN, SPAN),
        (3, SPAN, SPAN - 8),
        (2, SPAN - WIDTH, SPAN - WIDTH),
        (2, SPAN - WIDTH, SPAN - WIDTH - 8),
    ]


def test_floors_hold_in_every_block(make_model) -> None:
    model = make_model()
    queues = random_queues(2, ("heads", "hidden"))
    budgets = allocate(plans_for(model, queues), 0.6, outside(model), {"heads": 0.6, "hidden": 0.25})
    assert all(budget.heads >= 2 and budget.hidden >= HIDDEN // 4 for budget in budgets)
    assert any(budget.heads < 2 for budget in allocate(plans_for(model, queues), 0.6, outside(model)))


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_target_out_of_reach_names_the_least_that_can_be_kept(make_model, kind: str) -> None:
    model = make_model()

    def solve_for(share: float) -> list[BlockBudget]:
        return allocate(plans_for(model, random_queues(1, ("heads", "hidden")), kind), share, outside(model, kind))

    with pytest.raises(
        ValueError, match=r"target: 0.01 of the cost is out of reach with groups heads, hidden"
    ) as error:
        solve_for(0.01)
    least = float(re.findall(r"0\.\d+$", str(error.value))[0])
    assert solve_for(least) == [BlockBudget(1, WIDTH, WIDTH, 16, DIM, DIM, DIM, DIM)] * 2
    with pytest.raises(ValueError, match="out of reach"):
        solve_for(least - 2e-4)


def test_targets_are_read() -> None:
    assert parse_target({"params": 0.5}) == ("params", 0.5)
    assert parse_target({"macs": 1}) == ("macs", 1.0)
    assert parse_target({"ms": 0.3}) == ("ms", 0.3)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (0.5, TypeError, "target: wanted a mapping such as {'params': 0.65}, got float"),
        ({"bytes": 0.5}, ValueError, "target: wanted one of params or macs or ms, such as"),
        ({}, ValueError, "target: wanted one of params or macs or ms, such as"),
        ({"params": 0.5, "macs": 0.5}, ValueError, "target: wanted one of params or macs or ms, such as"),
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
