# SPDX-License-Identifier: Apache-2.0
"""One-shot pruning without training or labels: choose what to keep, then let what is left take over.

Three passes over the calibration images, all of them block by block on cached tokens. Where channels of heads may go,
one before them turns the heads into their principal axes (:mod:`gohsp.pruning.axes`).

1. score: the dense model tells how sensitive its features are to errors after each sublayer, how alike its heads are,
   and what each step of an elimination would cost;
2. budget: those costs, on one scale for all blocks, decide how much each block keeps;
3. cut and fit: from the first block to the last, each fed by the pruned network, the groups are chosen, and proj and
   fc2 are re-fitted so that the residual stream comes back to where the dense model's was.

GOHSP fixes that a graph ranking of heads guides, softly, an optimisation that imposes head sparsity and column sparsity
together. The closed forms used here (backward elimination, ridge regression, sensitivities) are our choice.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.arguments import (
    check_callable,
    check_kind,
    check_name,
    check_number,
    check_seed,
    check_sequence,
    check_whole,
)
from gohsp.compress import refuse_hooks
from gohsp.count import Count, count_opened
from gohsp.masks.mask import ModelMask
from gohsp.models.base import Geometry, OpenModel
from gohsp.models.hooks import evaluating
from gohsp.models.registry import open_model
from gohsp.progress import ticking
from gohsp.pruning import learned, typed_graph  # noqa: F401  register their criteria
from gohsp.pruning.axes import turn_heads_, turned_copy
from gohsp.pruning.budget import (
    ATTENTION_GROUPS,
    GROUPS,
    MLP_GROUPS,
    BlockBudget,
    BlockPlan,
    allocate,
    counted,
    parse_target,
)
from gohsp.pruning.calibration import embed, one_thread
from gohsp.pruning.criteria import CRITERIA, Criterion
from gohsp.pruning.latency import LatencyTable
from gohsp.pruning.layerwise import OPTIMISERS, LayerwisePruner
from gohsp.pruning.ranking import check_reading, check_scores
from gohsp.pruning.scoring import AXES, PruneSettings, Scores, graphs_of, score_groups
from gohsp.pruning.sensitivity import measure_sensitivities
from gohsp.pruning.share import Share, check_agreement, check_shared

DEFAULT_GROUPS = ("heads", "hidden", "qk", "v")
DEFAULT_TARGET: Mapping[str, float] = MappingProxyType({"params": 0.65})


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` did.

    Attributes:
        method: The criterion.
        dense, pruned: Costs of the model before and after.
        importance: Scores of the heads, [H] a block with the sum 1: those that were given, or the graph's with how they
            were read; see :func:`gohsp.rank_heads`.
        budgets: What each block was given.
        errors: After each block, the squared error of the pruned residual stream on the calibration images, as a share
            of the dense stream's variance. The fit has seen these images; expect more on others.
        turned: Which channels, "qk" and "v", the mask means in principal axes and not as they were given.
    """

    method: str
    dense: Count
    pruned: Count
    importance: Sequence[Tensor]
    budgets: list[BlockBudget]
    errors: list[float]
    turned: tuple[str, ...] = ()


@dataclass(frozen=True)
class PruneResult:
    """A mask, and the dense-shaped model that it has been applied to.

    Attributes:
        mask: What is kept: of ``model``, and of the given model as well where nothing was turned
            (``report.turned``). For a mask of turned channels alone :func:`gohsp.pruning.axes.principal_axes` makes the
            dense model that it means.
        model: A copy of the given model with re-fitted weights and pruned entries at zero, so that
            ``gohsp.compress(model, mask)`` computes the same.
        report: How it came about.
    """

    mask: ModelMask
    model: nn.Module
    report: PruneReport


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    target: Mapping[str, float] = DEFAULT_TARGET,
    method: str = "gohsp",
    *,
    groups: Sequence[str] | None = None,
    optimiser: str = "ridge",
    refine: int = 0,
    budgets: Sequence[BlockBudget] | None = None,
    floors: Mapping[str, float] = MappingProxyType({}),
    ignore: Sequence[nn.Module | str] = (),
    latency: LatencyTable | None = None,
    importance: Sequence[Tensor] | None = None,
    similarity: str = "cka",
    teleport: float = 0.0,
    high_is: str = "important",
    guidance: float = 1.0,
    ridge: float = 0.3,
    axes: str = "principal",
    max_images: int | None = None,
    shared: bool = False,
    seed: int = 0,
    on_progress: Callable[[int, int], object] | None = None,
) -> PruneResult:
    """Prune a vision transformer to a target, in one shot, from unlabelled images alone.

    Args:
        model: Dense vision transformer that gohsp knows. It is not changed.
        batches: Batches of normalised images of one size, [B, C, height, width] each or (images, ...). A few hundred
            images are enough; their tokens are kept in memory (two or three times N * D numbers an image).
        target: Share of the dense model's cost to keep, everything counted: {"params": share}, {"macs": share} or, with
            a latency table, {"ms": share}.
        method: Criterion of the choice: "gohsp", or one of the others in :data:`gohsp.pruning.criteria.CRITERIA` to
            compare with.
        groups: What may go: "heads", "hidden" (neurons, in tiles of 16), "qk" and "v" (channels of a head, in tiles of
            8), "attn_in", "attn_out", "mlp_in", "mlp_out" (residual features that a sublayer reads or writes, in tiles
            of 16). One head, one tile of each kept head and one tile of everything else stay in every block. By
            default heads, neurons, QK and V channels; no QK channels where q and k have norms, which mix them.
        optimiser: How the choice and the weights are found, layer by layer: "ridge" chooses by the criterion and
            re-fits proj and fc2 on what is kept; "admm" lets an optimisation over the constraint set choose, with the
            criterion as its guide, and re-fits as well; "drop" chooses by the criterion and leaves the weights alone.
        refine: Steps of training that each block gets after its fit, towards the dense block's output.
        budgets: What each block keeps, instead of a target, such as the budgets in another report.
        floors: The least share of a kind of group that stays in each block, such as {"heads": 0.5}.
        ignore: What keeps all of its groups, such as ``[model.blocks[0], "blocks.11.mlp"]``: blocks, attentions and
            MLPs of the model, or what holds or is held by them, as modules or by name. The others give more. What
            proj and fc2 read still comes from a pruned network, so their weights are fitted like all others.
        latency: What the sublayers cost on this machine, for a target in milliseconds.
        importance: Scores of the heads, non-negative [H] a block, high = keep: those of :func:`gohsp.rank_heads`, or a
            ranking of one's own. By default the graph ranks them here, on all of the images.
        similarity, teleport, high_is: The graph's, where it ranks here; see :func:`gohsp.rank_heads`.
        guidance: How much a head's score sways the choice of heads by "gohsp": costs are multiplied by
            ``(H * score) ** guidance``; 0 leaves the scores out.
        axes: Where "qk" or "v" may go, "principal" turns the heads into their principal axes first, in which few
            channels hold what counts: the same function in other weights, see :mod:`gohsp.pruning.axes`. "given"
            leaves the channels as training left them.
        ridge: How strongly the re-fit is held to the dense weights, relative to the mean variance of its inputs.
        max_images: Use no more images than that, in each process.
        shared: Whether all processes of torch.distributed's default group call this together, each with images of its
            own and the same arguments otherwise (torchrun, Accelerate). All get the mask and the model that one
            process with all of the images, in the order of the processes, would find.
        seed: Of everything that is drawn at random.
        on_progress: Called with (steps done, steps in all). By default a bar shows them where stderr is a terminal.

    Returns:
        The mask, the pruned model in dense shape, and a report.

    Raises:
        TypeError: The model, the batches or the target are not of a kind that is known.
        RuntimeError: Processes that share the images came to different masks.
        ValueError: A parameter is out of its range, the target is out of reach (the message names the nearest that is
            not), there are no images, or the model cannot be pruned or has hooks where :func:`gohsp.compress` wants
            none.
    """
    opened = open_model(model)
    refuse_hooks(opened)
    kind, share = parse_target(target)
    depth = len(opened.blocks)
    check_callable("on_progress", on_progress)
    check_seed(seed)
    if budgets is not None:
        check_sequence("budgets", budgets, "a list of BlockBudget")
        for budget in budgets:
            check_kind("budgets", budget, BlockBudget, "BlockBudget")
    if budgets is not None and len(budgets) != depth:
        raise ValueError(f"budgets: wanted one for each of {depth} blocks, got {len(budgets)}")
    size = opened.geometry
    if groups is None:
        mixed = any(block.qk_whole for block in size.blocks)
        groups = [group for group in DEFAULT_GROUPS if not (mixed and group == "qk")]
    check_sequence("groups", groups, "a list of names")
    check_number("guidance", guidance)
    check_number("ridge", ridge, 0)
    settings = PruneSettings(
        method, tuple(groups), optimiser, refine, similarity, teleport, high_is, float(guidance), float(ridge), axes
    )
    _check(settings, floors, size)
    ignored = _ignored(opened, ignore)
    if ignored and budgets is not None:
        raise ValueError("ignore: wanted none beside budgets, which say what each block keeps")
    check_kind("shared", shared, bool, "True or False")
    check_shared(shared)
    if shared and type(CRITERIA[method]).survey is not Criterion.survey:
        raise ValueError(f"method: wanted one that prices layer by layer where processes share images, got {method!r}")
    if shared and refine:
        raise ValueError(f"refine: wanted 0 where processes share the images, got {refine!r}")
    if kind == "ms":
        _check_latency(latency, settings, size)
    if importance is not None:
        importance = check_scores(importance, [block.num_heads for block in size.blocks])
    turned = settings.turned
    graphs = graphs_of(opened, settings, next(model.parameters()).device) if turned and importance is None else None
    steps = 1 + 4 * depth + (1 + depth if turned else 0)
    with ticking("prune", on_progress, steps) as tick, one_thread():
        if turned:
            model = turned_copy(model)
            opened = open_model(model)
        with torch.no_grad(), evaluating(model):
            stream, image_size = embed(opened, batches, max_images)
            mine = Share.of(len(stream), shared)
            if turned:
                turn_heads_(opened, stream, turned, mine, seed, graphs or (), tick)
        pruned = copy.deepcopy(model)
        opened_copy = open_model(pruned)
        mask = replace(ModelMask.full_of(opened), turned=turned)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), evaluating(model), evaluating(pruned):
            sensitivities = measure_sensitivities(opened, stream, seed, mine)
            prices = CRITERIA[method].survey(opened, stream, sensitivities, seed)
            if prices is not None:
                sensitivities = [replace(of, prices=found) for of, found in zip(sensitivities, prices, strict=True)]
            tick()
            scores = score_groups(opened, stream, sensitivities, settings, mine, generator, tick, importance, graphs)
            scores = _without(scores, ignored)
            dense = count_opened(opened, image_size)
            if budgets is None:
                plans, outside = _plans(opened, scores, dense, kind, latency)
                budgets = allocate(plans, share, outside, floors, None if kind == "ms" else getattr(dense, kind))
            pruner = LayerwisePruner(opened, opened_copy, mask, stream, scores, settings, mine, generator)
            errors = pruner.run(list(budgets), tick)
            mask.apply_to_(opened_copy)
        if shared:
            check_agreement(mask)
        left = count_opened(opened, image_size, mask=mask)
        report = PruneReport(method, dense, left, scores.heads, list(budgets), errors, turned)
        return PruneResult(mask, pruned, report)


def _check(settings: PruneSettings, floors: Mapping[str, float], size: Geometry) -> None:
    check_name("method", settings.method, CRITERIA)
    check_name("optimiser", settings.optimiser, OPTIMISERS)
    groups = settings.groups
    if not groups or not all(group in GROUPS for group in groups) or len(set(groups)) != len(groups):
        raise ValueError(f"groups: wanted some of {', '.join(GROUPS)}, each once, got {groups!r}")
    whole = next((block.qk_whole for block in size.blocks if block.qk_whole), "")
    if "qk" in groups and whole:
        raise ValueError(f"groups: wanted no 'qk' for this model, because {whole}")
    written = next((block.writes_whole for block in size.blocks if block.writes_whole), "")
    for group in ("attn_out", "mlp_out"):
        if group in groups and written:
            raise ValueError(f"groups: wanted no {group!r} for this model, because {written}")
    check_kind("floors", floors, Mapping, "a mapping of shares")
    for group, floor in floors.items():
        check_number(f"floors[{group!r}]", floor)
        if group not in groups or not 0 <= floor <= 1:
            raise ValueError(f"floors: wanted shares from 0 to 1 of {', '.join(groups)}, got {group!r}: {floor!r}")
    check_reading(settings.similarity, settings.teleport, settings.high_is)
    check_name("axes", settings.axes, AXES)
    check_whole("refine", settings.refine, 0)


def _ignored(opened: OpenModel, ignore: Sequence[nn.Module | str]) -> set[tuple[int, str]]:
    """Return the numbers of the blocks, and "attn" or "mlp", of what holds some modules or is held by them."""
    check_sequence("ignore", ignore, "a list of modules or names")
    found: set[tuple[int, str]] = set()
    for wanted in ignore:
        check_kind("ignore", wanted, (nn.Module, str), "modules or names of modules")
        try:
            module = opened.model.get_submodule(wanted) if isinstance(wanted, str) else wanted
        except AttributeError as error:
            raise ValueError(f"ignore: the model has no module {wanted!r}") from error
        inside = set(module.modules())
        own = {
            (index, layer.prefix)
            for index, block in enumerate(opened.blocks)
            for layer in block.sublayers
            if block.module in inside or layer.body in inside or module in set(layer.body.modules())
        }
        if not own:
            shown = wanted if isinstance(wanted, str) else type(wanted).__name__
            raise ValueError(f"ignore: wanted modules in or around the model's blocks, got {shown}")
        found |= own
    return found


def _without(scores: Scores, ignored: set[tuple[int, str]]) -> Scores:
    """Return the scores without the steps that would take something from what is ignored."""
    halves = {"attn": ATTENTION_GROUPS, "mlp": MLP_GROUPS}
    gone = {(index, group) for index, half in ignored for group in halves[half]}
    steps = [
        {group: [] if (index, group) in gone else own for group, own in of.items()}
        for index, of in enumerate(scores.steps)
    ]
    return replace(scores, steps=steps)


def _check_latency(latency: LatencyTable | None, settings: PruneSettings, size: Geometry) -> None:
    if not isinstance(latency, LatencyTable | None):
        raise TypeError(f"latency: wanted a LatencyTable, got {type(latency).__name__}")
    if latency is None:
        raise ValueError("latency: wanted a table for a target in ms, such as LatencyTable.measure(model), got None")
    if columns := {"attn_in", "attn_out", "mlp_in", "mlp_out"} & set(settings.groups):
        raise ValueError(f"groups: a target in ms knows nothing of {', '.join(sorted(columns))}")
    latency.check(size)


def _plans(
    opened: OpenModel, scores: Scores, dense: Count, kind: str, latency: LatencyTable | None
) -> tuple[list[BlockPlan], float]:
    """Return the blocks as the budget sees them, and the cost of all that is outside them."""
    blocks = [(block, BlockBudget.whole(block.geometry)) for block in opened.blocks]
    pairs = list(zip(blocks, scores.steps, strict=True))
    if kind == "ms":
        assert latency is not None
        return [BlockPlan(full, steps, latency.block_cost) for (_, full), steps in pairs], latency.outside
    outside = getattr(dense, kind) - sum(getattr(block, kind) for block in dense.blocks)
    plans = [
        BlockPlan(full, steps, counted(block, sizes, kind))
        for ((block, full), steps), sizes in zip(pairs, dense.attended, strict=True)
    ]
    return plans, outside
