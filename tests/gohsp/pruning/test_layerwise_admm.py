# SPDX-License-Identifier: Apache-2.0
"""The layer-wise optimisation: its support against brute force, its guides, its constraint sets."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from gohsp.pruning.criteria import CRITERIA, RIDGE, LayerStatistics, PruningGroups
from gohsp.pruning.layerwise_admm import GROWTH, PATIENCE, START, STEPS, choose
from gohsp.pruning.moments import damped
from tests.gohsp.pruning.test_criteria import compensated_error, heads, singles, statistics


def gone(given: LayerStatistics, kept: torch.Tensor) -> list[int]:
    return sorted(set(range(given.weight.shape[1])) - set(kept.tolist()))


@pytest.mark.parametrize("seed", range(6))
def test_the_support_is_near_the_best_subset(seed: int) -> None:
    given = statistics(seed=seed, columns=8)
    errors = sorted(compensated_error(given, list(out)) for out in combinations(range(8), 4))
    kept = choose(given, singles(8), 4)
    assert len(kept) == 4
    assert compensated_error(given, gone(given, kept)) <= errors[len(errors) // 4]


def written_out(given: LayerStatistics, keep: int) -> list[int]:
    """The steps of the module's own description, single columns, by plain solves."""
    covariance = damped(given.covariance, RIDGE)
    deviations = covariance.diagonal().sqrt()
    root = torch.linalg.cholesky(damped(given.metric, 1e-6))
    start = root.T @ given.weight * deviations
    square = covariance / torch.outer(deviations, deviations)
    z, dual, rho, supports = start, torch.zeros_like(start), START, []
    for _ in range(STEPS):
        system = square + rho * torch.eye(len(square), dtype=square.dtype)
        w = torch.linalg.solve(system, start @ square + rho * (z - dual), left=False)
        supports.append((w + dual).square().sum(dim=0).argsort(descending=True)[:keep].sort().values.tolist())
        z = torch.zeros_like(w)
        z[:, supports[-1]] = (w + dual)[:, supports[-1]]
        dual = (dual + w - z) / GROWTH
        rho *= GROWTH
        if len(supports) > PATIENCE and all(support == supports[-1] for support in supports[-PATIENCE - 1 :]):
            break
    return supports[-1]


def test_the_steps_are_those_that_are_described() -> None:
    for seed in range(0, 400, 10):
        given = statistics(seed=seed)
        assert choose(given, singles(), 5).tolist() == written_out(given, 5)


def test_over_many_layers_it_beats_the_norms() -> None:
    ours, norms = 0.0, 0.0
    for seed in range(30):
        given = statistics(seed=10 * seed, columns=10)
        typical = compensated_error(given, list(range(5)))
        ours += compensated_error(given, gone(given, choose(given, singles(10), 5))) / typical
        norms += (
            compensated_error(given, gone(given, CRITERIA["activation"].eliminate(given, singles(10), 5).left))
            / typical
        )
    assert ours < 0.8 * norms


PAIRS_OF_HALVES = PruningGroups(list(torch.arange(12).split(6)), 2, 2)


@pytest.mark.parametrize(("groups", "keep"), [(heads(), 6), (PAIRS_OF_HALVES, 6), (singles(tile=4, floor=4), 8)])
def test_the_constraint_set_is_kept(groups: PruningGroups, keep: int) -> None:
    kept = choose(statistics(seed=1), groups, keep)
    assert len(kept) == keep
    for pool in groups.pools:
        inside = len(set(pool.tolist()) & set(kept.tolist()))
        assert inside % groups.tile == 0
        assert inside >= groups.floor


def test_guides_and_favours_sway_the_choice() -> None:
    given, groups = statistics(seed=5), heads()
    first = int(choose(given, groups, 9)[0]) // 3
    guide = torch.ones(4, dtype=torch.float64)
    guide[first] = 1e-9
    assert first not in (choose(replace(given, guide=guide), groups, 9) // 3).tolist()
    favour = torch.full((12,), 1e-9, dtype=torch.float64)
    favour[[2, 7]] = 1.0
    assert choose(given, singles(), 2, favour).tolist() == [2, 7]


def test_units_of_the_inputs_do_not_matter() -> None:
    given = statistics(seed=8)
    units = torch.logspace(-1, 1, 12, dtype=torch.float64)
    damped_alike = replace(given, covariance=given.covariance + torch.diag(given.covariance.diagonal()) * 10)
    scaled = replace(
        damped_alike,
        weight=damped_alike.weight / units,
        covariance=damped_alike.covariance * torch.outer(units, units),
    )
    overlap = set(choose(damped_alike, singles(), 6).tolist()) & set(choose(scaled, singles(), 6).tolist())
    assert len(overlap) >= 5  # the damping is relative to the mean variance, so that it differs
