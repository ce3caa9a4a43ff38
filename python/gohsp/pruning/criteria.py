# SPDX-License-Identifier: Apache-2.0
"""Criteria: in which order the columns of a linear layer leave it, and what each step costs.

A :class:`Criterion` looks at one linear layer (proj or fc2) whose input columns are head outputs or hidden neurons, and
gives a :class:`RemovalOrder`. The budget reads its losses, the selection reads its order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gohsp.models.base import OpenModel
from gohsp.pruning.moments import correlation, damped
from gohsp.pruning.ranking import cka
from gohsp.pruning.sensitivity import Sensitivity

RIDGE = 1e-2  # damping of covariances in scores, relative to the mean variance
COLLECTED = 128  # columns whose removal is applied to the others as one product


@dataclass(frozen=True)
class LayerStatistics:
    """What a criterion may look at. All tensors are float64.

    Attributes:
        weight: [D, m], the layer's weight with layer scale multiplied in: what reaches the residual stream.
        covariance: [m, m], of the layer's inputs.
        metric: [D, D], positive semidefinite: what an error in the residual stream costs.
        generator: Source of the draws of the random criterion.
        guide: Factors [pools] that multiply the cost of each pool (the graph's soft guidance), or None for none.
        taylor: [m], see :class:`gohsp.pruning.sensitivity.Sensitivity`, or None where it was not measured.
        sample: [s, m], some rows of the layer's inputs, or None where none were kept.
        prices: [m], what :meth:`Criterion.survey` found, or None where it did not look at these inputs.
    """

    weight: Tensor
    covariance: Tensor
    metric: Tensor
    generator: torch.Generator
    guide: Tensor | None = None
    taylor: Tensor | None = None
    sample: Tensor | None = None
    prices: Tensor | None = None

    def of(self, columns: Tensor) -> LayerStatistics:
        """Return the same for some of the columns, int64 [k]."""
        return replace(
            self,
            weight=self.weight[:, columns],
            covariance=self.covariance[columns[:, None], columns],
            taylor=None if self.taylor is None else self.taylor[columns],
            sample=None if self.sample is None else self.sample[:, columns],
            prices=None if self.prices is None else self.prices[columns],
        )


@dataclass(frozen=True)
class QKStatistics:
    """What a criterion may look at to price the QK channels of the H heads of a block, d each.

    Attributes:
        weight: [3 H d, D] of the layer that gives q, k and v.
        energy: How much each channel moves the attention scores, float64 [H, d]; see :func:`qk_energy`. In principal
            axes: how much the features, see :func:`gohsp.pruning.scoring.qk_statistics`.
        worth: What an error costs when a head attends to all tokens alike, float64 [H]. In principal axes: the sum of
            the energies.
        generator: Source of the draws of the random criterion.
    """

    weight: Tensor
    energy: Tensor
    worth: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class OutputStatistics:
    """What a criterion may look at to price the residual features that a sublayer writes.

    Attributes:
        weight: [D, m] of the layer that writes.
        energy: Mean square of what is added to each feature, layer scale included, float64 [D].
        metric: [D, D], positive semidefinite: what an error in the residual stream costs.
        generator: Source of the draws of the random criterion.
    """

    weight: Tensor
    energy: Tensor
    metric: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class RemovalOrder:
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
class PruningGroups:
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

    @property
    def whole(self) -> bool:
        """Whether a step takes a whole pool, as it does of heads."""
        return len(self.pools) > 1 and all(self.tile == len(pool) for pool in self.pools)

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


def obs(statistics: LayerStatistics, groups: PruningGroups, keep: int = 0) -> RemovalOrder:
    """Backward elimination by the error that remains after the other columns have taken over (optimal brain surgeon).

    Removing the columns P and re-fitting the rest by least squares costs ``trace(M W_P [A_PP]^-1 W_P^T)``, with A the
    inverse of the damped covariance and M the metric; for one neuron and M = 1 that is
    ``||W[:, i]||^2 / [(C + lambda I)^-1]_ii``. Each step takes the cheapest candidate, one from each pool, and updates
    W and A for it, so that a column whose twin has gone becomes dear. A guide multiplies the cost of its pool.

    Args:
        statistics: The layer.
        groups: Which columns may leave together.
        keep: Stop when no more columns than that are left; 0 goes on while a pool can give.
    """
    weight, metric = statistics.weight, statistics.metric
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(statistics.covariance, RIDGE)))
    left = _Elimination(inverse, weight.T @ (metric @ weight))
    pools = [pool.cpu() for pool in groups.pools]
    steps, losses = [], []
    while sum(map(len, pools)) > keep and (choice := groups.open([len(pool) for pool in pools])):
        found = [(*_cheapest_together(left, pools[pool], groups.step(len(pools[pool]))), pool) for pool in choice]
        costs = [cost * _factor(statistics.guide, pool) for _, cost, pool in found]
        best = min(range(len(found)), key=costs.__getitem__)
        chosen, _, pool = found[best]
        steps.append(chosen)
        losses.append(costs[best])
        pools[pool] = pools[pool][torch.isin(pools[pool], chosen, invert=True)]
        left.remove(chosen)
    return RemovalOrder(steps, losses, torch.cat(pools).sort().values)


class _Elimination:
    """The inverse A of a covariance and the Gram matrix G = W^T M W of columns, while columns leave.

    Taking out the columns c turns A into A - F^T F and G into G - F^T K - K^T F, with L L^T = A_cc, F = L^-1 A_c,
    H = L^-1 G_c and K = H - (H_c L^-T) F / 2. These factors are collected and applied many at a time, as one product;
    until then only the diagonals and the few rows that are asked for are brought up to date.
    """

    def __init__(self, inverse: Tensor, gram: Tensor) -> None:
        self.inverse, self.gram = inverse.cpu(), gram.cpu()
        self.diagonals = torch.stack((self.inverse.diagonal(), self.gram.diagonal()))
        self.alive = torch.arange(len(inverse), device="cpu")  # columns by their place in what is left
        self.place = self.alive.clone()  # and the other way round
        self._start(len(inverse))

    def _start(self, columns: int) -> None:
        self.f, self.k = self.inverse.new_empty(0, columns), self.inverse.new_empty(0, columns)

    def scores(self, columns: Tensor) -> Tensor:
        """Return what each of some columns costs when it leaves alone."""
        inverse, gram = self.diagonals[:, self.place[columns]]
        return gram / inverse

    def blocks(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return A and G of some columns."""
        at = self.place[columns]
        return self._pick(at, at)

    def _pick(self, rows: Tensor, columns: Tensor | slice) -> tuple[Tensor, Tensor]:
        f, k = self.f[:, columns], self.k[:, columns]
        own, other = self.f[:, rows].T, self.k[:, rows].T
        inverse, gram = self.inverse[rows][:, columns], self.gram[rows][:, columns]
        return torch.addmm(inverse, own, f, alpha=-1), torch.addmm(gram, own, k, alpha=-1).addmm_(other, f, alpha=-1)

    def remove(self, columns: Tensor) -> None:
        """Take columns out: the others take over what they can."""
        at = self.place[columns]
        inverse, gram = self._pick(at, slice(None))
        root = torch.linalg.cholesky(inverse[:, at])
        f, h = (torch.linalg.solve_triangular(root, rows, upper=False) for rows in (inverse, gram))
        k = h - torch.linalg.solve_triangular(root, h[:, at].T, upper=False).T @ f / 2
        self.diagonals[0] -= f.square().sum(dim=0)
        self.diagonals[1] -= 2 * (f * k).sum(dim=0)
        self.f, self.k = torch.cat((self.f, f)), torch.cat((self.k, k))
        self.place[columns] = -1
        if len(self.f) >= COLLECTED:
            self._apply()

    def _apply(self) -> None:
        left = (self.place[self.alive] >= 0).nonzero().flatten()
        f, k = self.f[:, left], self.k[:, left]
        self.inverse = self.inverse[left[:, None], left].addmm_(f.T, f, alpha=-1)
        self.gram = self.gram[left[:, None], left].addmm_(f.T, k, alpha=-1).addmm_(k.T, f, alpha=-1)
        self.diagonals = torch.stack((self.inverse.diagonal(), self.gram.diagonal()))
        self.alive = self.alive[left]
        self.place[self.alive] = torch.arange(len(left), device="cpu")
        self._start(len(left))


def information(statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
    """Node information score of hierarchical graph pooling: ``||(I - D^-1 A) H||_1`` of each node (Zhang et al., 2019).

    What a node's neighbours do not tell about it. Nodes are heads where whole pools leave together, with A their linear
    CKA, and else columns, with A their absolute correlation; H holds their outputs on some rows. No self-loops.
    The score of a head is shared by its columns.

    Raises:
        ValueError: There is no sample.
    """
    if statistics.sample is None:
        raise ValueError("statistics: wanted rows of the inputs (sample), got None")
    pools, sample = groups.pools, statistics.sample.double()
    if groups.whole:
        order = torch.cat(pools).to(sample.device)
        graph = cka(statistics.covariance[order][:, order], len(pools))
        nodes = sample[:, order].unflatten(1, (len(pools), -1)).transpose(1, 2).flatten(0, 1)
    else:
        graph, nodes = correlation(statistics.covariance).abs(), sample
    graph.fill_diagonal_(0)
    graph /= graph.sum(dim=1, keepdim=True).clamp_min(1e-30)
    scores = (nodes - nodes @ graph.T).abs().sum(dim=0)
    if not groups.whole:
        return scores
    spread = torch.empty(sample.shape[1], dtype=torch.float64, device=sample.device)
    spread[order] = (scores / groups.tile).repeat_interleave(groups.tile)
    return spread


class Criterion:
    """How the columns of a layer, the QK channels of a head and the outputs of a sublayer are priced.

    A subclass gives at least :meth:`columns`, and is made known to :func:`gohsp.prune` by :func:`register`.

    Attributes:
        name: What ``method`` calls it.
        scale: "share" if its prices are compared within one layer only: they become shares of what all columns of
            their layer cost. "loss" if they are on one scale for all blocks, as what the loss of the model would rise
            by is. The budget compares blocks by them.
        guided: Whether the graph's scores are for it; see :func:`head_guide`. ADMM follows them then, and
            :meth:`eliminate` may.
    """

    name: str = ""
    scale: Literal["share", "loss"] = "share"
    guided: bool = False

    def survey(
        self, opened: OpenModel, stream: Tensor, sensitivities: Sequence[Sensitivity], seed: int
    ) -> list[Tensor] | None:
        """Look at the whole dense model before its layers are priced one by one.

        Args:
            opened: Dense model in evaluation mode. It is not changed.
            stream: Tokens before its first block, [images, N, D].
            sensitivities: Of its sublayers.
            seed: Of all draws.

        Returns:
            Of each sublayer the price of each input of its ``write``, float64 [m]: ``prices`` in
            :class:`LayerStatistics`. None, the default, where each layer is priced by itself.
        """
        return None

    def columns(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
        """Return the price of each column that a linear layer reads, [m] float64, high = keep."""
        raise NotImplementedError

    def qk_channels(self, statistics: QKStatistics) -> Tensor:
        """Return the price of each QK channel of each head, [H, d] float64: by default its energy."""
        return statistics.energy

    def outputs(self, statistics: OutputStatistics) -> Tensor:
        """Return the price of each residual feature that a sublayer writes, [D] float64.

        A sum has nothing that could take over, so by default it is the energy that the output adds times what an error
        in it costs.
        """
        return statistics.energy * statistics.metric.diagonal()

    def eliminate(self, statistics: LayerStatistics, groups: PruningGroups, keep: int = 0) -> RemovalOrder:
        """Order the columns of a layer by how dispensable they are, until no more than ``keep`` are left."""
        return by_score(self._scaled(self.columns(statistics, groups)), groups, keep)

    def favours(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor | None:
        """Return the factors [m] by which ADMM multiplies squared norms in its projection, or None for none."""
        return self.columns(statistics, groups)

    def qk_costs(self, statistics: QKStatistics) -> Tensor:
        """Return what each QK channel costs in the budget, [H, d] float64 on the CPU.

        On the scale of losses the channels of a head share, by their prices, what the head's attention is worth: the
        cost of replacing its output by the mean of its V, which is exactly what is left when all its QK channels are
        gone. Ours.
        """
        prices = self.qk_channels(statistics)
        if self.scale == "share":
            return self._scaled(prices)
        return (prices / prices.sum(dim=1, keepdim=True).clamp_min(1e-30) * statistics.worth[:, None]).cpu()

    def output_costs(self, statistics: OutputStatistics) -> Tensor:
        """Return what each residual feature that a sublayer writes costs in the budget, [D] float64 on the CPU."""
        return self._scaled(self.outputs(statistics))

    def _scaled(self, prices: Tensor) -> Tensor:
        if self.scale == "loss":
            return prices.cpu()
        return (prices / prices.sum().clamp_min(1e-30)).cpu()


CRITERIA: dict[str, Criterion] = {}
"""What :func:`gohsp.prune` takes as ``method``, by name."""


def register(criterion: Criterion) -> None:
    """Make a criterion known to :func:`gohsp.prune`.

    Raises:
        ValueError: It has no name, or one that is taken, or no scale that is known.
    """
    if not criterion.name or criterion.name in CRITERIA:
        raise ValueError(f"criterion.name: wanted one that is free, got {criterion.name!r}")
    if criterion.scale not in ("share", "loss"):
        raise ValueError(f"criterion.scale: wanted 'share' or 'loss', got {criterion.scale!r}")
    CRITERIA[criterion.name] = criterion


class OptimalBrainSurgeon(Criterion):
    """Backward elimination by the error that remains after the other columns have taken over; see :func:`obs`."""

    scale = "loss"

    def __init__(self, name: str, guided: bool) -> None:
        self.name, self.guided = name, guided

    def eliminate(self, statistics: LayerStatistics, groups: PruningGroups, keep: int = 0) -> RemovalOrder:
        return obs(statistics if self.guided else replace(statistics, guide=None), groups, keep)

    def favours(self, statistics: LayerStatistics, groups: PruningGroups) -> None:
        """Return None: what ADMM minimises is the same error."""


class Random(Criterion):
    """Chance. Its costs are alike in every block, so that budgets come out near uniform."""

    name = "random"

    def columns(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
        return self._draw((statistics.weight.shape[1],), statistics.generator)

    def qk_channels(self, statistics: QKStatistics) -> Tensor:
        return self._draw(statistics.energy.shape, statistics.generator)

    def outputs(self, statistics: OutputStatistics) -> Tensor:
        return self._draw(statistics.energy.shape, statistics.generator)

    @staticmethod
    def _draw(shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


class Magnitude(Criterion):
    """Sum of the absolute or squared weights of a column: "l1" (Li et al., 2017) and "l2".

    Of a QK channel it is the product of the norms of its q row and its k row, of an output that of its row.
    """

    def __init__(self, power: int) -> None:
        self.name, self.power = f"l{power}", power

    def columns(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
        return statistics.weight.abs().sum(dim=0) if self.power == 1 else statistics.weight.square().sum(dim=0)

    def qk_channels(self, statistics: QKStatistics) -> Tensor:
        norms = statistics.weight.detach().double().norm(p=self.power, dim=1).view(3, *statistics.energy.shape)
        return (norms[0] * norms[1]) ** self.power

    def outputs(self, statistics: OutputStatistics) -> Tensor:
        return statistics.weight.detach().double().norm(p=self.power, dim=1) ** self.power


class Taylor(Criterion):
    """Squared first-order change of the model's features when a column is taken out (Molchanov et al., 2017).

    Their criterion is about the loss on labelled images. There are no labels here, so it is about the features that the
    head reads.
    """

    name = "taylor"

    def columns(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
        """Return the first-order terms.

        Raises:
            ValueError: They were not measured.
        """
        if statistics.taylor is None:
            raise ValueError("statistics: wanted first-order terms (taylor), got None")
        return statistics.taylor


class Surveyed(Taylor):
    """Prices that were found by a look at the whole model, on the scale of first-order terms.

    What the look leaves out, such as the residual features that a sublayer reads, has its first-order term.
    """

    scale = "loss"

    def __init__(self, name: str) -> None:
        self.name = name

    def columns(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
        return super().columns(statistics, groups) if statistics.prices is None else statistics.prices


class Activation(Criterion):
    """Squared norm of a column's weights times the variance of its input: how much it moves the stream by itself."""

    name = "activation"

    def columns(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
        return statistics.weight.square().sum(dim=0) * statistics.covariance.diagonal()

    def outputs(self, statistics: OutputStatistics) -> Tensor:
        return statistics.energy


class Information(Criterion):
    """Node information score of hierarchical graph pooling (Zhang et al., 2019); see :func:`information`."""

    name = "information"

    def columns(self, statistics: LayerStatistics, groups: PruningGroups) -> Tensor:
        return information(statistics, groups)

    def outputs(self, statistics: OutputStatistics) -> Tensor:
        return statistics.energy


for _criterion in (
    OptimalBrainSurgeon("gohsp", guided=True),
    OptimalBrainSurgeon("obs", guided=False),
    Random(),
    Magnitude(1),
    Magnitude(2),
    Taylor(),
    Activation(),
    Information(),
):
    register(_criterion)


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


def by_score(scores: Tensor, groups: PruningGroups, keep: int = 0) -> RemovalOrder:
    """Return the elimination that always takes the cheapest step, for scores [m] that no removal changes."""
    scores = scores.cpu()
    queues = [pool[scores[pool].argsort(stable=True)] for pool in groups.pools]
    steps, losses = [], []
    while sum(map(len, queues)) > keep and (pools := groups.open([len(queue) for queue in queues])):
        costs = [float(scores[queues[pool][: groups.step(len(queues[pool]))]].sum()) for pool in pools]
        best = min(range(len(pools)), key=costs.__getitem__)
        queue = queues[pools[best]]
        size = groups.step(len(queue))
        steps.append(queue[:size].sort().values)
        losses.append(costs[best])
        queues[pools[best]] = queue[size:]
    return RemovalOrder(steps, losses, torch.cat(queues).sort().values)


def _cheapest_together(left: _Elimination, pool: Tensor, size: int) -> tuple[Tensor, float]:
    """Return so many columns of a pool, taken one after the other, each priced after those before it, and their cost.

    The cheapest by their own scores might be twins, each free only while the other stays. Four times as many candidates
    as are wanted are looked at; between these the order is exact, since a downdate of the candidates' square of the
    inverse, and of their Gram matrix, needs nothing from outside.
    """
    candidates = pool
    if len(pool) > size:
        candidates = pool[left.scores(pool).argsort(stable=True)[: 4 * size]]
    blocks = left.blocks(candidates)
    if len(candidates) == size:
        return candidates.sort().values, _joint_cost(*blocks)
    square, gram = (block.numpy().copy() for block in blocks)
    taken = np.zeros(len(candidates), dtype=bool)
    for _ in range(size):
        gone = int(np.where(taken, np.inf, gram.diagonal() / np.where(taken, 1.0, square.diagonal())).argmin())
        transfer = square[gone] / square[gone, gone]
        row = gram[gone] - gram[gone, gone] / 2 * transfer
        change = transfer[:, None] * row
        gram -= change
        gram -= change.T
        square -= transfer[:, None] * square[gone]
        taken[gone] = True
    chosen = torch.from_numpy(taken)
    return candidates[chosen].sort().values, _joint_cost(*(block[chosen][:, chosen] for block in blocks))


def _joint_cost(inverse: Tensor, gram: Tensor) -> float:
    """Return what columns cost that leave together, from their squares of A and G."""
    return float((gram * torch.linalg.inv(inverse)).sum())


def _factor(guide: Tensor | None, pool: int) -> float:
    return 1.0 if guide is None else float(guide[pool])
