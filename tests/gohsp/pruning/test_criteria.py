# SPDX-License-Identifier: Apache-2.0
"""Criteria against brute force: compensated errors by direct minimisation, orders by hand, symmetries."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor

import gohsp
from gohsp.pruning import criteria
from gohsp.pruning.criteria import (
    CRITERIA,
    RIDGE,
    Criterion,
    LayerStatistics,
    OutputStatistics,
    PruningGroups,
    QKStatistics,
    RemovalOrder,
    Surveyed,
    by_score,
    head_guide,
    information,
    obs,
    qk_energy,
    register,
)
from gohsp.pruning.moments import damped
from gohsp.pruning.ranking import cka

COLUMNS, FEATURES = 12, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics(seed: int = 0, columns: int = COLUMNS) -> LayerStatistics:
    samples, root = (
        normal(60, columns, seed=seed) @ normal(columns, columns, seed=seed + 1),
        normal(5, 5, seed=seed + 2),
    )
    return LayerStatistics(
        weight=normal(FEATURES, columns, seed=seed + 3),
        covariance=torch.cov(samples.T),
        metric=root @ root.T,
        generator=torch.Generator().manual_seed(0),
        taylor=normal(columns, seed=seed + 4).square(),
        sample=samples,
    )


def singles(columns: int = COLUMNS, tile: int = 1, floor: int = 1) -> PruningGroups:
    return PruningGroups([torch.arange(columns)], tile, floor)


def heads(width: int = 3, columns: int = COLUMNS) -> PruningGroups:
    return PruningGroups(list(torch.arange(columns).split(width)), width, 0)


def compensated_error(given: LayerStatistics, gone: list[int]) -> float:
    """The least that removing some columns can cost: the objective minimised directly over the other weights."""
    square = damped(given.covariance, RIDGE)
    rest = [column for column in range(len(square)) if column not in gone]
    transfer = torch.linalg.solve(square[rest][:, rest], square[rest][:, gone])
    change = torch.zeros_like(given.weight)
    change[:, gone] = -given.weight[:, gone]
    change[:, rest] = given.weight[:, gone] @ transfer.T
    return torch.trace(given.metric @ change @ square @ change.T).item()


def removed(order: RemovalOrder) -> list[int]:
    return [int(column) for step in order.steps for column in step]


@pytest.fixture(autouse=True, params=[1, criteria.COLLECTED], ids=["at once", "collected"])
def _when_removals_are_applied(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(criteria, "COLLECTED", request.param)


def test_first_loss_is_the_least_compensated_error() -> None:
    given = statistics()
    got = obs(given, singles())
    errors = [compensated_error(given, [column]) for column in range(COLUMNS)]
    assert removed(got)[0] == min(range(COLUMNS), key=errors.__getitem__)
    assert got.losses[0] == pytest.approx(min(errors), rel=1e-9)


def test_first_loss_with_a_plain_metric_is_the_published_formula() -> None:
    given = replace(statistics(), metric=torch.eye(FEATURES, dtype=torch.float64))
    inverse = torch.linalg.inv(damped(given.covariance, RIDGE))
    scores = given.weight.square().sum(dim=0) / inverse.diagonal()
    assert obs(given, singles()).losses[0] == pytest.approx(scores.min().item(), rel=1e-10)


@pytest.mark.parametrize("groups", [singles(), singles(tile=5, floor=1), heads()])
def test_losses_add_up_to_the_joint_error_of_all_that_has_gone(groups: PruningGroups) -> None:
    """Each step is priced after those before it, so nothing is counted twice: exact, by the downdates."""
    given = statistics(seed=4)
    got = obs(given, groups)
    for step in range(1, len(got.steps) + 1):
        gone = [int(column) for columns in got.steps[:step] for column in columns]
        assert sum(got.losses[:step]) == pytest.approx(compensated_error(given, gone), rel=1e-7)


def test_heads_are_chosen_by_their_joint_error() -> None:
    given, groups = statistics(seed=9), heads()
    errors = [compensated_error(given, pool.tolist()) for pool in groups.pools]
    first = obs(given, groups).steps[0]
    assert first.tolist() == groups.pools[min(range(4), key=errors.__getitem__)].tolist()


def test_elimination_is_close_to_the_best_subset() -> None:
    given = statistics(seed=2, columns=8)
    best = min(compensated_error(given, list(gone)) for gone in combinations(range(8), 4))
    got = compensated_error(given, removed(obs(given, singles(8), keep=4)))
    typical = sum(compensated_error(given, list(gone)) for gone in combinations(range(8), 4)) / 70
    assert best <= got <= best + 0.1 * (typical - best)


def test_one_of_two_twins_is_nearly_free_and_then_the_other_is_the_dearest() -> None:
    """Independent inputs of variance 1 and weight 1, but for columns 2 and 4, which are always equal."""
    covariance = torch.eye(6, dtype=torch.float64)
    covariance[2, 4] = covariance[4, 2] = 1.0
    given = replace(
        statistics(columns=6),
        weight=torch.ones(1, 6, dtype=torch.float64),
        covariance=covariance,
        metric=torch.eye(1, dtype=torch.float64),
    )
    got = obs(given, singles(6))
    assert removed(got)[0] in (2, 4)
    assert got.losses[0] < 2.1 * RIDGE
    assert got.left.tolist() == [6 - removed(got)[0]]  # it carries the weight of both: its cost would be near 4
    assert got.losses[1:] == pytest.approx([1 + RIDGE] * 4)


def test_permuting_heads_permutes_the_order() -> None:
    given, groups = statistics(seed=5), heads()
    order = [2, 0, 3, 1]
    columns = torch.cat([groups.pools[head] for head in order])
    turned = replace(given, weight=given.weight[:, columns], covariance=given.covariance[columns][:, columns])
    before, after = obs(given, groups), obs(turned, groups)
    assert [order[int(step[0]) // 3] for step in after.steps] == [int(step[0]) // 3 for step in before.steps]
    assert after.losses == pytest.approx(before.losses, rel=1e-9)


def test_a_guide_multiplies_the_cost_of_its_head() -> None:
    given, groups = statistics(seed=6), heads()
    plain = obs(given, groups)
    first = int(plain.steps[0][0]) // 3
    guide = torch.ones(4, dtype=torch.float64)
    guide[first] = 1e6
    guided = obs(replace(given, guide=guide), groups)
    assert first not in [int(step[0]) // 3 for step in guided.steps]
    same = obs(replace(given, guide=torch.full((4,), 2.0)), groups)
    assert same.losses == pytest.approx([2 * loss for loss in plain.losses])


def test_guides_stay_with_their_heads() -> None:
    """Also after the first has gone, when the places of those that are left no longer are their numbers."""
    guide = torch.tensor([1e4, 1.0, 1e8, 1e12], dtype=torch.float64)
    got = obs(replace(statistics(seed=6), guide=guide), heads())
    assert [int(step[0]) // 3 for step in got.steps] == [1, 0, 2]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize(("tile", "sizes"), [(5, [2, 5]), (4, [4, 4]), (12, [])])
def test_the_odd_rest_goes_first_and_a_tile_stays(name: str, tile: int, sizes: list[int]) -> None:
    got = CRITERIA[name].eliminate(statistics(), singles(tile=tile, floor=tile))
    assert [len(step) for step in got.steps] == sizes
    assert len(got.left) == tile
    assert sorted(removed(got) + got.left.tolist()) == list(range(COLUMNS))


@pytest.mark.parametrize("name", CRITERIA)
def test_one_head_always_stays(name: str) -> None:
    got = CRITERIA[name].eliminate(statistics(), heads())
    assert len(got.steps) == 3
    assert [columns.tolist() for columns in got.steps if len(columns) != 3 or int(columns[0]) % 3] == []
    assert len(got.left) == 3


@pytest.mark.parametrize("name", CRITERIA)
def test_channels_leave_a_tile_in_every_head(name: str) -> None:
    got = CRITERIA[name].eliminate(statistics(), PruningGroups(list(torch.arange(COLUMNS).split(6)), 2, 2))
    assert [len({int(column) // 6 for column in step}) for step in got.steps] == [1] * 4
    assert (got.left < 6).sum() == 2


@pytest.mark.parametrize("name", CRITERIA)
def test_keep_stops_the_same_elimination_early(name: str) -> None:
    whole = CRITERIA[name].eliminate(
        replace(statistics(), generator=torch.Generator().manual_seed(3)), singles(tile=2, floor=2)
    )
    part = CRITERIA[name].eliminate(
        replace(statistics(), generator=torch.Generator().manual_seed(3)), singles(tile=2, floor=2), 6
    )
    assert len(part.left) == 6
    assert removed(part) == removed(whole)[:6]


@pytest.mark.parametrize(
    ("name", "order", "losses"),
    [
        ("l1", [1, 2], [1 / 6, 2 / 6]),
        ("l2", [1, 2], [1 / 14, 4 / 14]),
        ("activation", [2, 0], [4 / 33, 9 / 33]),
        ("taylor", [0, 1], [1 / 9, 3 / 9]),
    ],
)
def test_scores_are_shares_by_hand(name: str, order: list[int], losses: list[float]) -> None:
    given = replace(
        statistics(columns=3),
        weight=torch.tensor([[3.0, -1.0, 2.0]], dtype=torch.float64),
        covariance=torch.diag(torch.tensor([1.0, 20.0, 1.0], dtype=torch.float64)),
        metric=torch.eye(1, dtype=torch.float64),
        taylor=torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64),
    )
    got = CRITERIA[name].eliminate(given, singles(3))
    assert removed(got) == order
    assert got.losses == pytest.approx(losses)


def test_information_is_what_the_neighbours_do_not_tell() -> None:
    """By the formula with explicit matrices, for columns and for heads."""
    given = statistics(seed=3)
    deviations = given.covariance.diagonal().sqrt()
    graph = (given.covariance / torch.outer(deviations, deviations)).abs()
    graph -= torch.diag(graph.diagonal())
    walk = torch.eye(COLUMNS, dtype=graph.dtype) - torch.diag(1 / graph.sum(dim=1)) @ graph
    torch.testing.assert_close(information(given, singles()), (walk @ given.sample.T).abs().sum(dim=1))

    graph = cka(given.covariance, 4).fill_diagonal_(0)
    walk = torch.eye(4, dtype=graph.dtype) - torch.diag(1 / graph.sum(dim=1)) @ graph
    nodes = given.sample.unflatten(1, (4, 3)).transpose(0, 1).flatten(1)
    wanted = (walk @ nodes).abs().sum(dim=1)
    torch.testing.assert_close(information(given, heads()).view(4, 3).sum(dim=1), wanted)


def test_information_of_a_copy_is_less_than_that_of_its_own_kind() -> None:
    sample = normal(200, 3)
    sample = torch.cat((sample, sample[:, :1]), dim=1)
    given = replace(statistics(columns=4), sample=sample, covariance=torch.cov(sample.T))
    scores = information(given, singles(4))
    assert scores[0] < 0.6 * scores[1:3].min() and scores[3] < 0.6 * scores[1:3].min()


def test_what_was_not_measured_is_asked_for() -> None:
    with pytest.raises(ValueError, match="statistics: wanted first-order terms"):
        CRITERIA["taylor"].eliminate(replace(statistics(), taylor=None), singles())
    with pytest.raises(ValueError, match="statistics: wanted rows of the inputs"):
        CRITERIA["information"].eliminate(replace(statistics(), sample=None), singles())


def test_obs_is_gohsp_without_the_graph() -> None:
    guided = replace(statistics(seed=6), guide=torch.tensor([100.0, 1.0, 1e-2, 1.0], dtype=torch.float64))
    assert removed(CRITERIA["obs"].eliminate(guided, heads())) == removed(obs(replace(guided, guide=None), heads()))
    assert removed(CRITERIA["gohsp"].eliminate(guided, heads())) != removed(CRITERIA["obs"].eliminate(guided, heads()))


def test_evidence_of_some_columns() -> None:
    given, columns = statistics(), torch.tensor([4, 1])
    got = given.of(columns)
    assert torch.equal(got.weight, given.weight[:, columns])
    assert got.covariance[0, 1] == given.covariance[4, 1]
    assert torch.equal(got.taylor, given.taylor[columns]) and torch.equal(got.sample, given.sample[:, columns])
    assert torch.equal(got.metric, given.metric)
    assert got.prices is None
    assert replace(given, prices=given.taylor).of(columns).prices.tolist() == got.taylor.tolist()


def test_output_scores_by_hand() -> None:
    given = replace(statistics(), metric=torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64)))
    energy = torch.tensor([5.0, 1.0, 1.0, 2.0, 1.0], dtype=torch.float64)
    weight = normal(5, 7)
    cost = torch.tensor([5.0, 2.0, 3.0, 8.0, 5.0], dtype=torch.float64)
    outputs = OutputStatistics(weight, energy, given.metric, given.generator)
    torch.testing.assert_close(CRITERIA["gohsp"].output_costs(outputs), cost)
    torch.testing.assert_close(CRITERIA["taylor"].output_costs(outputs), cost / cost.sum())
    torch.testing.assert_close(CRITERIA["activation"].output_costs(outputs), energy / 10)
    norms = weight.abs().sum(dim=1)
    torch.testing.assert_close(CRITERIA["l1"].output_costs(outputs), norms / norms.sum())


def test_random_follows_its_generator() -> None:
    def draw(seed: int) -> list[int]:
        return removed(
            CRITERIA["random"].eliminate(
                replace(statistics(), generator=torch.Generator().manual_seed(seed)), singles()
            )
        )

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_by_score_takes_the_cheapest_tile_of_all_pools() -> None:
    scores = torch.tensor([5.0, 1.0, 4.0, 0.5, 2.0, 9.0])
    got = by_score(scores, PruningGroups([torch.arange(3), torch.arange(3, 6)], 1, 1))
    assert removed(got) == [3, 1, 4, 2]
    assert got.losses == [0.5, 1.0, 2.0, 4.0]
    assert got.left.tolist() == [0, 5]


def test_head_guide_is_one_for_an_average_head() -> None:
    pi = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    assert head_guide(pi, 1.0).tolist() == pytest.approx([0.75, 1.5, 0.75])
    assert head_guide(pi, 2.0).tolist() == pytest.approx([0.5625, 2.25, 0.5625])
    assert head_guide(pi, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert bool(torch.isfinite(head_guide(torch.tensor([0.0, 1.0]), -1.0)).all())


def test_qk_energy_is_the_sum_of_squared_terms_of_the_scores() -> None:
    q, k = normal(2, 3, 5, 4), normal(2, 3, 5, 4, seed=1)
    got = qk_energy(q, k)
    centred = k - k.mean(dim=2, keepdim=True)
    terms = q[:, :, :, None, :] * centred[:, :, None, :, :]
    torch.testing.assert_close(got, terms.square().sum(dim=(0, 2, 3)))
    torch.testing.assert_close(qk_energy(q, k + 7.0), got, rtol=1e-9, atol=1e-9)


def test_qk_scores_share_what_the_heads_attention_is_worth() -> None:
    energy, worth = normal(2, 4).abs(), torch.tensor([3.0, 0.5], dtype=torch.float64)
    weight = normal(3 * 8, 6, seed=1)

    def costs(name: str) -> Tensor:
        return CRITERIA[name].qk_costs(QKStatistics(weight, energy, worth, torch.Generator().manual_seed(5)))

    got = costs("gohsp")
    torch.testing.assert_close(got.sum(dim=1), worth)
    torch.testing.assert_close(got[0] / got[0].sum(), energy[0] / energy[0].sum())
    torch.testing.assert_close(costs("activation"), energy / energy.sum())
    products = weight[:8].square().sum(dim=1) * weight[8:16].square().sum(dim=1)
    magnitudes = costs("l2").flatten()
    torch.testing.assert_close(magnitudes, products / products.sum())
    chance = costs("random")
    assert torch.equal(chance, costs("random"))
    assert chance.sum().item() == pytest.approx(1)


def test_a_silent_head_costs_nothing() -> None:
    energy = torch.zeros(2, 4, dtype=torch.float64)
    given = QKStatistics(normal(24, 6), energy, torch.ones(2, dtype=torch.float64), torch.Generator())
    assert not CRITERIA["gohsp"].qk_costs(given).any()


class WeightTimesDeviation(Criterion):
    """A criterion from outside the package, in the fewest lines; its prices are far from shares."""

    name = "mine"

    def columns(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
        return 50 * statistics.weight.abs().sum(dim=0) * statistics.covariance.diagonal().sqrt()


@pytest.fixture
def mine() -> Iterator[Criterion]:
    criterion = WeightTimesDeviation()
    register(criterion)
    yield criterion
    del CRITERIA["mine"]


def test_a_criterion_of_ones_own_is_on_one_scale(mine: Criterion) -> None:
    energy = 50 * normal(FEATURES).square()
    outputs = OutputStatistics(normal(FEATURES, 7), energy, 3 * torch.eye(FEATURES), torch.Generator())
    heads_of_two = QKStatistics(normal(24, 6), 50 * normal(2, 4).square(), normal(2).square(), torch.Generator())
    floor = PruningGroups([torch.arange(COLUMNS)], 1, 0)
    left = mine.eliminate(statistics(), floor)
    prices = mine.columns(statistics(), floor)
    assert sum(left.losses) == pytest.approx(float(1 - prices.max() / prices.sum()))
    assert float(mine.output_costs(outputs).sum()) == pytest.approx(1)
    assert float(mine.qk_costs(heads_of_two).sum()) == pytest.approx(1)


@pytest.mark.parametrize("optimiser", ["ridge", "admm", "drop"])
def test_a_criterion_of_ones_own_prunes(mine: Criterion, make_model: Any, images: Any, optimiser: str) -> None:
    groups = ("heads", "qk", "v", "hidden", "attn_in", "attn_out", "mlp_in", "mlp_out")
    found = gohsp.prune(make_model(), [images()], {"params": 0.8}, mine.name, groups=groups, optimiser=optimiser)
    assert found.report.method == "mine" and found.report.pruned.params <= 0.8 * found.report.dense.params


class LastColumnsOfTheFirstBlock(Surveyed):
    """A criterion that looks at the whole model: later columns are worth more, and in the first block a lot more."""

    def survey(self, opened: Any, stream: Tensor, sensitivities: Any, seed: int) -> list[Tensor]:
        self.told = len(stream), len(sensitivities), seed
        factors = [1e6, 1e6] + [1.0] * (len(sensitivities) - 2)
        return [
            f * torch.arange(1.0, 1 + len(of.taylor)).double() for f, of in zip(factors, sensitivities, strict=True)
        ]


@pytest.mark.parametrize("optimiser", ["ridge", "drop"])
def test_prices_of_a_look_at_the_whole_model_decide_budgets_and_choice(make_model, images, optimiser: str) -> None:
    register(criterion := LastColumnsOfTheFirstBlock("looks"))
    try:
        options: dict[str, Any] = {"groups": ("heads", "hidden"), "optimiser": optimiser, "seed": 5}
        found = gohsp.prune(make_model(), [images(3)], {"params": 0.8}, "looks", **options)
    finally:
        del CRITERIA["looks"]
    assert criterion.told == (3, 4, 5)
    first, second = found.mask.blocks
    assert bool(first.heads.all()) and bool(first.hidden.all())
    assert second.heads.tolist() == [False, False, True]
    kept = int(second.hidden.sum())
    assert 16 < kept < 768 and bool(second.hidden[-kept:].all())


def test_a_criterion_that_cannot_be_told_from_others_is_refused() -> None:
    for name, scale, message in (
        ("", "share", "one that is free"),
        ("l1", "share", "one that is free"),
        ("x", "log", "wanted 'share' or 'loss'"),
    ):
        criterion: Any = Criterion()
        criterion.name, criterion.scale = name, scale
        with pytest.raises(ValueError, match=message):
            register(criterion)


def test_columns_that_leave_together_are_priced_one_after_the_other() -> None:
    """Six pairs of twins of which six columns go in one step: one of each, where scores alone take three pairs."""
    half = normal(200, 6)
    samples = torch.cat((half, half), dim=1) + 1e-3 * normal(200, 12, seed=1)
    given = replace(statistics(), covariance=torch.cov(samples.T))
    kept = obs(given, singles(tile=6, floor=6)).left
    assert sorted((kept % 6).tolist()) == list(range(6))


@pytest.mark.parametrize("seed", range(5))
def test_a_step_of_several_columns_is_the_exact_greedy_one(seed: int) -> None:
    given = statistics(seed=seed)
    together, one_by_one = obs(given, singles(tile=6, floor=6)), obs(given, singles(floor=6))
    assert together.left.tolist() == one_by_one.left.tolist()
    assert together.losses[0] == pytest.approx(sum(one_by_one.losses), rel=1e-8)
