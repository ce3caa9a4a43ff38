# SPDX-License-Identifier: Apache-2.0
"""Layer-wise ADMM: which columns of a linear layer stay, found together with the weights that make up for the others.

GOHSP imposes head and column sparsity by an optimisation. Here it runs without gradients, one layer at a time, on the
second moments of what the layer reads. With W0 the weights that fit all columns, C the covariance of the inputs and S
the set of weights with few enough heads or columns,

    minimise  1/2 tr((W - W0) C (W - W0)^T)  over W in S

is split into W with the loss and Z in S, tied by the dual U:

    W <- (W0 C + rho (Z - U)) (C + rho I)^-1      one eigendecomposition of C serves every rho
    Z <- projection of W + U onto S               exact: the groups of largest norm stay, the others become zero
    U <- U + W - Z,   rho <- growth * rho         until Z stays what it is

What the paper does inside a training run is closed form here. The units are ours: errors are measured in a metric, and
columns are scaled to inputs of variance 1, since the projection compares norms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gohsp.pruning.criteria import RIDGE, LayerStatistics, PruningGroups, by_score
from gohsp.pruning.moments import damped

START = 0.05  # rho at the first step, relative to the mean variance
GROWTH = 1.1
STEPS = 60
PATIENCE = 12  # steps without a change of the kept columns after which they are final


def choose(statistics: LayerStatistics, groups: PruningGroups, keep: int, favour: Tensor | None = None) -> Tensor:
    """Return the columns that stay, int64 sorted.

    Args:
        statistics: The layer. A guide multiplies the squared norms of its pools in the projection.
        groups: Which columns may leave together.
        keep: How many stay.
        favour: Factors [m] by which a criterion multiplies the squared norms, or None for none.
    """
    covariance = damped(statistics.covariance, RIDGE)
    deviations = covariance.diagonal().sqrt()
    root = torch.linalg.cholesky(damped(statistics.metric, 1e-6))
    weight = root.T @ statistics.weight * deviations  # in these coordinates the metric is the identity
    square = covariance / torch.outer(deviations, deviations)
    factors = _factors(groups, deviations, statistics.guide, favour)
    values, vectors = torch.linalg.eigh(square)
    target = weight @ vectors * values
    z, dual, rho = weight, torch.zeros_like(weight), START
    kept, unchanged = torch.empty(0, dtype=torch.int64, device="cpu"), 0
    for _ in range(STEPS):
        w = (target + rho * ((z - dual) @ vectors)) / (values + rho) @ vectors.T
        free = w + dual
        left = by_score(free.square().sum(dim=0) * factors, groups, keep).left
        z = torch.zeros_like(free).index_copy_(1, left.to(free.device), free[:, left])
        dual = free - z
        unchanged = unchanged + 1 if torch.equal(left, kept) else 0
        kept = left
        if unchanged == PATIENCE:
            break
        dual /= GROWTH  # U is scaled by 1 / rho
        rho *= GROWTH
    return kept


def _factors(groups: PruningGroups, like: Tensor, guide: Tensor | None, favour: Tensor | None) -> Tensor:
    """Return what multiplies the squared norm of each column in the projection, [m]."""
    factors = torch.ones_like(like) if favour is None else favour.to(like) / favour.mean()
    if guide is not None:
        for pool, factor in zip(groups.pools, guide, strict=True):
            factors[pool.to(factors.device)] *= float(factor)
    return factors
