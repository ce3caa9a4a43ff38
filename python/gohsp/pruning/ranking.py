# SPDX-License-Identifier: Apache-2.0
"""Importance of attention heads as the stationary distribution of a Markov chain over their similarities.

What the public record of GOHSP fixes (the abstract, the authors' patent application US20230073835A1, a review): the
nodes are attention heads, the edges are similarities between the heads' outputs on the same images, the graph is read
as a Markov chain, and the distribution that it converges to is the importance. The paper's own text was not at hand.
Ours are therefore: one graph a block, the similarity (linear CKA), no self-loops, no teleport, and that a high score
means important. All of them are parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from operator import length_hint
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gohsp.arguments import check_kind, check_name, check_number, check_sequence
from gohsp.models.base import Attention, Trace
from gohsp.models.hooks import evaluating
from gohsp.models.registry import open_model
from gohsp.progress import each, watching
from gohsp.pruning.calibration import read_images
from gohsp.pruning.moments import Moments, damped
from gohsp.pruning.share import Share


class Similarity(Protocol):
    """Similarity of heads, gathered batch by batch in memory that does not grow.

    ``needs_attention`` tells whether the attention probabilities have to be computed for it.
    """

    needs_attention: bool

    def update(self, outputs: Tensor, attention: Tensor | None = None) -> None:
        """Add what all heads do on some images: outputs [B, N, H, d], attention probabilities [B, H, N, N]."""

    def add_up_(self, share: Share) -> None:
        """Add what other processes have seen."""

    def result(self) -> Tensor:
        """Return the similarities, float64 [H, H], non-negative."""


class LinearCKA:
    """Linear centred kernel alignment of heads, over all tokens of all images as samples.

    ``S[i, j] = ||C_ij||_F^2 / (||C_ii||_F ||C_jj||_F)`` with C_ij the cross-covariance of the outputs of heads i and j
    (Kornblith et al., 2019). It does not change when a head's channels are rotated or scaled, and heads have no channel
    basis in common. Streamed: the covariance of all heads side by side is enough, O((H d)^2) numbers.
    """

    needs_attention = False

    def __init__(self, heads: int, width: int, device: torch.device | str = "cpu") -> None:
        self.heads = heads
        self.moments = Moments(heads * width, device=device)

    def update(self, outputs: Tensor, attention: Tensor | None = None) -> None:
        self.moments.update(outputs.flatten(2))

    def add_up_(self, share: Share) -> None:
        self.moments.add_up_(share)

    def result(self) -> Tensor:
        return cka(self.moments.covariance(), self.heads)


class Cosine:
    """Mean over images of (1 + cos) / 2 between the outputs of two heads, each flattened to one vector an image."""

    needs_attention = False

    def __init__(self, heads: int, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(heads, heads, dtype=torch.float64, device=device)
        self.images = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, outputs: Tensor, attention: Tensor | None = None) -> None:
        vectors = nn.functional.normalize(outputs.double().transpose(1, 2).flatten(2), dim=-1)
        self.total += (vectors @ vectors.mT).sum(dim=0)
        self.images += len(outputs)

    def add_up_(self, share: Share) -> None:
        share.add_up_(self.total, self.images)

    def result(self) -> Tensor:
        return (1 + self.total / self.images).clamp(0, 2) / 2


class ExplainedVariance(LinearCKA):
    """Directed: S[i, j] is the share R^2 of head i's variance that a linear regression on head j explains.

    The walk steps from a head to those that could stand in for it, so a high score belongs to a head that speaks for
    many. The regression is damped by a thousandth of the mean variance. A head that never changes is explained by none.
    """

    def result(self) -> Tensor:
        covariance = self.moments.covariance()
        blocks = (
            covariance.unflatten(0, (self.heads, -1)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        )  # [H, H, d, d]
        variance = torch.stack([blocks[head, head].trace() for head in range(self.heads)])
        explained = torch.zeros(self.heads, self.heads, dtype=torch.float64, device=covariance.device)
        for j in range(self.heads):
            root = torch.linalg.cholesky(damped(blocks[j, j], 1e-3))
            explained[:, j] = torch.linalg.solve_triangular(root, blocks[j], upper=False).square().sum(dim=(1, 2))
        spread = torch.where(variance > 1e-12 * variance.max(), 1 / variance, 0.0)
        return (explained * spread[:, None]).clamp(0, 1)


class AttentionJensenShannon:
    """1 - JS(p_i, p_j) / ln 2 of the attention probabilities of two heads, mean over all queries of all images."""

    needs_attention = True

    def __init__(self, heads: int, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(heads, heads, dtype=torch.float64, device=device)
        self.queries = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, outputs: Tensor, attention: Tensor | None = None) -> None:
        assert attention is not None
        probabilities = attention.double().transpose(0, 1).flatten(1, 2)  # [H, B N, N]
        own = _entropy(probabilities)
        for head, rows in enumerate(probabilities):
            divergence = _entropy((probabilities + rows) / 2) - (own + own[head]) / 2
            self.total[head] -= divergence / math.log(2)
        self.queries += probabilities.shape[1]

    def add_up_(self, share: Share) -> None:
        share.add_up_(self.total, self.queries)

    def result(self) -> Tensor:
        return (1 + self.total / self.queries).clamp(0, 1)


def _entropy(probabilities: Tensor) -> Tensor:
    """Return the entropy in nats, summed over all but the first dimension."""
    return torch.special.entr(probabilities).flatten(1).sum(dim=1)


SIMILARITIES: dict[str, Callable[..., Similarity]] = {
    "cka": LinearCKA,
    "cosine": Cosine,
    "attention": AttentionJensenShannon,
    "explained": ExplainedVariance,
}
READINGS = ("important", "redundant")


class HeadScores(list[Tensor]):
    """One float64 tensor [H] a block, on the CPU, each with the sum 1: high means keep.

    Attributes:
        high_is: How a high stationary probability was read.
        losses: For ``high_is="auto"`` the loss of the cut that each reading leads to, see :func:`cut_loss`; else empty.
    """

    def __init__(self, chains: Iterable[Tensor], high_is: str, losses: dict[str, float] | None = None) -> None:
        super().__init__(read(pi, high_is).cpu() for pi in chains)
        self.high_is, self.losses = high_is, losses or {}


def rank_heads(
    model: nn.Module,
    batches: Iterable[Any],
    similarity: str = "cka",
    *,
    teleport: float = 0.0,
    high_is: str = "important",
    max_images: int | None = None,
) -> HeadScores:
    """Rank the attention heads of each block by the stationary distribution of the graph of their similarities.

    The output of a head is softmax(Q K^T) V before proj, on the given images. Memory does not grow with the images. See
    the top of this module for what is GOHSP's and what is our choice.

    Args:
        model: Dense vision transformer that gohsp knows. It runs in evaluation mode and is left as it was.
        batches: Batches of normalised images, [B, C, height, width] each or (images, ...); a DataLoader will do.
        similarity: "cka", "cosine", "attention" (Jensen-Shannon) or "explained" (directed); see :data:`SIMILARITIES`.
        teleport: Probability of jumping to a random head at each step, from 0 to 1 (PageRank's 1 - alpha).
        high_is: What a high stationary probability pi says about a head: "important" gives pi, "redundant" gives
            (1 - pi) / (H - 1), so that a high score always means keep. The record does not settle which is right;
            "auto" takes the one whose cut loses less on these images.
        max_images: Use no more images than that.

    Returns:
        The scores of each block; a head that is alone has the score 1.

    Raises:
        TypeError: The model or the batches are not of a kind that is known.
        ValueError: A parameter is out of its range, there are no images, or the model cannot be pruned.
    """
    opened = open_model(model)
    attentions = [block.attention for block in opened.blocks]
    check_reading(similarity, teleport, high_is)
    sizes, device = [layer.geometry for layer in attentions], next(model.parameters()).device
    graphs = [SIMILARITIES[similarity](size.num_heads, size.head_dim, device) for size in sizes]
    moments = [Moments(size.span, device=device) for size in sizes] if high_is == "auto" else []
    number = length_hint(batches) or None
    with watching("rank the heads", None, number) as advance, torch.no_grad(), evaluating(model):
        for images in each(read_images(batches, model, max_images), advance):
            x = opened.embed(images)
            for index, layer in enumerate(opened.sublayers):
                trace = layer.trace(layer.enter(x))
                x = trace.after
                if isinstance(layer, Attention):
                    show_heads(graphs[index // 2], layer, trace)
                    if moments:
                        moments[index // 2].update(trace.hidden)
    chains = [stationary_distribution(graph.result(), teleport) for graph in graphs]
    if high_is != "auto":
        return HeadScores(chains, high_is)
    weights = [layer.written() for layer in attentions]
    return read_by_loss(chains, weights, [moment.covariance() for moment in moments])


def show_heads(graph: Similarity, layer: Attention, trace: Trace) -> None:
    """Add to a graph what the heads of an attention half did."""
    size = layer.geometry
    attention = layer.probabilities(trace.read) if graph.needs_attention else None
    graph.update(trace.hidden.unflatten(-1, (size.num_heads, size.head_dim)), attention)


def read_by_loss(chains: list[Tensor], weights: list[Tensor], covariances: list[Tensor]) -> HeadScores:
    """Read the chains of all blocks in the way whose cuts lose less.

    Args:
        chains: The stationary distribution of each block, [H].
        weights, covariances: Of each block, see :func:`cut_loss`.
    """
    losses = {
        reading: sum(
            cut_loss(weight, covariance, read(pi, reading))
            for pi, weight, covariance in zip(chains, weights, covariances, strict=True)
        )
        / len(chains)
        for reading in READINGS
    }
    return HeadScores(chains, min(losses, key=losses.__getitem__), losses)


def cut_loss(weight: Tensor, covariance: Tensor, scores: Tensor) -> float:
    """Return what cutting the lower half of a block's heads loses, once the others have taken over what they can.

    Args:
        weight: proj with layer scale multiplied in, float64 [D, H d].
        covariance: Of the head outputs, [H d, H d].
        scores: [H], high = keep.

    Returns:
        The error, as a share of the variance of the block's attention output, from 0 to 1.
    """
    heads = len(scores)
    gone = scores.argsort(stable=True)[: heads // 2]
    columns = torch.arange(len(covariance), device="cpu").view(heads, -1)[gone.cpu()].flatten().to(weight.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(covariance, 1e-3)))
    left = torch.linalg.inv(inverse[columns][:, columns]) if len(columns) else inverse[columns][:, columns]
    error = (weight[:, columns] @ left * weight[:, columns]).sum()
    return float(error / (weight @ covariance * weight).sum().clamp_min(1e-30))


def check_reading(similarity: str, teleport: float, high_is: str) -> None:
    """Check the parameters of :func:`rank_heads`.

    Raises:
        ValueError: One of them is out of its range.
    """
    check_name("similarity", similarity, SIMILARITIES)
    check_number("teleport", teleport, 0, 1)
    check_name("high_is", high_is, (*READINGS, "auto"))


def check_scores(importance: Sequence[Tensor], heads: Sequence[int]) -> Sequence[Tensor]:
    """Return scores of heads that a user gave, float64 [H] a block with the sum 1; those of a ranking as they are.

    Args:
        importance: Scores, [H] a block.
        heads: H of each block.

    Raises:
        ValueError: They do not fit a model of so many blocks and heads, or are no scores.
    """
    check_sequence("importance", importance, "scores of the heads, a tensor a block")
    for block in importance:
        check_kind("importance", block, Tensor, "a tensor a block")
    if len(importance) != len(heads):
        raise ValueError(f"importance: wanted scores for each of {len(heads)} blocks, got {len(importance)}")
    for index, (scores, number) in enumerate(zip(importance, heads, strict=True)):
        if tuple(scores.shape) != (number,):
            raise ValueError(f"importance: wanted {number} scores for block {index}, got shape {tuple(scores.shape)}")
        if not bool(torch.isfinite(scores).all()) or bool((scores < 0).any()) or not bool((scores > 0).any()):
            raise ValueError(f"importance: wanted finite scores from 0 up, not all 0, for block {index}")
    if isinstance(importance, HeadScores):
        return importance
    return [(scores.double() / scores.double().sum()).cpu() for scores in importance]


def cka(covariance: Tensor, heads: int) -> Tensor:
    """Return the linear CKA of heads from the covariance of their outputs side by side.

    Args:
        covariance: [H d, H d], float64.
        heads: H.

    Returns:
        [H, H], from 0 to 1. A head whose output never changes is like no other: 0.
    """
    blocks = covariance.unflatten(0, (heads, -1)).unflatten(-1, (heads, -1))
    energy = blocks.square().sum(dim=(1, 3))
    return aligned(energy)


def aligned(energy: Tensor) -> Tensor:
    """Return the linear CKA of nodes from the squared norms of their cross-covariances, both [H, H]."""
    norms = energy.diagonal().sqrt()
    # What a constant output varies by is rounding; divided by itself it would look like perfect likeness.
    inverse = torch.where(norms > 1e-12 * norms.max(), 1 / norms, 0.0)
    return energy * torch.outer(inverse, inverse)


def read(pi: Tensor, high_is: str) -> Tensor:
    """Return the scores of heads, high = keep, [H] from a stationary distribution; see :func:`rank_heads`."""
    if high_is == "redundant" and len(pi) > 1:
        return (1 - pi) / (len(pi) - 1)
    return pi


def stationary_distribution(
    similarity: Tensor, teleport: float = 0.0, tolerance: float = 1e-12, restart: Tensor | None = None
) -> Tensor:
    """Return the distribution to which a random walk over the similarities converges, started where it restarts.

    The walk steps from i to j != i with probability S[i, j] / sum_k S[i, k]; from a node that is like no other it jumps
    anywhere. A node's similarity to itself says nothing and is left out. For symmetric S whose graph is connected the
    result is the weighted degree sum_j S[i, j] / sum_ij S[i, j], since such a chain is reversible; where the graph
    falls into parts, each part keeps its share of the nodes.

    Args:
        similarity: [H, H], non-negative; need not be symmetric.
        teleport: Probability of jumping anywhere instead, from 0 to 1.
        tolerance: Stop when a step changes the distribution by less, in the sum of absolute values.
        restart: How likely each node is where the walk begins or jumps, non-negative [H], as in personalised PageRank
            (Haveliwala, 2002); all alike by default.

    Returns:
        [H], float64, sums to 1.

    Raises:
        ValueError: The matrix is not square, not finite or has negative entries.
        RuntimeError: There is no convergence in a million steps.
    """
    graph = similarity.detach().double().clone()
    if graph.dim() != 2 or graph.shape[0] != graph.shape[1] or not len(graph):
        raise ValueError(f"similarity: wanted a square matrix, got shape {tuple(graph.shape)}")
    if not bool(torch.isfinite(graph).all()) or bool((graph < 0).any()):
        raise ValueError("similarity: wanted finite, non-negative entries")
    count = len(graph)
    graph.fill_diagonal_(0)
    rows = graph.sum(dim=1, keepdim=True)
    likely = torch.ones_like(graph[0]) if restart is None else restart.detach().to(graph)
    jump = (likely / likely.sum()).expand(count, count)
    steps = torch.where(rows > 0, graph / rows.clamp_min(torch.finfo(rows.dtype).tiny), jump)
    steps = (1 - teleport) * steps + teleport * jump
    # Half of the time the walk stays: same distribution, but a bipartite graph cannot make it swing for ever.
    steps = (steps + torch.eye(count, dtype=steps.dtype, device=steps.device)) / 2
    pi = jump[0]
    for _ in range(1_000_000):
        following = pi @ steps
        change = (following - pi).abs().sum()
        pi = following / following.sum()
        if change < tolerance:
            return pi
    raise RuntimeError(f"no stationary distribution within {tolerance} after a million steps")
