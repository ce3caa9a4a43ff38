# SPDX-License-Identifier: Apache-2.0
"""Learned scores: what heads and tiles of neurons are worth, found by closing gates on them in a short training.

Every node of :mod:`gohsp.pruning.typed_graph` has a price, and every step of the training a budget that is drawn at
random. The smoothed knapsack of :func:`gohsp.pruning.budget.expected_choices` picks at these prices what that budget
pays for; how likely a node is to be picked is how far its gate is open. Gates draw what ``write`` reads to its mean,
and the prices follow the gradient of what that changes in the features. No labels, and no weight is trained: after some
hundred steps the prices are those of :func:`gohsp.prune`, which chooses and compensates as for any other criterion.

Gates that are trained under a cost are those of network slimming and of L0 regularisation (Liu et al., 2017; Louizos et
al., 2018). There the cost is a penalty; here the differentiable knapsack (Mensch and Blondel, 2018) holds it at the
budget, and since the budgets vary the scores are good for more than one. That, the first-order terms as the start and
the drawing towards means are ours. Prices are found in two ways:

- "learned": each node's own, free of each other;
- "learned-graph": by a scorer over the graph, as self-attention graph pooling has it (Lee et al., 2019): one graph
  convolution of what is known of the nodes, whose output is the score. The exponential stands where they have a tanh.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from gohsp.models.base import Attention, Mlp, OpenModel
from gohsp.pruning.budget import BlockBudget, Option, counted, expected_choices
from gohsp.pruning.calibration import CHUNK, all_threads
from gohsp.pruning.criteria import Surveyed, register
from gohsp.pruning.sensitivity import Sensitivity
from gohsp.pruning.typed_graph import nodes_of, spread, terms_of, typed_graph

STEPS = 200
BATCH = 8  # images
RATE = 0.05  # of Adam, on the logarithms of the prices
ROOM = (0.2, 0.8)  # budgets are drawn between these shares of the way from the least cost to the whole
CELLS = 256  # of the knapsack
WARM, COLD = 1.0, 0.1  # temperature at the first and the last step, relative to the median price


class Learned(Surveyed):
    """Prices that a training of gates leaves; see the top of this module.

    Args:
        name: What ``method`` calls it.
        scorer: Whether a graph convolution gives the prices; else each is free.
    """

    def __init__(self, name: str, scorer: bool) -> None:
        super().__init__(name)
        self.scorer = scorer

    def survey(
        self, opened: OpenModel, stream: Tensor, sensitivities: Sequence[Sensitivity], seed: int
    ) -> list[Tensor]:
        with all_threads(), torch.inference_mode(False), torch.no_grad():
            nodes = nodes_of(opened, sensitivities)
            terms = terms_of(nodes, sensitivities)
            level = terms.mean().clamp_min(1e-30)
            start = (terms / level).clamp_min(1e-6).log()
            basis = _convolved(opened, stream, sensitivities, start) if self.scorer else _unit(start)
            prices = _train(opened, stream.clone(), nodes, start, basis, seed)
            return spread(prices * level, nodes, sensitivities)


def _convolved(opened: OpenModel, stream: Tensor, sensitivities: Sequence[Sensitivity], start: Tensor) -> Tensor:
    """Return what is known of each node, mixed with its neighbours': D^-1/2 (A + I) D^-1/2 X, [n, features]."""
    graph = typed_graph(opened, stream, sensitivities)
    halves = [isinstance(layer, Attention) for layer, of in zip(opened.sublayers, graph.nodes, strict=True) for _ in of]
    depth = [index for index, of in enumerate(graph.nodes) for _ in of]
    logs = [values.clamp_min(1e-6 * values.mean() + 1e-30).log() for values in (graph.ranks(), graph.output)]
    known = torch.stack([start, *logs, *(start.new_tensor(values) for values in (halves, depth))], dim=1)
    known = (known - known.mean(dim=0)) / known.std(dim=0).clamp_min(1e-6)
    edges = graph.edges()
    near = edges + edges.T + _unit(edges)
    scale = near.sum(dim=1).rsqrt()
    return scale[:, None] * near * scale @ known


def _unit(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _train(
    opened: OpenModel, stream: Tensor, nodes: Sequence[Sequence[Tensor]], start: Tensor, basis: Tensor, seed: int
) -> Tensor:
    """Train prices exp(start + basis w) from w = 0 and return them, [n]."""
    wanted = torch.cat([_features(opened, part) for part in stream.split(CHUNK)])
    # Features of a single image do not vary.
    level = (wanted - wanted.mean(dim=0)).square().mean().clamp_min(1e-6 * float(wanted.square().mean()) + 1e-30)
    means, choices = _means(opened, stream), _choices(opened, nodes)
    least, whole = (sum(pick(option.cost for option in options) for options in choices) for pick in (min, max))
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(basis.shape[1], dtype=basis.dtype, device=basis.device, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=RATE)
    for step in range(STEPS):
        batch = torch.randperm(len(stream), generator=generator, device="cpu")[:BATCH]
        low, high = ROOM
        room = low + (high - low) * float(torch.rand((), generator=generator, device="cpu"))
        with torch.enable_grad():
            prices = (start + basis @ weights).exp()
            heat = WARM * (COLD / WARM) ** (step / STEPS) * float(prices.detach().median())
            gates = _gates(prices, nodes, choices, least + room * (whole - least), heat)
            with _gated(opened, gates, means):
                error = _features(opened, stream[batch]) - wanted[batch]
            (weights.grad,) = torch.autograd.grad(error.square().mean() / level, [weights])
        optimizer.step()
    return (start + basis @ weights.detach()).exp()


def _gates(
    prices: Tensor, nodes: Sequence[Sequence[Tensor]], choices: list[list[Option]], limit: float, temperature: float
) -> list[Tensor]:
    """Return how far the gate of each column of each sublayer is open, [m] from 0 to 1.

    The nodes of a sublayer go in the order of their prices, and the last one stays.
    """
    own = prices.split([len(of) for of in nodes])
    orders = [of.detach().argsort(stable=True) for of in own]
    zero = prices.new_zeros(1)
    losses = [torch.cat((zero, of[order][:-1].cumsum(0))) for of, order in zip(own, orders, strict=True)]
    gates = []
    chosen = expected_choices(choices, losses, limit, temperature, CELLS)
    for of, order, likely in zip(nodes, orders, chosen, strict=True):
        by_node = torch.zeros_like(likely).index_put((order,), likely.cumsum(0))  # it stays where no more have gone
        member = torch.cat([torch.full_like(node, index) for index, node in enumerate(of)])
        gates.append(by_node[member][torch.cat(list(of)).argsort()])
    return gates


def _choices(opened: OpenModel, nodes: Sequence[Sequence[Tensor]]) -> list[list[Option]]:
    """Return the exact parameters of each sublayer without its first nodes, for 0, 1, ... of them.

    A tile that is the odd rest counts as the first to go, wherever its price will have it.
    """
    found = []
    for index, (layer, of) in enumerate(zip(opened.sublayers, nodes, strict=True)):
        cost = counted(opened.blocks[index // 2], (1, 1), "params")
        full = BlockBudget.whole(layer.geometry)
        left = [sum(len(node) for node in of[gone:]) for gone in range(len(of))]
        found.append([Option(cost(_with(full, layer, columns))[index % 2], 0.0, {}) for columns in left])
    return found


def _with(full: BlockBudget, layer: Attention | Mlp, columns: int) -> BlockBudget:
    if isinstance(layer, Mlp):
        return replace(full, hidden=columns)
    return replace(full, heads=columns // layer.geometry.head_dim, qk=columns, v=columns)


def _features(opened: OpenModel, x: Tensor) -> Tensor:
    for layer in opened.sublayers:
        x = layer(layer.enter(x))
    return opened.features(x)


def _means(opened: OpenModel, stream: Tensor) -> list[Tensor]:
    """Return the mean of what each ``write`` reads, [m]."""
    totals: list[Tensor] = []
    for part in stream.split(CHUNK):
        sums = []
        for layer in opened.sublayers:
            trace = layer.trace(layer.enter(part))
            part = trace.after
            sums.append(trace.hidden.double().mean(dim=1).sum(dim=0))
        totals = [total + more for total, more in zip(totals, sums, strict=True)] if totals else sums
    return [(total / len(stream)).to(stream.dtype) for total in totals]


@contextmanager
def _gated(opened: OpenModel, gates: Sequence[Tensor], means: Sequence[Tensor]) -> Iterator[None]:
    """Draw what each ``write`` reads to its mean, as far as the gate of a column is closed."""
    with ExitStack() as stack:
        for layer, gate, mean in zip(opened.sublayers, gates, means, strict=True):

            def close(x: Tensor, gate: Tensor = gate, mean: Tensor = mean) -> Tensor:
                return mean + (x - mean) * gate.to(mean.dtype)

            stack.callback(layer.write.watch_inputs(close).remove)
        yield


for _criterion in (Learned("learned", scorer=False), Learned("learned-graph", scorer=True)):
    register(_criterion)
