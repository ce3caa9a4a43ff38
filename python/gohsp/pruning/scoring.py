# SPDX-License-Identifier: Apache-2.0
"""The first look at a dense model: what each step of an elimination would cost, in every block and every matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gohsp.models.base import Attention, BlockGeometry, Mlp, OpenModel, Sublayer, Trace
from gohsp.pruning.budget import Step
from gohsp.pruning.calibration import background, each_chunk, entered
from gohsp.pruning.criteria import (
    CRITERIA,
    LayerStatistics,
    OutputStatistics,
    PruningGroups,
    QKStatistics,
    RemovalOrder,
    by_score,
    head_guide,
    qk_energy,
)
from gohsp.pruning.moments import Moments, Sums, sums_of
from gohsp.pruning.ranking import (
    SIMILARITIES,
    HeadScores,
    Similarity,
    read_by_loss,
    show_heads,
    stationary_distribution,
)
from gohsp.pruning.sensitivity import Sensitivity
from gohsp.pruning.share import Share

HIDDEN_TILE = 16  # neurons: a panel of the GEMM kernels
CHANNEL_TILE = 8  # QK and V channels of a head
COLUMN_TILE = 16  # residual features that a sublayer reads or writes
AXES = ("principal", "given")


@dataclass(frozen=True)
class PruneSettings:
    """What :func:`gohsp.prune` was asked for; the meaning of each stands there."""

    method: str
    groups: tuple[str, ...]
    optimiser: str
    refine: int
    similarity: str
    teleport: float
    high_is: str
    guidance: float
    ridge: float
    axes: str = "principal"

    @property
    def turned(self) -> tuple[str, ...]:
        """Which channels are turned into their principal axes before anything is ranked."""
        return tuple(group for group in ("qk", "v") if group in self.groups) if self.axes == "principal" else ()


@dataclass(frozen=True)
class Scores:
    """What the dense model told.

    Attributes:
        sensitivities: Of each sublayer.
        heads: Scores of the heads, [H] a block: the graph's, or those that were given.
        steps: For each block the steps of each kind of group that may go.
    """

    sensitivities: list[Sensitivity]
    heads: Sequence[Tensor]
    steps: list[dict[str, list[Step]]]


@dataclass(frozen=True)
class _SublayerStatistics:
    """What a criterion may know of one attention or MLP half."""

    write: LayerStatistics
    read: LayerStatistics | None
    qk: QKStatistics | None
    outputs: OutputStatistics | None


def score_groups(
    opened: OpenModel,
    stream: Tensor,
    sensitivities: list[Sensitivity],
    settings: PruneSettings,
    share: Share,
    generator: torch.Generator,
    tick: Callable[[], None],
    importance: Sequence[Tensor] | None = None,
    graphs: Sequence[Similarity] | None = None,
) -> Scores:
    """Walk once through a dense model.

    Args:
        opened: Dense model in evaluation mode.
        stream: Tokens before its first block, [images, N, D].
        sensitivities: Of its sublayers.
        settings: What was asked for.
        share: Which of the images these are.
        generator: Source of the draws of the random criterion.
        tick: Called after each sublayer.
        importance: Scores of the heads; ranked by the graph where none are given.
        graphs: Of each block, where the heads were looked at before they were turned; made here otherwise.
    """
    x = stream.clone()
    chains = [_chain(graph, settings) for graph in graphs or ()]
    attentions: list[tuple[Attention, _SublayerStatistics]] = []
    steps: list[Future[dict[str, list[Step]]]] = []
    with background() as do:
        for layer, sensitivity in zip(opened.sublayers, sensitivities, strict=True):
            size, graph = layer.geometry, None
            x = entered(layer, x)
            if isinstance(layer, Attention) and importance is None and graphs is None:
                graph = SIMILARITIES[settings.similarity](size.num_heads, size.head_dim, x.device)
            known = _sublayer_statistics(layer, x, sensitivity, settings, share, generator, graph)
            if graph is not None:
                chains.append(_chain(graph, settings))
            if isinstance(layer, Attention):
                attentions.append((layer, known))
            else:
                wait(steps)  # for the statistics of a layer to leave before those of the next come
                steps.append(do(partial(_mlp_steps, layer, known, settings)))
            tick()
        heads = _read(chains, [known.write for _, known in attentions], settings) if importance is None else importance
        found = [step.result() for step in steps]
    for mine, scores, (layer, known) in zip(found, heads, attentions, strict=True):
        mine |= _attention_steps(layer, known, head_guide(scores, settings.guidance), settings)
    return Scores(sensitivities, heads, [{g: mine[g] for g in settings.groups} for mine in found])


def graphs_of(opened: OpenModel, settings: PruneSettings, device: torch.device) -> list[Similarity]:
    """Return an empty graph of the heads of each block."""
    sizes = opened.geometry.blocks
    return [SIMILARITIES[settings.similarity](size.num_heads, size.head_dim, device) for size in sizes]


def _chain(graph: Similarity, settings: PruneSettings) -> Tensor:
    return stationary_distribution(graph.result(), settings.teleport).cpu()


def _sublayer_statistics(
    layer: Attention | Mlp,
    x: Tensor,
    sensitivity: Sensitivity,
    settings: PruneSettings,
    share: Share,
    generator: torch.Generator,
    graph: Any = None,
) -> _SublayerStatistics:
    """Run a sublayer on the stream, in place, and gather what its inputs and outputs are like."""
    reads, writes = (f"{layer.prefix}_{end}" in settings.groups for end in ("in", "out"))
    weights = sensitivity.weights()
    channels = qk_moments(layer, weights, settings)

    def look(part: Tensor) -> tuple[Trace | None, Sums, Sums | None, tuple[Tensor, Sums] | None]:
        trace = layer.trace(part)
        part.copy_(trace.after)
        rows = weights.expand(part.shape[:2])
        written = layer.weigh(trace, weights)
        return (
            None if graph is None else trace,  # else nothing holds on to it
            sums_of(trace.hidden, weight=written),
            sums_of(trace.seen, weight=rows) if reads else None,
            None if channels is None else channels.sums(trace),
        )

    moments = Moments(layer.write.in_features, device=x.device)
    inputs = Moments(layer.read.in_features, device=x.device)

    def take(found: tuple[Trace | None, Sums, Sums | None, tuple[Tensor, Sums] | None]) -> None:
        trace, hidden, seen, qk = found
        moments.add(hidden)
        if seen is not None:
            inputs.add(seen)
        if channels is not None and qk is not None:
            channels.add(*qk)
        if trace is not None and isinstance(layer, Attention):
            show_heads(graph, layer, trace)

    each_chunk(look, take, x)
    for gathered in (moments, inputs, channels, graph):
        if gathered is not None:
            gathered.add_up_(share)
    return _SublayerStatistics(
        write_statistics(layer, layer.write.weight, moments, sensitivity, generator),
        read_statistics(layer, inputs, sensitivity, generator) if reads else None,
        None if channels is None else channels.statistics(sensitivity, generator),
        output_statistics(layer, moments, sensitivity, generator) if writes else None,
    )


def _read(chains: list[Tensor], layers: list[LayerStatistics], settings: PruneSettings) -> HeadScores:
    if settings.high_is != "auto":
        return HeadScores(chains, settings.high_is)
    return read_by_loss(chains, [layer.weight for layer in layers], [layer.covariance for layer in layers])


def _attention_steps(
    layer: Attention, known: _SublayerStatistics, guide: Tensor, settings: PruneSettings
) -> dict[str, list[Step]]:
    criterion, found, size = CRITERIA[settings.method], _column_steps(layer, known, settings), layer.geometry
    orders: dict[str, RemovalOrder] = {}
    if "heads" in settings.groups:
        orders["heads"] = criterion.eliminate(replace(known.write, guide=guide), heads_of(size))
    if known.qk is not None:
        costs = criterion.qk_costs(known.qk)
        orders["qk"] = by_score(costs.flatten(), channels_of(size.num_heads, size))
    if "v" in settings.groups:
        orders["v"] = criterion.eliminate(known.write, channels_of(size.num_heads, size))
    for group, order in orders.items():
        found[group] = [
            Step(1 if group == "heads" else len(columns), loss, int(columns[0]) // size.head_dim)
            for columns, loss in order.steps_with_losses()
        ]
    return found


def _mlp_steps(layer: Mlp, known: _SublayerStatistics, settings: PruneSettings) -> dict[str, list[Step]]:
    found = _column_steps(layer, known, settings)
    if "hidden" in settings.groups:
        found["hidden"] = _plain_steps(CRITERIA[settings.method].eliminate(known.write, neurons_of(layer.geometry)))
    return found


def _column_steps(layer: Attention | Mlp, known: _SublayerStatistics, settings: PruneSettings) -> dict[str, list[Step]]:
    found, prefix = {}, layer.prefix
    if known.read is not None:
        groups = columns_of(layer.read.in_features)
        found[prefix + "_in"] = _plain_steps(CRITERIA[settings.method].eliminate(known.read, groups))
    if known.outputs is not None:
        costs = CRITERIA[settings.method].output_costs(known.outputs)
        found[prefix + "_out"] = _plain_steps(by_score(costs, columns_of(len(costs))))
    return found


def _plain_steps(order: RemovalOrder) -> list[Step]:
    return [Step(len(columns), loss) for columns, loss in order.steps_with_losses()]


def write_statistics(
    layer: Sublayer, weight: Tensor, moments: Moments, sensitivity: Sensitivity, generator: torch.Generator
) -> LayerStatistics:
    """Return what a criterion may know of the layer that writes, with given weights [D, m]."""
    return LayerStatistics(
        weight.detach().double() * layer.gain()[:, None],
        moments.regular_covariance(),
        sensitivity.metric,
        generator,
        taylor=sensitivity.taylor,
        sample=moments.sample,
        prices=sensitivity.prices,
    )


def read_statistics(
    layer: Sublayer, moments: Moments, sensitivity: Sensitivity, generator: torch.Generator
) -> LayerStatistics:
    """Return what a criterion may know of the layer that reads, from the moments of its inputs."""
    return LayerStatistics(
        layer.read.weight.detach().double(),
        moments.regular_covariance(),
        torch.diag(sensitivity.rows),
        generator,
        taylor=sensitivity.taylor_in,
        sample=moments.sample,
    )


def output_statistics(
    layer: Sublayer, moments: Moments, sensitivity: Sensitivity, generator: torch.Generator
) -> OutputStatistics:
    """Return what a criterion may know of the outputs of a sublayer, from the moments of what ``write`` reads."""
    weight = layer.write.weight.detach().double()
    mean = weight @ moments.mean()
    if layer.write.bias is not None:
        mean = mean + layer.write.bias.detach().double()
    spread = (weight @ moments.covariance() * weight).sum(dim=1)
    energy = (spread + mean.square()) * layer.gain().square()
    return OutputStatistics(layer.write.weight, energy, sensitivity.metric, generator)


class QKMoments:
    """What the QK channels of an attention half do, gathered chunk by chunk.

    Args:
        layer: The attention half.
        weights: Of the tokens, [N].
        turned: Whether its channels are in principal axes.
    """

    def __init__(self, layer: Attention, weights: Tensor, turned: bool) -> None:
        self.layer, self.weights, self.turned = layer, weights, turned
        self.energy = weights.new_zeros(layer.geometry.num_heads, layer.geometry.head_dim, dtype=torch.float64)
        self.gaps = Moments(0 if turned else layer.geometry.span, device=weights.device)

    def sums(self, trace: Trace) -> tuple[Tensor, Sums]:
        """Return what a chunk adds; several threads may ask at a time."""
        q, k, v = self.layer.split(trace.read)
        rows = self.weights.expand(trace.read.shape[:2])
        if self.turned:
            squares = q.square() * self.weights.to(q.dtype)[:, None]
            return squares.sum(dim=(0, 2), dtype=torch.float64), sums_of(trace.hidden[..., :0], weight=rows)
        gap = trace.hidden - v.mean(dim=2).flatten(1)[:, None]
        return qk_energy(q, k), sums_of(gap, weight=self.layer.weigh(trace, self.weights))

    def add(self, energy: Tensor, gap: Sums) -> None:
        """Add what :meth:`sums` gave."""
        self.energy += energy
        self.gaps.add(gap)

    def add_up_(self, share: Share) -> None:
        """Add what other processes have seen."""
        share.add_up_(self.energy)
        self.gaps.add_up_(share)

    def statistics(self, sensitivity: Sensitivity, generator: torch.Generator) -> QKStatistics:
        """Return what a criterion may know.

        In principal axes the energies are what the axes are sorted by, the mean square of a channel of q times what an
        error in it costs the features, to first order. That is a loss already, so a head is worth the sum of them.
        """
        layer = self.layer
        if self.turned:
            costs = sensitivity.queries.diagonal(dim1=1, dim2=2) * self.energy / self.gaps.weight
            return QKStatistics(layer.read.weight, costs, costs.sum(dim=1), generator)
        weight = layer.written()
        cost = weight.T @ sensitivity.metric @ weight * (self.gaps.xx / self.gaps.weight)
        worth = torch.stack([cost[head][:, head].sum() for head in heads_of(layer.geometry).pools])
        return QKStatistics(layer.read.weight, self.energy, worth, generator)


def qk_moments(layer: Sublayer, weights: Tensor, settings: PruneSettings) -> QKMoments | None:
    """Return what gathers the QK channels of a sublayer, or None where none may go."""
    if "qk" not in settings.groups or not isinstance(layer, Attention):
        return None
    return QKMoments(layer, weights, "qk" in settings.turned)


def heads_of(size: BlockGeometry) -> PruningGroups:
    """Whole heads; the last one of a block stays."""
    return PruningGroups(
        list(torch.arange(size.num_heads * size.head_dim, device="cpu").split(size.head_dim)), size.head_dim, 0
    )


def channels_of(heads: int, size: BlockGeometry) -> PruningGroups:
    """Tiles of channels, of which one stays in each of so many heads."""
    # A divisor of the width, so that every head can give the same number of whole tiles.
    tile = math.gcd(CHANNEL_TILE, size.head_dim)
    return PruningGroups(list(torch.arange(heads * size.head_dim, device="cpu").split(size.head_dim)), tile, tile)


def neurons_of(size: BlockGeometry) -> PruningGroups:
    """Tiles of neurons, of which one stays."""
    return PruningGroups([torch.arange(size.hidden, device="cpu")], HIDDEN_TILE, min(HIDDEN_TILE, size.hidden))


def columns_of(features: int) -> PruningGroups:
    """Tiles of residual features, of which one stays."""
    return PruningGroups([torch.arange(features, device="cpu")], COLUMN_TILE, min(COLUMN_TILE, features))
