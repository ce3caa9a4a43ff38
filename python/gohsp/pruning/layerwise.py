# SPDX-License-Identifier: Apache-2.0
"""The second half of pruning: cut one sublayer after the other, each fed by the pruned network, and fit the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from gohsp.masks.mask import BlockMask, ModelMask
from gohsp.models.base import Attention, BlockGeometry, Mlp, OpenModel, Projection
from gohsp.pruning import layerwise_admm
from gohsp.pruning.budget import BlockBudget
from gohsp.pruning.calibration import all_threads, background, each_chunk, entered, through_
from gohsp.pruning.criteria import CRITERIA, RIDGE, LayerStatistics, PruningGroups, by_score, head_guide
from gohsp.pruning.moments import Moments, Sums, damped, sums_of
from gohsp.pruning.scoring import (
    PruneSettings,
    QKMoments,
    Scores,
    channels_of,
    columns_of,
    heads_of,
    neurons_of,
    output_statistics,
    qk_moments,
    read_statistics,
    write_statistics,
)
from gohsp.pruning.share import Share

OPTIMISERS = ("ridge", "admm", "drop")
REFINE_BATCH = 32  # images
REFINE_RATE = 2e-4  # of AdamW at the first step; it falls to nothing along a half cosine


class LayerwisePruner:
    """Prunes a model to its budgets, one layer after the other.

    Args:
        model: The dense model.
        pruned: Its copy, which is cut.
        mask: The full mask of the model, which is cut as well.
        stream: Tokens before the first block, [images, N, D].
        scores: What the dense model told.
        settings: What was asked for.
        share: Which of the images these are.
        generator: Source of all draws.
    """

    def __init__(
        self,
        model: OpenModel,
        pruned: OpenModel,
        mask: ModelMask,
        stream: Tensor,
        scores: Scores,
        settings: PruneSettings,
        share: Share,
        generator: torch.Generator,
    ) -> None:
        self.dense_layers, self.layers, self.mask = model.sublayers, pruned.sublayers, mask
        self.blocks = pruned.blocks
        self.dense, self.stream = stream, stream.clone()
        self.scores, self.settings, self.share, self.generator = scores, settings, share, generator

    def run(self, budgets: list[BlockBudget], tick: Callable[[], None]) -> list[float]:
        """Cut all blocks to their budgets and return the error of the stream after each."""
        errors = []
        with background() as do:
            ahead = do(partial(_after, self.dense_layers[0], self.dense))
            for block, budget in enumerate(budgets):
                self.stream = entered(self.layers[2 * block], self.stream)
                before = self.stream.clone() if self.settings.refine else self.stream
                for index, cut in ((2 * block, self._cut_attention), (2 * block + 1, self._cut_mlp)):
                    self.dense = ahead.result()
                    if index + 1 < len(self.layers):
                        ahead = do(partial(_after, self.dense_layers[index + 1], self.dense))
                    cut(index, budget)
                    through_(self.layers[index], self.stream)
                    tick()
                if self.settings.refine:
                    with all_threads():
                        self._refine(block, before)
                errors.append(self._error())
        return errors

    def _error(self) -> float:
        """Return the error of the stream where it is now, as a share of the dense stream's variance."""
        mean = self.dense.sum(dim=(0, 1)) / (self.share.total * self.dense.shape[1])
        self.share.add_up_(mean)
        sums = torch.stack(((self.stream - self.dense).square().sum(), (self.dense - mean).square().sum()))
        self.share.add_up_(sums)
        return float(sums[0] / sums[1])

    def _cut_attention(self, index: int, budget: BlockBudget) -> None:
        block, layer = self.mask.blocks[index // 2], self.layers[index]
        size = layer.geometry
        block.attn_in = self._cut_inputs(index, budget.attn_in)
        moments, channels = self._gather(index)
        kept = torch.arange(size.num_heads * size.head_dim, device="cpu")
        if budget.heads < size.num_heads:
            guide = head_guide(self.scores.heads[index // 2], self.settings.guidance)
            kept = self._choose_written(index, moments, kept, heads_of(size), budget.heads * size.head_dim, guide)
        block.heads = _marked(kept, size).any(dim=1)
        if budget.v < len(kept):
            kept = self._choose_written(index, moments, kept, channels_of(budget.heads, size), budget.v)
        block.v = _marked(kept, size)
        if len(kept) < size.span and _is_normalised(layer):
            gone = ~block.v.flatten()
            layer.read.clear_(torch.cat((torch.zeros_like(gone), torch.zeros_like(gone), gone)))
            moments, _ = self._gather(index)
        if budget.qk < budget.heads * size.head_dim:
            self._cut_qk(index, block, budget.qk, channels)
            moments, _ = self._gather(index)
        self._refit(self.layers[index].write, moments, kept)
        block.attn_out = self._cut_outputs(index, moments, budget.attn_out)

    def _cut_qk(self, index: int, block: BlockMask, keep: int, channels: QKMoments | None) -> None:
        assert channels is not None
        layer = channels.layer
        size = layer.geometry
        statistics = channels.statistics(self.scores.sensitivities[index], self.generator)
        scores = CRITERIA[self.settings.method].qk_costs(statistics)
        heads = block.heads.nonzero().flatten()
        left = by_score(scores[heads].flatten(), channels_of(len(heads), size), keep).left
        columns = torch.arange(size.num_heads * size.head_dim, device="cpu").view(size.num_heads, -1)[heads].flatten()
        block.qk = _marked(columns[left], size)
        gone = (~block.qk).flatten()
        layer.read.clear_(torch.cat((gone, gone, torch.zeros_like(gone))))

    def _cut_mlp(self, index: int, budget: BlockBudget) -> None:
        block, mlp = self.mask.blocks[index // 2], cast("Mlp", self.layers[index])
        size = mlp.geometry
        block.mlp_in = self._cut_inputs(index, budget.mlp_in)
        moments, _ = self._gather(index)
        kept = torch.arange(size.hidden, device="cpu")
        if budget.hidden < len(kept):
            kept = self._choose_written(index, moments, kept, neurons_of(size), budget.hidden)
        block.hidden = torch.zeros_like(block.hidden).index_fill(0, kept, True)
        if len(kept) < size.hidden and _is_normalised(mlp):
            mlp.read.clear_(mlp.rows(~block.hidden))
            moments, _ = self._gather(index)
        self._refit(self.layers[index].write, moments, kept)
        block.mlp_out = self._cut_outputs(index, moments, budget.mlp_out)

    def _cut_inputs(self, index: int, keep: int) -> Tensor:
        """Choose which residual features a sublayer reads, and let these stand in for the others. Returns the mask."""
        layer = self.layers[index]
        dim = layer.geometry.dim
        mask = torch.ones(dim, dtype=torch.bool, device="cpu")
        if keep == dim:
            return mask
        sensitivity = self.scores.sensitivities[index]
        weights = sensitivity.weights()

        def look(part: Tensor) -> Sums:
            seen = layer.seen(part)
            return sums_of(seen, layer.read(seen), weights.expand(part.shape[:2]))

        moments = Moments(layer.read.in_features, layer.read.out_features, self.stream.device)
        each_chunk(look, moments.add, self.stream)
        moments.add_up_(self.share)
        statistics = read_statistics(layer, moments, sensitivity, self.generator)
        kept = self._choose(statistics, columns_of(dim), keep)
        self._refit(layer.read, moments, kept)
        return torch.zeros_like(mask).index_fill(0, kept, True)

    def _cut_outputs(self, index: int, moments: Moments, keep: int) -> Tensor:
        """Choose which residual features a sublayer writes, and silence the others. Returns the mask."""
        layer = self.layers[index]
        dim = layer.geometry.dim
        mask = torch.ones(dim, dtype=torch.bool, device="cpu")
        if keep == dim:
            return mask
        statistics = output_statistics(layer, moments, self.scores.sensitivities[index], self.generator)
        scores = CRITERIA[self.settings.method].output_costs(statistics)
        kept = by_score(scores, columns_of(dim), keep).left
        mask = torch.zeros_like(mask).index_fill(0, kept, True)
        layer.write.clear_(~mask)
        return mask

    def _gather(self, index: int) -> tuple[Moments, QKMoments | None]:
        """Gather what write reads in the pruned network, and what it should give to bring the stream to the dense one.

        The target closes the gap between the two streams, so that each layer also mends what the layers before it
        broke. Where QK channels may go, what they do is gathered as well.
        """
        layer = self.layers[index]
        weights = self.scores.sensitivities[index].weights()
        channels = qk_moments(layer, weights, self.settings)

        def look(part: Tensor, wanted: Tensor) -> tuple[Sums, tuple[Tensor, Sums] | None]:
            trace = layer.trace(part)
            target = layer.wanted(trace, wanted - part)
            sums = sums_of(trace.hidden, target, layer.weigh(trace, weights))
            return sums, None if channels is None else channels.sums(trace)

        moments = Moments(layer.write.in_features, layer.write.out_features, self.stream.device)

        def take(found: tuple[Sums, tuple[Tensor, Sums] | None]) -> None:
            sums, qk = found
            moments.add(sums)
            if channels is not None and qk is not None:
                channels.add(*qk)

        each_chunk(look, take, self.stream, self.dense)
        moments.add_up_(self.share)
        if channels is not None:
            channels.add_up_(self.share)
        return moments, channels

    def _written(self, index: int, moments: Moments, weight: Tensor) -> LayerStatistics:
        return write_statistics(self.layers[index], weight, moments, self.scores.sensitivities[index], self.generator)

    def _choose_written(
        self, index: int, moments: Moments, kept: Tensor, groups: PruningGroups, keep: int, guide: Tensor | None = None
    ) -> Tensor:
        """Return which of some columns of write stay."""
        write = self.layers[index].write
        columns = kept.to(self.stream.device)
        weight = write.weight.detach().double()
        if self.settings.optimiser != "drop":
            fitted, _ = moments.fit(weight, columns, RIDGE, intercept=write.has_bias)
            weight = weight.index_copy(1, columns, fitted)
        statistics = replace(self._written(index, moments, weight).of(columns), guide=guide)
        return kept[self._choose(statistics, groups, keep)]

    def _choose(self, statistics: LayerStatistics, groups: PruningGroups, keep: int) -> Tensor:
        criterion = CRITERIA[self.settings.method]
        if self.settings.optimiser != "admm":
            return criterion.eliminate(statistics, groups, keep).left
        guided = statistics if criterion.guided else replace(statistics, guide=None)
        return layerwise_admm.choose(guided, groups, keep, criterion.favours(statistics, groups))

    def _refit(self, linear: Projection, moments: Moments, kept: Tensor) -> None:
        """Fit a linear layer on the columns that stay, unless these are to be left as they are; zero the others."""
        dense = linear.weight.detach()
        columns = kept.to(dense.device)
        left, bias = dense[:, columns], None
        if self.settings.optimiser != "drop":
            fitted, offset = moments.fit(dense.double(), columns, self.settings.ridge, intercept=linear.has_bias)
            left, bias = fitted.to(dense.dtype), offset if linear.has_bias else None
        linear.write_(torch.zeros_like(dense).index_copy(1, columns, left), bias)

    def _refine(self, block: int, before: Tensor) -> None:
        """Train a block for some steps to give the dense block's output from what the pruned network feeds it.

        What has been cut stays zero, since zeros on both sides of a group have no gradient.
        """
        index, opened = 2 * block + 1, self.blocks[block]
        self.mask.blocks[block].apply_(opened)
        sensitivity = self.scores.sensitivities[index]
        root = torch.linalg.cholesky(damped(sensitivity.metric, 1e-2))
        root = (root / root.square().sum().sqrt()).to(before.dtype)
        tokens = sensitivity.weights().to(before.dtype)[:, None]
        parts = [part for half in opened.sublayers for part in (*half.norms, half.body, half.scale)]
        parameters = [p for p in nn.ModuleList(parts).parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=REFINE_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.settings.refine)
        order = torch.empty(0, dtype=torch.int64, device="cpu")
        for _ in range(self.settings.refine):
            if len(order) == 0:
                order = torch.randperm(len(before), generator=self.generator, device="cpu")
            batch, order = order[:REFINE_BATCH].to(before.device), order[REFINE_BATCH:]
            with torch.inference_mode(False), torch.enable_grad():
                error = (opened(before[batch]) - self.dense[batch]) @ root
                loss = (error.square() * tokens).sum(dim=-1).mean()
                gradients = torch.autograd.grad(loss, parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            schedule.step()
        for parameter in parameters:
            parameter.grad = None
        self.stream = before
        through_(opened, self.stream)


def _after(layer: Attention | Mlp, stream: Tensor) -> Tensor:
    """Return the stream after a sublayer of the dense model."""
    inside = entered(layer, stream)
    inside = stream.clone() if inside is stream else inside
    through_(layer, inside)
    return inside


def _is_normalised(layer: Attention | Mlp) -> bool:
    """Whether what the writing matrix reads changes with the columns that go: its norm is over all of them."""
    return not isinstance(layer.inner_norm, nn.Identity)


def _marked(columns: Tensor, size: BlockGeometry) -> Tensor:
    """Return a boolean [H, d] that is True at some columns of head outputs."""
    marked = torch.zeros(size.num_heads * size.head_dim, dtype=torch.bool, device="cpu")
    marked[columns] = True
    return marked.view(size.num_heads, size.head_dim)
