# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning without training or labels: choose what to keep, then let what is left take over.

Three passes over the calibration images, all of them block by block on cached tokens:

1. survey: the dense model tells how sensitive its features are to errors after each sublayer, how alike its heads are,
   and what each step of an elimination would cost;
2. budget: those costs, on one scale for all blocks, decide how much each block keeps;
3. cut and fit: from the first block to the last, each fed by the pruned network, the groups are chosen, and proj and
   fc2 are re-fitted so that the residual stream comes back to where the dense model's was.

GOHSP fixes that a graph ranking of heads guides, softly, an optimisation that imposes head sparsity and column sparsity
together. The closed forms used here (backward elimination, ridge regression, sensitivities) are our choice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gohsp import vit
from gohsp.budget import GROUPS, BlockBudget, BlockPlan, Step, allocate, parse_target
from gohsp.count import BlockSize, Count, count
from gohsp.mask import BlockMask, ModelMask
from gohsp.ranking import SIMILARITIES, check_reading, importance
from gohsp.scores import (
    CRITERIA,
    RIDGE,
    Elimination,
    Evidence,
    Grouping,
    by_score,
    head_guide,
    qk_energy,
    qk_scores,
)
from gohsp.statistics import (
    CHUNK,
    Moments,
    Sensitivity,
    Sublayer,
    embed,
    evaluating,
    measure_sensitivities,
    sublayers,
)

HIDDEN_TILE = 16  # neurons: a panel of the GEMM kernels
CHANNEL_TILE = 8  # QK and V channels of a head
DEFAULT_TARGET: Mapping[str, float] = MappingProxyType({"params": 0.65})


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did.

    Attributes:
        method: The criterion.
        dense, pruned: Costs of the model before and after.
        importance: The graph's score of each head, one float64 tensor [H] a block; see :func:`gohsp.rank_heads`.
        budgets: What each block was given.
        errors: After each block, the squared error of the pruned residual stream on the calibration images, as a share
            of the dense stream's variance. The fit has seen these images; expect more on others.
    """

    method: str
    dense: Count
    pruned: Count
    importance: list[Tensor]
    budgets: list[BlockBudget]
    errors: list[float]


@dataclass(frozen=True)
class PruneResult:
    """A mask, and the dense-shaped model that it has been applied to.

    Attributes:
        mask: What is kept.
        model: A copy of the given model with re-fitted weights and pruned entries at zero, so that
            ``gohsp.compress(model, mask)`` computes the same.
        report: How it came about.
    """

    mask: ModelMask
    model: nn.Module
    report: PruneReport


@dataclass(frozen=True)
class _Settings:
    method: str
    groups: tuple[str, ...]
    compensate: bool
    similarity: str
    teleport: float
    high_is: str
    guidance: float
    ridge: float


@dataclass(frozen=True)
class _Survey:
    """What the dense model told: sensitivities by sublayer, importance and steps by block."""

    sensitivities: list[Sensitivity]
    importance: list[Tensor]
    steps: list[dict[str, list[Step]]]


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    target: Mapping[str, float] = DEFAULT_TARGET,
    method: str = "gohsp",
    *,
    groups: Sequence[str] = ("heads", "hidden"),
    compensate: bool = True,
    similarity: str = "cka",
    teleport: float = 0.0,
    high_is: str = "important",
    guidance: float = 1.0,
    ridge: float = 0.3,
    max_images: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], object] | None = None,
) -> PruneResult:
    """Prune a vision transformer to a target, in one shot, from unlabelled images alone.

    Args:
        model: Dense timm vision transformer. It is not changed.
        batches: Batches of normalised images of one size, [B, C, height, width] each or (images, ...). A few hundred
            images are enough; their tokens are kept in memory (two or three times N * D numbers an image).
        target: Share of the dense model's cost to keep, everything counted: {"params": share} or {"macs": share}.
        method: Criterion of the choice: "gohsp", or "random", "magnitude" or "activation" to compare with.
        groups: What may go: "heads", "hidden" (neurons, in tiles of 16), "qk" and "v" (channels of a head, in tiles of
            8). One head, one tile of each kept head and one tile of neurons stay in every block.
        compensate: Re-fit proj and fc2 on what is kept. Without it the weights that stay are left as they are.
        similarity, teleport, high_is: The graph's; see :func:`gohsp.rank_heads`.
        guidance: How much the graph's score sways the choice of heads by "gohsp": costs are multiplied by
            ``(H * score) ** guidance``; 0 leaves the graph out.
        ridge: How strongly the re-fit is held to the dense weights, relative to the mean variance of its inputs.
        max_images: Use no more images than that.
        seed: Of everything that is drawn at random.
        on_progress: Called with (steps done, steps in all).

    Returns:
        The mask, the pruned model in dense shape, and a report.

    Raises:
        TypeError: The model, the batches or the target are not of a kind that is known.
        ValueError: A parameter is out of its range, the target is out of reach (the message names the nearest that is
            not), there are no images, or the model cannot be pruned.
    """
    kind, share = parse_target(target)
    settings = _Settings(
        method, tuple(groups), compensate, similarity, teleport, high_is, float(guidance), float(ridge)
    )
    _check(settings, vit.geometry(model))
    layers = sublayers(model)
    pruned = copy.deepcopy(model)
    mask = ModelMask.full(model)
    generator = torch.Generator().manual_seed(seed)
    tick = _ticker(on_progress, 1 + 2 * len(layers))
    with torch.no_grad(), evaluating(model), evaluating(pruned):
        stream, image_size = embed(model, batches, max_images)
        sensitivities = measure_sensitivities(model, stream, seed)
        tick()
        survey = _survey(model, stream, sensitivities, settings, generator, tick)
        dense_count = count(model, image_size)
        budgets = allocate(_plans(model, survey, dense_count.tokens), kind, share, getattr(dense_count, kind))
        errors = _Cutter(model, pruned, mask, stream, survey, settings, generator).run(budgets, tick)
        mask.apply_(pruned)
    report = PruneReport(method, dense_count, count(model, image_size, mask=mask), survey.importance, budgets, errors)
    return PruneResult(mask, pruned, report)


def _check(settings: _Settings, size: vit.Geometry) -> None:
    if settings.method not in CRITERIA:
        raise ValueError(f"method: wanted one of {', '.join(CRITERIA)}, got {settings.method!r}")
    groups = settings.groups
    if not groups or len(set(groups)) != len(groups) or not set(groups) <= set(GROUPS):
        raise ValueError(f"groups: wanted some of {', '.join(GROUPS)}, each once, got {groups!r}")
    if size.qk_norm and "qk" in groups:
        raise ValueError("groups: wanted no 'qk' for a model with qk-norm, which mixes the channels of a head")
    check_reading(settings.similarity, settings.teleport, settings.high_is)
    if not math.isfinite(settings.guidance):
        raise ValueError(f"guidance: wanted a finite number, got {settings.guidance}")
    if not (math.isfinite(settings.ridge) and settings.ridge >= 0):
        raise ValueError(f"ridge: wanted a non-negative number, got {settings.ridge}")


def _ticker(on_progress: Callable[[int, int], object] | None, total: int) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, total)

    return tick


def _survey(
    model: nn.Module,
    stream: Tensor,
    sensitivities: list[Sensitivity],
    settings: _Settings,
    generator: torch.Generator,
    tick: Callable[[], None],
) -> _Survey:
    """Walk once through the dense model and find what each step of an elimination would cost."""
    size, x = vit.geometry(model), stream.clone()
    survey = _Survey(sensitivities, [], [])
    for index, layer in enumerate(sublayers(model)):
        sensitivity, is_attention = sensitivities[index], index % 2 == 0
        moments = Moments(layer.write.in_features, device=x.device)
        graph = SIMILARITIES[settings.similarity](size.num_heads, size.head_dim, x.device)
        energy = _energy(layer, x, sensitivity, size) if is_attention and "qk" in settings.groups else None
        for part in x.split(CHUNK):
            hidden, after = layer.trace(part)
            moments.update(hidden, weight=sensitivity.weights().expand(hidden.shape[:2]))
            if is_attention:
                graph.update(hidden.unflatten(-1, (size.num_heads, size.head_dim)))
            part.copy_(after)
        evidence = Evidence(_seen(layer, layer.write.weight), moments.covariance(), sensitivity.metric, generator)
        if is_attention:
            survey.importance.append(importance(graph.result(), settings.teleport, settings.high_is).cpu())
            guide = head_guide(survey.importance[-1], settings.guidance)
            survey.steps.append(_attention_steps(layer, evidence, guide, energy, size, settings))
        elif "hidden" in settings.groups:
            steps = CRITERIA[settings.method](evidence, _neurons(size)).steps_with_losses()
            survey.steps[-1]["hidden"] = [Step(len(columns), loss) for columns, loss in steps]
        tick()
    return survey


def _attention_steps(
    layer: Sublayer,
    evidence: Evidence,
    guide: Tensor,
    energy: _Energy | None,
    size: vit.Geometry,
    settings: _Settings,
) -> dict[str, list[Step]]:
    criterion = CRITERIA[settings.method]
    found: dict[str, Elimination] = {}
    if "heads" in settings.groups:
        found["heads"] = criterion(replace(evidence, guide=guide), _heads(size))
    if energy is not None:
        scores = qk_scores(settings.method, layer.body.qkv.weight, energy.channels, energy.worth, evidence.generator)
        found["qk"] = by_score(scores.flatten(), _channels(size.num_heads, size))
    if "v" in settings.groups:
        found["v"] = criterion(evidence, _channels(size.num_heads, size))
    return {
        group: [
            Step(1 if group == "heads" else len(columns), loss, int(columns[0]) // size.head_dim)
            for columns, loss in elimination.steps_with_losses()
        ]
        for group, elimination in found.items()
    }


@dataclass(frozen=True)
class _Energy:
    """What the QK channels of a block do: [H, d] and [H], see :func:`gohsp.scores.qk_scores`."""

    channels: Tensor
    worth: Tensor


def _energy(layer: Sublayer, x: Tensor, sensitivity: Sensitivity, size: vit.Geometry) -> _Energy:
    heads, width = size.num_heads, size.head_dim
    channels = torch.zeros(heads, width, dtype=torch.float64, device=x.device)
    moments = Moments(heads * width, device=x.device)
    for part in x.split(CHUNK):
        qkv = layer.body.qkv(layer.norm(part)).unflatten(-1, (3, heads, width))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        channels += qk_energy(q, k)
        gap = nn.functional.scaled_dot_product_attention(q, k, v, scale=layer.body.scale) - v.mean(dim=2, keepdim=True)
        moments.update(gap.transpose(1, 2).flatten(2), weight=sensitivity.weights().expand(part.shape[:2]))
    weight = _seen(layer, layer.write.weight)
    cost = weight.T @ sensitivity.metric @ weight * (moments.xx / moments.weight)
    worth = torch.stack([cost[head][:, head].sum() for head in _heads(size).pools])
    return _Energy(channels, worth)


def _plans(model: nn.Module, survey: _Survey, tokens: int) -> list[BlockPlan]:
    size = vit.geometry(model)
    span = size.num_heads * size.head_dim
    dense = BlockSize(span, span, size.hidden, size.dim, size.dim, size.dim, size.dim)
    return [
        BlockPlan(block, dense, size.num_heads, tokens, steps)
        for block, steps in zip(vit.find_dense_blocks(model), survey.steps, strict=True)
    ]


class _Cutter:
    """The third pass: cuts and fits one sublayer after the other, each fed by the pruned network.

    Args:
        model: The dense model.
        pruned: Its copy, which is cut.
        mask: The full mask of the model, which is cut as well.
        stream: Tokens before the first block, [images, N, D].
        survey: What the first pass found.
        settings: The user's.
        generator: Source of the draws of the random criterion.
    """

    def __init__(
        self,
        model: nn.Module,
        pruned: nn.Module,
        mask: ModelMask,
        stream: Tensor,
        survey: _Survey,
        settings: _Settings,
        generator: torch.Generator,
    ) -> None:
        self.dense_layers, self.layers, self.mask = sublayers(model), sublayers(pruned), mask
        self.dense, self.stream = stream, stream.clone()
        self.survey, self.settings, self.generator = survey, settings, generator
        self.size = vit.geometry(model)

    def run(self, budgets: list[BlockBudget], tick: Callable[[], None]) -> list[float]:
        """Cut all blocks to their budgets and return the error of the stream after each."""
        errors = []
        for index, budget in enumerate(budgets):
            self._advance_dense(2 * index)
            self._cut_attention(2 * index, budget)
            tick()
            self._advance_dense(2 * index + 1)
            self._cut_mlp(2 * index + 1, budget)
            tick()
            spread = self.dense - self.dense.mean(dim=(0, 1))
            errors.append(float((self.stream - self.dense).square().sum() / spread.square().sum()))
        return errors

    def _advance_dense(self, index: int) -> None:
        self.dense = torch.cat([self.dense_layers[index](part) for part in self.dense.split(CHUNK)])

    def _cut_attention(self, index: int, budget: BlockBudget) -> None:
        size, block = self.size, self.mask.blocks[index // 2]
        moments = self._gather(index)
        kept = torch.arange(size.num_heads * size.head_dim)
        if budget.heads < size.num_heads:
            guide = head_guide(self.survey.importance[index // 2], self.settings.guidance)
            kept = self._choose(index, moments, kept, _heads(size), budget.heads * size.head_dim, guide)
        block.heads = _marked(kept, size).any(dim=1)
        if budget.v < len(kept):
            kept = self._choose(index, moments, kept, _channels(budget.heads, size), budget.v)
        block.v = _marked(kept, size)
        if budget.qk < budget.heads * size.head_dim:
            self._cut_qk(index, block, budget.qk)
            moments = self._gather(index)
        self._fit(index, moments, kept)

    def _cut_qk(self, index: int, block: BlockMask, keep: int) -> None:
        layer, size = self.layers[index], self.size
        energy = _energy(layer, self.stream, self.survey.sensitivities[index], size)
        weight = layer.body.qkv.weight
        scores = qk_scores(self.settings.method, weight, energy.channels, energy.worth, self.generator)
        heads = block.heads.nonzero().flatten()
        left = by_score(scores[heads].flatten(), _channels(len(heads), size), keep).left
        columns = torch.arange(size.num_heads * size.head_dim).view(size.num_heads, -1)[heads].flatten()
        block.qk = _marked(columns[left], size)
        gone = (~block.qk).flatten().to(weight.device)
        for rows in layer.body.qkv.weight, layer.body.qkv.bias:
            if rows is not None:
                rows[: 2 * len(gone)][gone.repeat(2)] = 0

    def _cut_mlp(self, index: int, budget: BlockBudget) -> None:
        moments = self._gather(index)
        kept = torch.arange(self.size.hidden)
        if budget.hidden < len(kept):
            kept = self._choose(index, moments, kept, _neurons(self.size), budget.hidden)
        block = self.mask.blocks[index // 2]
        block.hidden = torch.zeros_like(block.hidden).index_fill(0, kept, True)
        self._fit(index, moments, kept)

    def _gather(self, index: int) -> Moments:
        """Gather what write reads in the pruned network, and what it should give to bring the stream to the dense one.

        The target is the gap between the two streams with layer scale divided out, so that each layer also mends what
        the layers before it broke.
        """
        layer = self.layers[index]
        weights = self.survey.sensitivities[index].weights()
        moments = Moments(layer.write.in_features, layer.write.out_features, self.stream.device)
        gain = layer.gain()
        inverse = torch.where(gain == 0, 0.0, 1 / gain)  # a feature that is never written asks for nothing
        for part, wanted in zip(self.stream.split(CHUNK), self.dense.split(CHUNK), strict=True):
            hidden, _ = layer.trace(part)
            moments.update(hidden, (wanted - part) * inverse, weights.expand(hidden.shape[:2]))
        return moments

    def _choose(
        self, index: int, moments: Moments, kept: Tensor, grouping: Grouping, keep: int, guide: Tensor | None = None
    ) -> Tensor:
        """Return which of some columns of write stay."""
        layer = self.layers[index]
        columns = kept.to(self.stream.device)
        weight = layer.write.weight[:, columns].double()
        if self.settings.compensate:
            weight, _ = moments.fit(layer.write.weight.double(), columns, RIDGE, intercept=layer.write.bias is not None)
        evidence = Evidence(
            _seen(layer, weight),
            moments.covariance()[columns][:, columns],
            self.survey.sensitivities[index].metric,
            self.generator,
            guide,
        )
        return kept[CRITERIA[self.settings.method](evidence, grouping, keep).left]

    def _fit(self, index: int, moments: Moments, kept: Tensor) -> None:
        """Re-fit write on the kept columns, zero the others, and let the pruned stream through."""
        write = self.layers[index].write
        columns = kept.to(write.weight.device)
        weight = write.weight[:, columns].clone()
        if self.settings.compensate:
            has_bias = write.bias is not None
            fitted, bias = moments.fit(write.weight.double(), columns, self.settings.ridge, intercept=has_bias)
            weight = fitted.to(weight.dtype)
            if has_bias:
                write.bias.copy_(bias)
        write.weight.zero_()
        write.weight[:, columns] = weight
        for part in self.stream.split(CHUNK):
            part.copy_(self.layers[index](part))


def _seen(layer: Sublayer, weight: Tensor) -> Tensor:
    """Return the weights of write as the residual stream sees them: with layer scale, float64."""
    return weight.detach().double() * layer.gain()[:, None]


def _heads(size: vit.Geometry) -> Grouping:
    return Grouping(list(torch.arange(size.num_heads * size.head_dim).split(size.head_dim)), size.head_dim, 0)


def _channels(heads: int, size: vit.Geometry) -> Grouping:
    # A divisor of the width, so that every head can give the same number of whole tiles.
    tile = math.gcd(CHANNEL_TILE, size.head_dim)
    return Grouping(list(torch.arange(heads * size.head_dim).split(size.head_dim)), tile, tile)


def _neurons(size: vit.Geometry) -> Grouping:
    return Grouping([torch.arange(size.hidden)], HIDDEN_TILE, min(HIDDEN_TILE, size.hidden))


def _marked(columns: Tensor, size: vit.Geometry) -> Tensor:
    """Return a boolean [H, d] that is True at some columns of head outputs."""
    marked = torch.zeros(size.num_heads * size.head_dim, dtype=torch.bool)
    marked[columns] = True
    return marked.view(size.num_heads, size.head_dim)
