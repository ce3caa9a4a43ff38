# SPDX-License-Identifier: Apache-2.0
"""Heads in their principal axes: the same function, with channels that are uncorrelated and sorted by what they cost.

A head's scores depend on q^T k alone and its output on Wp v alone, so a head may be given any basis. For invertible T,

    q' = T q,  k' = T^-T k       are the same scores,
    v' = T v,  Wp' = Wp T^-1     are the same output.

Training leaves some basis. For pruning there is a best one. With C the second moments of what the channels hold, and
G what errors in them cost (one of second moments E costs tr(G E)), let V be the eigenvectors of G^1/2 C G^1/2, and
T = V^T G^1/2. Then C' is diagonal, with the eigenvalues on it, and G' = 1: channels that are dropped cost the sum of
their eigenvalues, and no subspace of as many costs less (Eckart and Young). C may be singular, for it is not inverted.
G is damped; T^-1 is the inverse of that same T, so that the function stays what it is whatever the damping.

- v: C is the covariance of what the head gives, and G = Wp^T M Wp with M the metric of the sensitivities.
- q: C are its second moments, and G those of the gradient of the features by q. With s the scores, that gradient is
  sum_m df/ds_m k_m with sum_m df/ds_m = 0: the mean of an image's keys cancels in it as it does in the softmax. So the
  channels of the scores are weighed by what they do to the features, as those of v are.

All of this is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gohsp.arguments import check_seed, check_sequence
from gohsp.models.base import Attention, BlockGeometry, OpenModel, Trace
from gohsp.models.hooks import evaluating
from gohsp.models.registry import open_model
from gohsp.progress import ticking
from gohsp.pruning.calibration import each_chunk, embed, entered, through_
from gohsp.pruning.moments import Moments, Sums, sums_of
from gohsp.pruning.ranking import Similarity, show_heads
from gohsp.pruning.sensitivity import Sensitivity, measure_sensitivities
from gohsp.pruning.share import Share

DAMPING = 1e-4  # of G, relative to its mean; it bounds by how much rounding of the new weights is magnified
IMAGES = 64  # from which sensitivities for the axes are measured, or up to twice as many


def principal_axes(
    model: nn.Module, batches: Iterable[Any], *, groups: Sequence[str] = ("qk", "v"), seed: int = 0
) -> nn.Module:
    """Return a copy of a model that computes the same, with its heads in their principal axes.

    :func:`gohsp.prune` does this by itself where QK or V channels may go. A mask that it found means the turned model.
    With the same images, groups and seed this function gives that one, neither masked nor re-fitted.

    Args:
        model: Dense vision transformer that gohsp knows. It is not changed.
        batches: As for :func:`gohsp.prune`; the axes are those of these images.
        groups: "qk", "v" or both: which channels are turned. Those of q and k stay as they are where there is qk-norm.
        seed: Of the random projections of the features.

    Raises:
        TypeError: The model or the batches are not of a kind that is known.
        ValueError: The groups are others, there are no images, or the model cannot be pruned.
    """
    check_sequence("groups", groups, "a list of names")
    if not groups or not all(group in ("qk", "v") for group in groups):
        raise ValueError(f"groups: wanted qk, v or both, got {groups!r}")
    check_seed(seed)
    turned = turned_copy(model)
    opened = open_model(turned)
    steps = 1 + len(opened.blocks)
    with ticking("turn the heads", None, steps) as tick, torch.no_grad(), evaluating(turned):
        stream, _ = embed(opened, batches)
        turn_heads_(opened, stream, groups, Share.of(len(stream), shared=False), seed, tick=tick)
    return turned


def turned_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters can be asked for gradients, in inference mode too."""
    with torch.inference_mode(False):
        return copy.deepcopy(model)


def turn_heads_(
    opened: OpenModel,
    stream: Tensor,
    groups: Collection[str],
    share: Share,
    seed: int = 0,
    graphs: Sequence[Similarity] = (),
    tick: Callable[[], object] = lambda: None,
) -> None:
    """Turn the heads of a dense model into their principal axes, in place.

    Args:
        opened: Dense model in evaluation mode.
        stream: Tokens before its first block, [images, N, D].
        groups: See :func:`principal_axes`.
        share: Which of the images these are.
        seed: See :func:`principal_axes`.
        graphs: Of each block, or none. They are shown the heads before these are turned: most similarities depend on
            the axes, and the ranking is that of the model that was given.
        tick: Called after each block, and once before the first.
    """
    some = stream[share.every(max(1, share.total // IMAGES))]
    sensitivities = measure_sensitivities(opened, some, seed, Share.of(len(some), share.shared))
    tick()
    x = stream.clone()
    for index, block in enumerate(opened.blocks):
        layer, sensitivity = block.attention, sensitivities[2 * index]
        x = entered(layer, x)
        queries, outputs = _pass(layer, x, sensitivity, share, graphs[index] if graphs else None)
        if "qk" in groups and not layer.geometry.qk_whole:
            _turn_scores_(layer, queries, sensitivity)
        if "v" in groups and isinstance(layer.inner_norm, nn.Identity):
            _turn_values_(layer, outputs, sensitivity)
        through_(block.mlp, x)
        tick()


def axes_of(moments: Tensor, cost: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return T [..., d, d], its inverse, and what each of the new channels costs [..., d], the dearest first.

    Args:
        moments: C, float64 [..., d, d].
        cost: G, float64 [..., d, d]. T is scaled as if its mean diagonal were 1.
    """
    level = cost.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    unit = torch.eye(cost.shape[-1], dtype=cost.dtype, device=cost.device)
    # What costs nothing at all has no axes of its own: those of its moments will do.
    relative = torch.where(level > 0, cost / level, unit)
    values, vectors = torch.linalg.eigh(relative + DAMPING * unit)
    values = values.clamp_min(DAMPING / 2)[..., None, :].sqrt()
    root, inverse = vectors * values @ vectors.mT, vectors / values @ vectors.mT
    energies, axes = torch.linalg.eigh(root @ moments @ root)
    axes = axes.flip(-1)
    return axes.mT @ root, inverse @ axes, energies.flip(-1).clamp_min(0) * level[..., 0]


def _pass(
    layer: Attention, x: Tensor, sensitivity: Sensitivity, share: Share, graph: Similarity | None
) -> tuple[Tensor, Tensor]:
    """Run an attention half on the stream, in place.

    Returns:
        Of each head the second moments of q and the covariance of what it gives, float64 [H, d, d] each.
    """
    size, weights = layer.geometry, sensitivity.weights()

    def look(part: Tensor) -> tuple[Trace, Sums, Sums]:
        trace = layer.trace(part)
        part.copy_(trace.after)
        rows = weights.expand(part.shape[:2])
        written = layer.weigh(trace, weights)
        return trace, sums_of(trace.read[..., : size.span], weight=rows), sums_of(trace.hidden, weight=written)

    queries, outputs = Moments(size.span, device=x.device), Moments(size.span, device=x.device)

    def take(found: tuple[Trace, Sums, Sums]) -> None:
        trace, read, written = found
        queries.add(read)
        outputs.add(written)
        if graph is not None:
            show_heads(graph, layer, trace)

    each_chunk(look, take, x)
    queries.add_up_(share)
    outputs.add_up_(share)
    if graph is not None:
        graph.add_up_(share)
    return _by_head(queries.xx / queries.weight, size), _by_head(outputs.covariance(), size)


def _by_head(moments: Tensor, size: BlockGeometry) -> Tensor:
    """Return the blocks [H, d, d] on the diagonal of [H d, H d]."""
    blocks = moments.unflatten(0, (size.num_heads, -1)).unflatten(-1, (size.num_heads, -1))
    return torch.stack([blocks[head, :, head] for head in range(size.num_heads)])


def _turn_scores_(layer: Attention, queries: Tensor, sensitivity: Sensitivity) -> None:
    """Turn q by T and k by T^-T, each channel scaled so that its row of q is as long as its row of k."""
    turn, back, _ = axes_of(queries, sensitivity.queries)
    q, k, v = _rows(layer)
    q, k = turn @ q, back.mT @ k
    lengths = q[..., :-1].norm(dim=-1, keepdim=True), k[..., :-1].norm(dim=-1, keepdim=True)
    scale = (lengths[1] / lengths[0]).sqrt()
    scale = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0)
    _write_rows_(layer, q * scale, k / scale, v)


def _turn_values_(layer: Attention, outputs: Tensor, sensitivity: Sensitivity) -> None:
    """Turn v by T and the columns of write by its inverse."""
    size = layer.geometry
    written = layer.written().unflatten(1, (size.num_heads, size.head_dim)).transpose(0, 1)
    turn, back, _ = axes_of(outputs, written.mT @ sensitivity.metric @ written)
    q, k, v = _rows(layer)
    _write_rows_(layer, q, k, turn @ v)
    columns = layer.write.weight.detach().double().unflatten(1, (size.num_heads, size.head_dim)).transpose(0, 1)
    layer.write.write_((columns @ back).transpose(0, 1).flatten(1))


def _rows(layer: Attention) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows of q, k and v of each head with their biases as a last column, float64 [H, d, D + 1] each."""
    size, read = layer.geometry, layer.read
    weight = read.weight.detach().double()
    bias = weight.new_zeros(len(weight)) if read.bias is None else read.bias.detach().double()
    q, k, v = torch.cat((weight, bias[:, None]), dim=1).unflatten(0, (3, size.num_heads, size.head_dim))
    return q, k, v


def _write_rows_(layer: Attention, *parts: Tensor) -> None:
    rows = torch.cat([part.flatten(0, 1) for part in parts])
    layer.read.write_(rows[:, :-1], rows[:, -1])
