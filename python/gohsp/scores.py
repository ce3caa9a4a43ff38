# SPDX-License-Identifier: Apache-2.0
"""Criteria: in which order the columns of a linear layer leave it, and what each step costs.

A criterion looks at one linear layer (proj or fc2) whose input columns are head outputs or hidden neurons, and gives an
:class:`Elimination`. The budget reads its losses, the selection reads its order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gohsp.statistics import damped

RIDGE = 1e-2  # damping of covariances in scores, relative to the mean variance


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at. All tensors are float64.

    Attributes:
        weight: [D, m], the layer's weight with layer scale multiplied in: what reaches the residual stream.
        covariance: [m, m], of the layer's inputs.
        metric: [D, D], positive semidefinite: what an error in the residual stream costs.
        generator: Source of the draws of the random criterion.
        guide: Factors [pools] that multiply the cost of each pool (the graph's soft guidance), or None for none.
    """

    weight: Tensor
    covariance: Tensor
    metric: Tensor
    generator: torch.Generator
    guide: Tensor | None = None


@dataclass(frozen=True)
class Elimination:
    """An order of removal. Step t removes ``steps[t]`` (int64 column indices, all of one pool) at a cost ``losses[t]``.

    Attributes:
        steps: The columns that go at each step, first to leave first.
        losses: The cost of each step, on a scale that the blocks share.
        left: The columns that stay, int64, sorted.
    """

    steps: list[Tensor]
    losses: list[float]
    left: Tensor

    def steps_with_losses(self) -> list[tuple[Tensor, float]]:
        """Return (columns, cost) of each step."""
        return list(zip(self.steps, self.losses, strict=True))


@dataclass(frozen=True)
class Grouping:
    """Which columns may leave together.

    Attributes:
        pools: Column indices, int64: the heads, or all neurons as one pool. Each column of the layer is in one of them,
            and a step takes from one of them.
        tile: Columns of a step. The first one of a pool takes the odd rest, so that what stays is a multiple.
        floor: Columns of each pool that always stay. Even at 0 the last pool of the layer stays.
    """

    pools: list[Tensor]
    tile: int
    floor: int

    def step(self, size: int) -> int:
        """Return how many columns a pool of some size gives next."""
        return size % self.tile or self.tile

    def open(self, sizes: list[int]) -> list[int]:
        """Return which pools can give a step, from the sizes that they have."""
        total = sum(sizes)
        return [
            index
            for index, size in enumerate(sizes)
            if size and size - self.step(size) >= self.floor and total > self.step(size)
        ]


class Criterion(Protocol):
    """Orders the columns of a layer by how dispensable they are, until no more than ``keep`` are left."""

    def __call__(self, evidence: Evidence, grouping: Grouping, keep: int = 0) -> Elimination: ...


def obs(evidence: Evidence, grouping: Grouping, keep: int = 0) -> Elimination:
    """Backward elimination by the error that remains after the other columns have taken over (optimal brain surgeon).

    Removing the columns P and re-fitting the rest by least squares costs ``trace(M W_P [A_PP]^-1 W_P^T)``, with A the
    inverse of the damped covariance and M the metric; for one neuron and M = 1 that is
    ``||W[:, i]||^2 / [(C + lambda I)^-1]_ii``. Each step takes the cheapest candidate, one from each pool, and updates
    W and A for it, so that a column whose twin has gone becomes dear. A guide multiplies the cost of its pool.

    Args:
        evidence: The layer.
        grouping: Which columns may leave together.
        keep: Stop when no more columns than that are left; 0 goes on while a pool can give.
    """
    weight = evidence.weight.clone()
    priced = evidence.metric @ weight
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(evidence.covariance, RIDGE)))
    member = _membership(grouping.pools, weight.shape[1]).to(weight.device)
    sizes = [len(pool) for pool in grouping.pools]
    steps, losses = [], []
    while sum(sizes) > keep and (pools := grouping.open(sizes)):
        # Columns that have gone are zero in all three matrices and belong to no pool.
        scores = (weight * priced).sum(dim=0) / inverse.diagonal()
        candidates = [_cheapest(scores, member, pool, grouping.step(sizes[pool])) for pool in pools]
        costs = [
            _joint_cost(weight, priced, inverse, chosen) * _factor(evidence.guide, pool)
            for pool, chosen in zip(pools, candidates, strict=True)
        ]
        best = min(range(len(pools)), key=costs.__getitem__)
        chosen = candidates[best]
        steps.append(chosen.cpu())
        losses.append(costs[best])
        sizes[pools[best]] -= len(chosen)
        member[chosen] = -1
        _downdate(weight, priced, inverse, chosen)
    return Elimination(steps, losses, (member >= 0).nonzero().flatten().cpu())


def random(evidence: Evidence, grouping: Grouping, keep: int = 0) -> Elimination:
    """Chance. Its costs are alike in every block, so that budgets come out near uniform."""
    draws = torch.rand(evidence.weight.shape[1], generator=evidence.generator, dtype=torch.float64)
    return by_score(_as_share(draws), grouping, keep)


def magnitude(evidence: Evidence, grouping: Grouping, keep: int = 0) -> Elimination:
    """Squared norm of a column's weights, as a share of the whole layer's."""
    return by_score(_as_share(evidence.weight.square().sum(dim=0)), grouping, keep)


def activation(evidence: Evidence, grouping: Grouping, keep: int = 0) -> Elimination:
    """Squared norm of a column's weights times the variance of its input, as a share of the whole layer's."""
    energy = evidence.weight.square().sum(dim=0) * evidence.covariance.diagonal()
    return by_score(_as_share(energy), grouping, keep)


CRITERIA: dict[str, Criterion] = {"gohsp": obs, "random": random, "magnitude": magnitude, "activation": activation}


def head_guide(importance: Tensor, strength: float) -> Tensor:
    """Return the factors by which the graph guides the choice of heads: ``(H * pi_j) ** strength``, [H].

    pi sums to 1, so an average head has the factor 1; a strength of 0 leaves the graph out. How GOHSP joins its ranking
    with its optimisation is not on record beyond "soft guideline"; this form is ours.
    """
    return (len(importance) * importance).clamp_min(1e-12) ** strength


def qk_energy(queries: Tensor, keys: Tensor) -> Tensor:
    """Return how much each QK channel moves the attention scores, [H, d] float64.

    The sum over images, queries and keys of the squared term q_c k_c, with the keys' mean taken out first: a shift that
    is the same for all keys does not change a softmax.

    Args:
        queries, keys: [B, H, N, d].
    """
    centred = keys.double() - keys.double().mean(dim=2, keepdim=True)
    return (queries.double().square().sum(dim=2) * centred.square().sum(dim=2)).sum(dim=0)


def qk_scores(method: str, qkv_weight: Tensor, energy: Tensor, worth: Tensor, generator: torch.Generator) -> Tensor:
    """Return the cost of each QK channel by the criterion of a method, [H, d] float64 on the CPU.

    For "gohsp" the channels of a head share, by their energy, what the head's attention is worth: the cost of
    replacing its output by the mean of its V, which is exactly what is left when all its QK channels are gone. Ours.

    Args:
        method: A name in :data:`CRITERIA`.
        qkv_weight: [3 H d, D] of the dense layer.
        energy: [H, d], see :func:`qk_energy`.
        worth: [H], what an error costs when a head attends to all tokens alike.
        generator: Source of the draws of "random".
    """
    if method == "random":
        scores = torch.rand(energy.shape, generator=generator, dtype=torch.float64)
    elif method == "magnitude":
        rows = qkv_weight.detach().double().square().sum(dim=1).view(3, *energy.shape)
        scores = rows[0] * rows[1]
    else:
        scores = energy
    if method == "gohsp":
        return (scores / scores.sum(dim=1, keepdim=True).clamp_min(1e-30) * worth[:, None]).cpu()
    return _as_share(scores)


def by_score(scores: Tensor, grouping: Grouping, keep: int = 0) -> Elimination:
    """Return the elimination that always takes the cheapest step, for scores [m] that no removal changes."""
    scores = scores.cpu()
    queues = [pool[scores[pool].argsort(stable=True)] for pool in grouping.pools]
    steps, losses = [], []
    while sum(map(len, queues)) > keep and (pools := grouping.open([len(queue) for queue in queues])):
        costs = [float(scores[queues[pool][: grouping.step(len(queues[pool]))]].sum()) for pool in pools]
        best = min(range(len(pools)), key=costs.__getitem__)
        queue = queues[pools[best]]
        size = grouping.step(len(queue))
        steps.append(queue[:size].sort().values)
        losses.append(costs[best])
        queues[pools[best]] = queue[size:]
    return Elimination(steps, losses, torch.cat(queues).sort().values)


def _as_share(scores: Tensor) -> Tensor:
    return (scores / scores.sum().clamp_min(1e-30)).cpu()


def _cheapest(scores: Tensor, member: Tensor, pool: int, size: int) -> Tensor:
    inside = (member == pool).nonzero().flatten()
    return inside[scores[inside].argsort(stable=True)[:size]].sort().values


def _membership(pools: list[Tensor], columns: int) -> Tensor:
    member = torch.empty(columns, dtype=torch.int64)
    for index, pool in enumerate(pools):
        member[pool] = index
    return member


def _factor(guide: Tensor | None, pool: int) -> float:
    return 1.0 if guide is None else float(guide[pool])


def _joint_cost(weight: Tensor, priced: Tensor, inverse: Tensor, chosen: Tensor) -> float:
    return float((weight[:, chosen].T @ priced[:, chosen] * torch.linalg.inv(inverse[chosen][:, chosen])).sum())


def _downdate(weight: Tensor, priced: Tensor, inverse: Tensor, chosen: Tensor) -> None:
    """Take columns out of a least-squares solution in place: the others take over what they can, these become zero."""
    transfer = inverse[:, chosen] @ torch.linalg.inv(inverse[chosen][:, chosen])
    weight.addmm_(weight[:, chosen], transfer.T, alpha=-1)
    priced.addmm_(priced[:, chosen], transfer.T, alpha=-1)
    inverse.addmm_(transfer, inverse[chosen], alpha=-1)
