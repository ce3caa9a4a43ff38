# SPDX-License-Identifier: Apache-2.0
"""Second moments of what a linear layer reads, and the linear algebra that is done with them.

Everything is accumulated in float64 and in bounded memory: a linear layer with m inputs needs O(m^2) numbers however
many images there are.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Weighted second moments of rows x [rows, m] and, beside them, of y [rows, n]: what a linear regression needs.

    Args:
        inputs: m.
        outputs: n.
        device: Where to accumulate.
    """

    def __init__(self, inputs: int, outputs: int = 0, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.weight = zeros()
        self.x, self.y = zeros(inputs), zeros(outputs)
        self.xx, self.xy = zeros(inputs, inputs), zeros(inputs, outputs)
        self.sample: Tensor | None = None  # the rows of the first update, for what second moments cannot tell

    def update(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add rows: x [..., m], y [..., n], one non-negative weight a row [...] (1 if None)."""
        if self.sample is None:
            self.sample = x.detach().flatten(0, -2).clone()
        x = x.detach().double().flatten(0, -2)
        rows = x.new_ones(len(x)) if weight is None else weight.detach().double().flatten()
        weighted = x * rows[:, None]
        self.weight += rows.sum()
        self.x += weighted.sum(dim=0)
        self.xx.addmm_(weighted.T, x)
        if y is not None:
            y = y.detach().double().flatten(0, -2)
            self.y += rows @ y
            self.xy.addmm_(weighted.T, y)

    def mean(self) -> Tensor:
        """Return the mean of x, [m]."""
        return self.x / self.weight

    def covariance(self) -> Tensor:
        """Return the covariance of x, [m, m]."""
        return self.xx / self.weight - torch.outer(self.mean(), self.mean())

    def regular_covariance(self) -> Tensor:
        """Return the covariance with variances that are more than rounding, so that :func:`damped` can invert it."""
        return _regular(self.covariance(), self.xx.diagonal() / self.weight)

    def fit(self, weight: Tensor, kept: Tensor, ridge: float, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """Fit y = W x[kept] + b by least squares, pulled towards given weights.

        The minimum of E||y - W x[kept] - b||^2 + ridge * mean(diag C) * ||W - weight[:, kept]||^2, with C the
        covariance of the kept x, in closed form. The pull goes to the given weights and not to zero: where the
        calibration images say little, these are the better guess.

        Args:
            weight: [n, m], float64.
            kept: Indices of the columns to use, int64 [k].
            ridge: Strength of the pull, relative to the mean variance.
            intercept: Whether there is a b. Without one it is zero, and C is the second moment about zero.

        Returns:
            W [n, k] and b [n], float64.
        """
        mean_x, mean_y = self.x[kept] / self.weight, self.y / self.weight
        if not intercept:
            mean_x, mean_y = torch.zeros_like(mean_x), torch.zeros_like(mean_y)
        square = self.xx[kept][:, kept] / self.weight - torch.outer(mean_x, mean_x)
        cross = self.xy[kept] / self.weight - torch.outer(mean_x, mean_y)
        start = weight[:, kept]
        square = _regular(square, self.xx.diagonal()[kept] / self.weight)
        root = torch.linalg.cholesky(damped(square, ridge))
        change = torch.cholesky_solve(cross - square @ start.T, root)
        fitted = start + change.T
        return fitted, mean_y - fitted @ mean_x


def _regular(covariance: Tensor, mean_squares: Tensor) -> Tensor:
    """Raise variances below a trillionth of the mean square to that.

    A covariance is the difference of large numbers. That of a constant is their rounding, of either sign.
    """
    return covariance + torch.diag((1e-12 * mean_squares - covariance.diagonal()).clamp_min(0))


def damped(square: Tensor, ridge: float) -> Tensor:
    """Return a positive semidefinite matrix plus ``ridge`` times its mean diagonal, safely invertible."""
    # The floor keeps the Cholesky factorisation alive for duplicate or constant columns; it is far below any signal.
    level = max(ridge, 1e-9) * square.diagonal().mean() if len(square) else square.new_zeros(())
    return square + (level + 1e-30) * torch.eye(len(square), dtype=square.dtype, device=square.device)


def correlation(covariance: Tensor) -> Tensor:
    """Return the correlations that belong to a covariance [m, m]; those of a constant are 0, its own is 1."""
    inverse = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(inverse > 0, 1 / inverse, 0.0)
    return (covariance * torch.outer(inverse, inverse)).fill_diagonal_(1)
