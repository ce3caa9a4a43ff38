# SPDX-License-Identifier: Apache-2.0
"""The graph over all blocks against its definition: edges from the tokens themselves, ranks from another PageRank."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import networkx
import pytest
import torch
from torch import Tensor

from gohsp.models.base import Attention
from gohsp.models.registry import open_model
from gohsp.pruning.calibration import embed
from gohsp.pruning.criteria import CRITERIA
from gohsp.pruning.moments import Moments
from gohsp.pruning.prune import prune
from gohsp.pruning.ranking import cka
from gohsp.pruning.sensitivity import Sensitivity, measure_sensitivities
from gohsp.pruning.typed_graph import TELEPORT, TypedGraph, nodes_of, partial, spread, typed_graph
from tests.gohsp.pruning.test_criteria import heads, normal, statistics

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}  # heads of 16, 192 neurons


class Looked:
    """A small model with its graph, and what each ``write`` reads, token by token."""

    def __init__(self, model: Any, batch: Tensor) -> None:
        self.opened = open_model(model)
        with torch.no_grad():
            self.stream, _ = embed(self.opened, [batch])
            self.sensitivities = measure_sensitivities(self.opened, self.stream)
            self.graph = typed_graph(self.opened, self.stream, self.sensitivities)
            self.inputs, x = [], self.stream
            for layer in self.opened.sublayers:
                trace = layer.trace(x)
                x = trace.after
                self.inputs.append(trace.hidden)

    def place(self, sublayer: int, node: int) -> int:
        return sum(map(len, self.graph.nodes[:sublayer])) + node

    def weights(self, sublayer: int) -> Tensor:
        """Weights of all tokens, with the sum 1."""
        weights = self.sensitivities[sublayer].weights().expand(self.inputs[sublayer].shape[:2]).flatten()
        return weights / weights.sum()

    def written(self, sublayer: int, node: int) -> Tensor:
        """What a node adds to the stream at each token but for its mean, [tokens, D]."""
        columns = self.graph.nodes[sublayer][node]
        seen = self.inputs[sublayer][..., columns].flatten(0, 1)
        seen = seen - self.weights(sublayer) @ seen
        return seen @ self.opened.sublayers[sublayer].written()[:, columns].T


@pytest.fixture
def looked(make_model, images) -> Looked:
    return Looked(make_model(**SMALL, init_values=0.5), images(6, 32))


def test_every_column_is_in_one_node(looked: Looked) -> None:
    for layer, nodes in zip(looked.opened.sublayers, looked.graph.nodes, strict=True):
        assert torch.cat(nodes).sort().values.tolist() == list(range(layer.write.in_features))
        assert {len(node) for node in nodes} == {16}
        if isinstance(layer, Attention):
            assert all(node.tolist() == list(range(int(node[0]), int(node[0]) + 16)) for node in nodes)


def test_similarity_is_the_cka_of_nodes_of_one_sublayer(looked: Looked) -> None:
    for index, nodes in enumerate(looked.graph.nodes):
        moments = Moments(looked.opened.sublayers[index].write.in_features)
        moments.update(looked.inputs[index].flatten(0, 1), weight=looked.weights(index))
        order = torch.cat(nodes)
        mine = slice(looked.place(index, 0), looked.place(index, len(nodes)))
        got = looked.graph.similarity[mine, mine]
        torch.testing.assert_close(got, cka(moments.covariance()[order][:, order], len(nodes)))
        assert looked.graph.similarity[mine].sum().item() == pytest.approx(got.sum().item())


@pytest.mark.parametrize(("reader", "writer"), [(1, 0), (2, 0), (2, 1), (3, 2)])
def test_influence_is_the_energy_of_what_one_reads_of_the_other(looked: Looked, reader: int, writer: int) -> None:
    layer = looked.opened.sublayers[reader]
    for node, other in ((0, 1), (2, 2)):
        added = looked.written(writer, other)
        seen = (added - added.mean(dim=1, keepdim=True)) * layer.norm.weight
        columns = looked.graph.nodes[reader][node]
        rows = torch.cat([columns + 48 * part for part in range(3)]) if isinstance(layer, Attention) else columns
        energy = (seen @ layer.read.weight[rows].T).square().sum(dim=1)
        got = looked.graph.influence[looked.place(reader, node), looked.place(writer, other)]
        assert got.item() == pytest.approx((looked.weights(writer) @ energy).item(), rel=1e-4)


def test_no_node_is_influenced_by_those_behind_it(looked: Looked) -> None:
    assert not looked.graph.influence.triu().any()


def test_what_reaches_the_head_is_in_the_metric_of_the_features(looked: Looked) -> None:
    added = looked.written(2, 1)
    energy = (added @ looked.sensitivities[-1].metric * added).sum(dim=1)
    got = looked.graph.output[looked.place(2, 1)].item()
    assert got == pytest.approx((looked.weights(2) @ energy).item(), rel=1e-4)


def test_ranks_are_personalised_pagerank_with_half_of_each_type(looked: Looked) -> None:
    graph = looked.graph
    similar = graph.similarity.clone().fill_diagonal_(0)
    both = similar / similar.sum(dim=1, keepdim=True)
    read = graph.influence.sum(dim=1, keepdim=True)
    both += torch.where(read > 0, graph.influence / read, 0.0)
    network = networkx.from_numpy_array(both.numpy(), create_using=networkx.DiGraph)
    restart = dict(enumerate(graph.output.tolist()))
    ranks = networkx.pagerank(network, alpha=1 - TELEPORT, personalization=restart, tol=1e-14, max_iter=10_000)
    wanted = torch.tensor([ranks[node] for node in range(len(both))], dtype=torch.float64)
    torch.testing.assert_close(graph.ranks(), wanted, rtol=1e-7, atol=1e-10)


def test_a_graph_without_any_edges_ranks_by_what_reaches_the_head() -> None:
    nothing = torch.zeros(3, 3, dtype=torch.float64)
    output = torch.tensor([1.0, 3.0, 0.0], dtype=torch.float64)
    ranks = TypedGraph([], nothing, nothing, output).ranks()
    torch.testing.assert_close(ranks, output / 4, rtol=1e-6, atol=1e-9)
    assert bool(torch.isfinite(TypedGraph([], nothing, nothing, 0 * output).ranks()).all())


def test_prices_sum_to_the_first_order_terms_of_the_whole_model(looked: Looked) -> None:
    with torch.no_grad():
        found = CRITERIA["graph"].survey(looked.opened, looked.stream, looked.sensitivities, 0)
    assert found is not None
    terms = sum(sensitivity.taylor.sum() for sensitivity in looked.sensitivities)
    assert sum(prices.sum() for prices in found).item() == pytest.approx(float(terms))
    assert [len(prices) for prices in found] == [48, 192, 48, 192]


def test_prices_are_shared_within_a_node_by_first_order_terms(looked: Looked) -> None:
    taylor = torch.tensor([1.0, 0.0, 3.0, 0.0, 0.0], dtype=torch.float64)
    sensitivity: Sensitivity = replace(looked.sensitivities[0], taylor=taylor)
    (got,) = spread(torch.tensor([8.0, 6.0]), [[torch.tensor([0, 2]), torch.tensor([4, 1, 3])]], [sensitivity])
    torch.testing.assert_close(got, torch.tensor([2.0, 2.0, 6.0, 2.0, 2.0], dtype=torch.float64))


def test_the_odd_rest_is_a_node_of_its_own(make_model, images) -> None:
    opened = open_model(make_model(**SMALL, mlp_ratio=0.75))
    stream, _ = embed(opened, [images(2, 32)])
    nodes = nodes_of(opened, measure_sensitivities(opened, stream.detach()))
    assert [len(node) for node in nodes[1]] == [4, 16, 16]


@pytest.mark.parametrize("method", ["graph", "graph-relearnt"])
def test_a_block_that_hardly_anybody_reads_gives_most(make_model, images, method: str) -> None:
    model = make_model(**(SMALL | {"depth": 3}), init_values=1.0)
    with torch.no_grad():
        model.blocks[1].ls1.gamma.mul_(0.02)
        model.blocks[1].ls2.gamma.mul_(0.02)
    budgets = prune(model, [images(12, 32)], {"params": 0.7}, method).report.budgets
    assert (budgets[1].heads, budgets[1].hidden) == (1, 16)
    assert min(budgets[0].hidden, budgets[2].hidden) > 16


def test_what_a_regression_leaves() -> None:
    samples = normal(300, 6) @ normal(6, 6, seed=1)
    samples = samples - samples.mean(dim=0)
    gone = torch.tensor([4, 1])
    residual = samples - samples[:, gone] @ torch.linalg.lstsq(samples[:, gone], samples).solution
    got = partial(torch.cov(samples.T), gone)
    torch.testing.assert_close(got, torch.cov(residual.T), rtol=1e-4, atol=1e-4)


def by_hand(samples: Tensor, prices: Tensor, *, partials: bool) -> list[int]:
    """The order in which heads of width 3 leave, from the samples themselves and with another PageRank."""
    left, gone = list(range(len(prices) // 3)), []
    own = prices.view(-1, 3).sum(dim=1)
    samples = samples - samples.mean(dim=0)
    while len(left) > 1:
        out = samples.unflatten(1, (-1, 3))
        if gone and partials:
            before = out[:, gone].flatten(1)
            out = (samples - before @ torch.linalg.lstsq(before, samples).solution).unflatten(1, (-1, 3))
        network = networkx.Graph()
        for i, j in combinations(left, 2):
            network.add_edge(i, j, weight=float(cka(torch.cov(out[:, [i, j]].flatten(1).T), 2)[0, 1]))
        restart = {head: float(own[head]) for head in left}
        ranks = networkx.pagerank(network, alpha=1 - TELEPORT, personalization=restart, tol=1e-14, max_iter=10_000)
        gone.append(min(left, key=ranks.__getitem__))
        left.remove(gone[-1])
    return gone


def test_heads_are_compared_anew_after_each_removal() -> None:
    groups, moved = heads(columns=24), 0
    for seed in range(4):
        samples = normal(80, 24, seed=seed) @ normal(24, 24, seed=seed + 50)
        prices = normal(24, seed=seed + 90).abs()
        given = replace(statistics(columns=24), covariance=torch.cov(samples.T), prices=prices)
        got = CRITERIA["graph-relearnt"].eliminate(given, groups)
        order = [int(step[0]) // 3 for step in got.steps]
        assert order == by_hand(samples, prices, partials=True)
        assert got.left.tolist() == [column for head in range(8) if head not in order for column in groups.pools[head]]
        moved += order != by_hand(samples, prices, partials=False)
    assert moved > 1  # or nothing has been shown


def test_heads_are_compared_once_by_the_plain_graph() -> None:
    given = replace(statistics(), prices=torch.arange(12, 0, -1, dtype=torch.float64))
    assert [int(step[0]) // 3 for step in CRITERIA["graph"].eliminate(given, heads()).steps] == [3, 2, 1]
    stopped = CRITERIA["graph-relearnt"].eliminate(given, heads(), keep=6)
    assert len(stopped.steps) == 2 and len(stopped.left) == 6
