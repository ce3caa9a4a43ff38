# SPDX-License-Identifier: Apache-2.0
"""Importance of attention heads as the stationary distribution of a Markov chain over their similarities.

What the public record of GOHSP fixes (the abstract, the authors' patent application US20230073835A1, a review): the
nodes are attention heads, the edges are similarities between the heads' outputs on the same images, the graph is read
as a Markov chain, and the distribution that it converges to is the importance. The paper's own text was not at hand.
Ours are therefore: one graph a block, the similarity (linear CKA), no self-loops, no teleport, and that a high score
means important.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gohsp import vit
from gohsp.statistics import Moments, evaluating, inputs_of, read_images


class Similarity(Protocol):
    """Similarity of heads, gathered batch by batch."""

    def update(self, outputs: Tensor) -> None:
        """Add the outputs of all heads on some images, [B, N, H, d]."""

    def result(self) -> Tensor:
        """Return the similarities, float64 [H, H], non-negative."""


class LinearCKA:
    """Linear centred kernel alignment of heads, over all tokens of all images as samples.

    ``S[i, j] = ||C_ij||_F^2 / (||C_ii||_F ||C_jj||_F)`` with C_ij the cross-covariance of the outputs of heads i and j
    (Kornblith et al., 2019). It does not change when a head's channels are rotated or scaled, and heads have no channel
    basis in common. Streamed: the covariance of all heads side by side is enough, O((H d)^2) numbers.
    """

    def __init__(self, heads: int, width: int, device: torch.device | str = "cpu") -> None:
        self.heads = heads
        self.moments = Moments(heads * width, device=device)

    def update(self, outputs: Tensor) -> None:
        self.moments.update(outputs.flatten(2))

    def result(self) -> Tensor:
        return cka(self.moments.covariance(), self.heads)


class Cosine:
    """Mean over images of (1 + cos) / 2 between the outputs of two heads, each flattened to one vector an image."""

    def __init__(self, heads: int, width: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(heads, heads, dtype=torch.float64, device=device)
        self.images = 0

    def update(self, outputs: Tensor) -> None:
        vectors = nn.functional.normalize(outputs.double().transpose(1, 2).flatten(2), dim=-1)
        self.total += (vectors @ vectors.mT).sum(dim=0)
        self.images += len(outputs)

    def result(self) -> Tensor:
        return (1 + self.total / self.images).clamp(0, 2) / 2


SIMILARITIES: dict[str, Callable[..., Similarity]] = {"cka": LinearCKA, "cosine": Cosine}
READINGS = ("important", "redundant")


def rank_heads(
    model: nn.Module,
    batches: Iterable[Any],
    similarity: str = "cka",
    *,
    teleport: float = 0.0,
    high_is: str = "important",
    max_images: int | None = None,
) -> list[Tensor]:
    """Rank the attention heads of each block by the stationary distribution of the graph of their similarities.

    The output of a head is softmax(Q K^T) V before proj, on the given images. See the top of this module for what is
    GOHSP's and what is our choice.

    Args:
        model: Dense timm vision transformer. It runs in evaluation mode and is left as it was.
        batches: Batches of normalised images, [B, C, height, width] each or (images, ...); a DataLoader will do.
        similarity: "cka" or "cosine".
        teleport: Probability of jumping to a random head at each step, from 0 to 1 (PageRank's 1 - alpha).
        high_is: What a high stationary probability pi says about a head: "important" gives pi, "redundant" gives
            (1 - pi) / (H - 1), so that a high score always means keep. The record does not settle which is right.
        max_images: Use no more images than that.

    Returns:
        One float64 tensor [H] a block, on the CPU; each sums to 1. A head that is alone has the score 1.

    Raises:
        TypeError: The model or the batches are not of a kind that is known.
        ValueError: A parameter is out of its range, there are no images, or the model cannot be pruned.
    """
    blocks = vit.find_dense_blocks(model)
    check_reading(similarity, teleport, high_is)
    size, device = vit.geometry(model), next(model.parameters()).device
    graphs = [SIMILARITIES[similarity](size.num_heads, size.head_dim, device) for _ in blocks]
    projections = [block.attn.proj for block in blocks]
    with torch.no_grad(), evaluating(model), inputs_of(*projections) as caught:
        for images in read_images(batches, model, max_images):
            model(images)
            for graph, outputs in zip(graphs, caught, strict=True):
                graph.update(outputs.unflatten(-1, (size.num_heads, size.head_dim)))
            caught.clear()
    return [importance(graph.result(), teleport, high_is).cpu() for graph in graphs]


def check_reading(similarity: str, teleport: float, high_is: str) -> None:
    """Check the parameters of :func:`rank_heads`.

    Raises:
        ValueError: One of them is out of its range.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity: wanted one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    if not 0 <= teleport <= 1:
        raise ValueError(f"teleport: wanted a probability from 0 to 1, got {teleport!r}")
    if high_is not in READINGS:
        raise ValueError(f"high_is: wanted one of {', '.join(READINGS)}, got {high_is!r}")


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
    norms = energy.diagonal().sqrt()
    # What a constant output varies by is rounding; divided by itself it would look like perfect likeness.
    inverse = torch.where(norms > 1e-12 * norms.max(), 1 / norms, 0.0)
    return energy * torch.outer(inverse, inverse)


def importance(similarity: Tensor, teleport: float = 0.0, high_is: str = "important") -> Tensor:
    """Return the scores of heads, high = keep, [H] from their similarities [H, H]; see :func:`rank_heads`."""
    pi = stationary_distribution(similarity, teleport)
    if high_is == "redundant" and len(pi) > 1:
        return (1 - pi) / (len(pi) - 1)
    return pi


def stationary_distribution(similarity: Tensor, teleport: float = 0.0, tolerance: float = 1e-12) -> Tensor:
    """Return the distribution to which a random walk over the similarities converges, started anywhere alike.

    The walk steps from i to j != i with probability S[i, j] / sum_k S[i, k]; from a node that is like no other it jumps
    anywhere. A node's similarity to itself says nothing and is left out. For symmetric S whose graph is connected the
    result is the weighted degree sum_j S[i, j] / sum_ij S[i, j], since such a chain is reversible; where the graph
    falls into parts, each part keeps its share of the nodes.

    Args:
        similarity: [H, H], non-negative; need not be symmetric.
        teleport: Probability of jumping anywhere instead, from 0 to 1.
        tolerance: Stop when a step changes the distribution by less, in the sum of absolute values.

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
    uniform = torch.full_like(graph, 1 / count)
    steps = torch.where(rows > 0, graph / rows.clamp_min(torch.finfo(rows.dtype).tiny), uniform)
    steps = (1 - teleport) * steps + teleport * uniform
    # Half of the time the walk stays: same distribution, but a bipartite graph cannot make it swing for ever.
    steps = (steps + torch.eye(count, dtype=steps.dtype, device=steps.device)) / 2
    pi = uniform[0]
    for _ in range(1_000_000):
        following = pi @ steps
        change = (following - pi).abs().sum()
        pi = following / following.sum()
        if change < tolerance:
            return pi
    raise RuntimeError(f"no stationary distribution within {tolerance} after a million steps")
