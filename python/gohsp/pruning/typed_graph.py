# SPDX-License-Identifier: Apache-2.0
"""One graph over all blocks: heads and tiles of neurons as nodes, edges of two types, a walk that ranks them all.

The graph of :mod:`gohsp.pruning.ranking` compares the heads of one block. This one goes on through the whole model,
so that its stationary distribution also says how much each block should keep. Its edges are

- similarity, among the heads or the tiles of one sublayer: linear CKA of what they give, as in that graph;
- influence, from a node to each that writes what it reads: the energy of the composition of what the one writes into
  the residual stream with what the other reads of it. These are the virtual weights of Elhage et al. (2021, "A
  mathematical framework for transformer circuits"), weighted by the covariance of what is written. LayerNorm counts by
  its weights and by the mean that it takes out; its division is the same for all that one node reads.

The walk follows either type half of the time, each edge by its share of the node's edges of that type, and restarts at
what writes what the head of the model reads: personalised PageRank (Haveliwala, 2002) against the direction of the
data. A node is worth much if what reads it is, or if it is like a node that is. GOHSP has the walk over the
similarities of one block; types, restart, and the reading of the result as prices are ours.

Where edges are estimated anew after each removal, as hierarchical graph pooling with structure learning does after
each pooling (Zhang et al., 2019), heads that have gone are partialled out of the covariance before those that are left
are compared: two heads that were alike in what a third one held as well no longer are. The form is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gohsp.models.base import Attention, Mlp, OpenModel
from gohsp.pruning.calibration import each_chunk
from gohsp.pruning.criteria import LayerStatistics, PruningGroups, RemovalOrder, Surveyed, by_score, register
from gohsp.pruning.moments import Moments, Sums, damped, sums_of
from gohsp.pruning.ranking import aligned, cka, stationary_distribution
from gohsp.pruning.scoring import heads_of, neurons_of
from gohsp.pruning.sensitivity import Sensitivity

TELEPORT = 0.15  # probability of a restart, that of the first PageRank
IMAGES = 64  # from which the graph is estimated, or up to twice as many
DAMPING = 1e-6  # of covariances, relative to the mean variance: enough for a factorisation


@dataclass(frozen=True)
class TypedGraph:
    """A graph over the nodes of all sublayers, n in all.

    Attributes:
        nodes: Of each sublayer its nodes, each as the inputs of ``write`` that it stands for, int64.
        similarity: [n, n], symmetric; 0 between sublayers.
        influence: [n, n], from the node that reads (row) to the node that writes.
        output: [n], how much each node moves what the head of the model reads by itself.
    """

    nodes: list[list[Tensor]]
    similarity: Tensor
    influence: Tensor
    output: Tensor

    def edges(self) -> Tensor:
        """Return both types of edges together, [n, n]: each row has the same sum of either, where it has any."""
        return _shares(self.similarity.clone().fill_diagonal_(0)) + _shares(self.influence)

    def ranks(self) -> Tensor:
        """Return the stationary distribution of the walk, [n]."""
        return stationary_distribution(self.edges(), TELEPORT, restart=_positive(self.output))


def typed_graph(opened: OpenModel, stream: Tensor, sensitivities: Sequence[Sensitivity]) -> TypedGraph:
    """Estimate the graph of a dense model.

    Args:
        opened: Dense model in evaluation mode.
        stream: Tokens before its first block, [images, N, D]; some of the images are enough.
        sensitivities: Of its sublayers.
    """
    if any(block.attention.transition is not None for block in opened.blocks):
        raise ValueError(
            "method: wanted one that looks at one block at a time: this model has stages, and with them no residual "
            "stream that all of its blocks share"
        )
    nodes = nodes_of(opened, sensitivities)
    starts = torch.tensor([0, *map(len, nodes)], device="cpu").cumsum(0).tolist()
    count = starts[-1]
    x = stream[:: max(1, len(stream) // IMAGES)].clone()
    similarity, influence = (torch.zeros(count, count, dtype=torch.float64, device=x.device) for _ in range(2))
    output: list[Tensor] = []
    written: list[Tensor] = []
    for index, (layer, sensitivity) in enumerate(zip(opened.sublayers, sensitivities, strict=True)):
        mine = slice(starts[index], starts[index + 1])
        for before, roots in enumerate(written):
            found = (_seen(layer) @ roots).square().double()
            found = pooled(pooled(found, [_rows(layer, node) for node in nodes[index]]).T, places_of(nodes[before])).T
            influence[mine, starts[before] : starts[before + 1]] = found
        covariance = _advance(layer, x, sensitivity)
        similarity[mine, mine] = aligned(pooled(pooled(covariance.square(), nodes[index]).T, nodes[index]))
        roots = _written_roots(layer, covariance, nodes[index])
        energy = (roots * (sensitivities[-1].metric @ roots)).sum(dim=0)
        output.append(pooled(energy, places_of(nodes[index])))
        written.append(roots.to(layer.read.weight.dtype))
    return TypedGraph(nodes, similarity, influence, torch.cat(output).clamp_min(0))


def nodes_of(opened: OpenModel, sensitivities: Sequence[Sensitivity]) -> list[list[Tensor]]:
    """Return the nodes of each sublayer, as inputs of ``write``: heads, or tiles of neurons that are worth alike.

    They stand in the order in which these terms would have them leave.
    """
    nodes = []
    for layer, sensitivity in zip(opened.sublayers, sensitivities, strict=True):
        size = layer.geometry
        order = by_score(sensitivity.taylor, heads_of(size) if isinstance(layer, Attention) else neurons_of(size))
        nodes.append([*order.steps, order.left])
    return nodes


def terms_of(nodes: Sequence[Sequence[Tensor]], sensitivities: Sequence[Sensitivity]) -> Tensor:
    """Return the first-order terms of each node, [n]."""
    return torch.cat([pooled(found.taylor, of) for of, found in zip(nodes, sensitivities, strict=True)])


def spread(prices: Tensor, nodes: Sequence[Sequence[Tensor]], sensitivities: Sequence[Sensitivity]) -> list[Tensor]:
    """Return prices of columns from prices of nodes [n], [m] a sublayer: shared by first-order terms within a node."""
    found = []
    for of, own, sensitivity in zip(nodes, prices.split([len(of) for of in nodes]), sensitivities, strict=True):
        terms = _positive(sensitivity.taylor)  # a node of zeros is shared alike
        columns = torch.empty_like(terms)
        for node, price in zip(of, own, strict=True):
            columns[node] = price * terms[node] / terms[node].sum()
        found.append(columns)
    return found


def pooled(values: Tensor, nodes: Sequence[Tensor]) -> Tensor:
    """Return sums over the members of each node, along the first dimension."""
    return torch.stack([values[node].sum(dim=0) for node in nodes])


def places_of(nodes: Sequence[Tensor]) -> list[Tensor]:
    """Return where the members of each node are when nodes stand side by side."""
    sizes = [len(node) for node in nodes]
    return list(torch.arange(sum(sizes), device="cpu").split(sizes))


def _advance(layer: Attention | Mlp, x: Tensor, sensitivity: Sensitivity) -> Tensor:
    """Run a sublayer on the stream, in place, and return the covariance of what ``write`` reads."""
    weights = sensitivity.weights()

    def look(part: Tensor) -> Sums:
        trace = layer.trace(part)
        part.copy_(trace.after)
        return sums_of(trace.hidden, weight=layer.weigh(trace, weights))

    moments = Moments(layer.write.in_features, device=x.device)
    each_chunk(look, moments.add, x)
    return moments.regular_covariance()


def _written_roots(layer: Attention | Mlp, covariance: Tensor, nodes: Sequence[Tensor]) -> Tensor:
    """Return, node after node, a square root of the covariance of what each writes by itself, [D, m]."""
    weight = layer.written()
    return torch.cat(
        [weight[:, node] @ torch.linalg.cholesky(damped(covariance[node][:, node], DAMPING)) for node in nodes], dim=1
    )


def _seen(layer: Attention | Mlp) -> Tensor:
    """Return the weight of ``read`` as the residual stream meets it but for a norm's division, [r, D]."""
    weight = layer.read.weight.detach()
    if layer.geometry.post_norm:
        return weight
    for norm in layer.norms:
        scale = getattr(norm, "weight", None)
        weight = weight if scale is None else weight * scale.detach()
    return weight - weight.mean(dim=1, keepdim=True)


def _rows(layer: Attention | Mlp, node: Tensor) -> Tensor:
    """Return the outputs of ``read`` that belong to a node: of a head those of q, k and v."""
    parts = range(layer.read.out_features // layer.write.in_features)
    return torch.cat([node + part * layer.write.in_features for part in parts])


def _positive(values: Tensor) -> Tensor:
    return values + 1e-12 * values.mean() + 1e-30


def _shares(edges: Tensor) -> Tensor:
    return edges / edges.sum(dim=1, keepdim=True).clamp_min(1e-300)


class Graph(Surveyed):
    """Stationary distribution of the typed graph, times the sum of all first-order terms.

    Args:
        name: What ``method`` calls it.
        relearns: Whether similarities of heads are estimated anew after each removal.
    """

    def __init__(self, name: str, relearns: bool) -> None:
        super().__init__(name)
        self.relearns = relearns

    def survey(
        self, opened: OpenModel, stream: Tensor, sensitivities: Sequence[Sensitivity], seed: int
    ) -> list[Tensor]:
        graph = typed_graph(opened, stream, sensitivities)
        terms = terms_of(graph.nodes, sensitivities)
        return spread(graph.ranks() * terms.sum(), graph.nodes, sensitivities)

    def eliminate(self, statistics: LayerStatistics, groups: PruningGroups, keep: int = 0) -> RemovalOrder:
        if self.relearns and groups.whole and statistics.prices is not None:
            return _relearnt(statistics.covariance, statistics.prices, groups, keep)
        return super().eliminate(statistics, groups, keep)


def _relearnt(covariance: Tensor, prices: Tensor, groups: PruningGroups, keep: int) -> RemovalOrder:
    """Remove head after head, the least of a walk over those that are left, whose likeness is estimated anew each time.

    The walk restarts at the prices [m] that the whole graph gave, and shares out what those that are left cost there.
    """
    left, steps, losses = list(range(len(groups.pools))), list[Tensor](), list[float]()
    own = pooled(prices, groups.pools)
    while groups.tile * len(left) > keep and len(left) > 1:
        columns = torch.cat([groups.pools[head] for head in left])
        given = covariance if not steps else partial(covariance, torch.cat(steps))
        likeness = cka(given[columns][:, columns], len(left))
        ranks = stationary_distribution(likeness, TELEPORT, restart=_positive(own[left]))
        least = int(ranks.argmin())
        losses.append(float(ranks[least] * own[left].sum()))
        steps.append(groups.pools[left.pop(least)])
    return RemovalOrder(steps, losses, torch.cat([groups.pools[head] for head in left]).sort().values)


def partial(covariance: Tensor, gone: Tensor) -> Tensor:
    """Return the covariance [m, m] of what a regression on some columns leaves of all of them."""
    cross = covariance[:, gone]
    root = torch.linalg.cholesky(damped(covariance[gone][:, gone], DAMPING))
    explained = torch.linalg.solve_triangular(root, cross.T, upper=False)
    return covariance - explained.T @ explained


for _criterion in (Graph("graph", relearns=False), Graph("graph-relearnt", relearns=True)):
    register(_criterion)
