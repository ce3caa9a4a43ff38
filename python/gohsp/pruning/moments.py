# SPDX-License-Identifier: Apache-2.0
"""Second moments of what a linear layer reads, and the linear algebra that is done with them.

They take bounded memory: a linear layer with m inputs needs O(m^2) numbers however many images there are. Rows are
summed up some hundred at a time, in the precision that they have, about their own mean, so that nothing cancels there;
these sums are added up, and put back about zero, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gohsp.pruning.share import Share

BLOCK = 256  # columns; of the symmetric product only blocks on and above the diagonal are computed


@dataclass(frozen=True)
class Sums:
    """Weighted sums over some rows x [rows, m] and y [rows, n], about the centres a [m] of x and b [n] of y.

    Attributes:
        rows: x as it came.
        weight: Sum of the weights w, float64.
        about_x, about_y: a and b, float64.
        x, y: Sums of w (x - a) and w (y - b), float64.
        xx: Blocks of rows of the sum of w (x - a) (x - a)^T, each from its diagonal on, in the precision of x.
        xy: Sum of w (x - a) (y - b)^T, likewise.
    """

    rows: Tensor
    weight: Tensor
    about_x: Tensor
    about_y: Tensor
    x: Tensor
    y: Tensor
    xx: list[Tensor]
    xy: Tensor


def sums_of(x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> Sums:
    """Sum rows up: x [..., m], y [..., n], one non-negative weight a row [...] (1 if None)."""
    x = x.detach().flatten(0, -2)
    y = x[:, :0] if y is None else y.detach().flatten(0, -2)
    w = x.new_ones(len(x)) if weight is None else weight.detach().flatten().to(x.dtype)
    total = w.double().sum()
    (about_x, centred), (about_y, gaps) = _centred(x, w, total), _centred(y, w, total)
    weighted = centred * w[:, None]
    return Sums(
        rows=x,
        weight=total,
        about_x=about_x.double(),
        about_y=about_y.double(),
        x=weighted.sum(dim=0, dtype=torch.float64),
        y=(gaps * w[:, None]).sum(dim=0, dtype=torch.float64),
        xx=[weighted[:, start : start + BLOCK].T @ centred[:, start:] for start in range(0, max(1, x.shape[1]), BLOCK)],
        xy=weighted.T @ gaps,
    )


def _centred(x: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of rows, rounded, and the rows less just that."""
    about = (weight @ x / total.clamp_min(1e-30).to(x.dtype)).nan_to_num()
    return about, x - about


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
        self._upper, self._xy = zeros(inputs, inputs), zeros(inputs, outputs)
        self._centres: list[tuple[Tensor, ...]] = []  # what is still to be put back about zero
        self._xx: Tensor | None = None  # both halves, once asked for
        self.sample: Tensor | None = None  # the rows of the first update, for what second moments cannot tell

    def update(self, x: Tensor, y: Tensor | None = None, weight: Tensor | None = None) -> None:
        """Add rows; see :func:`sums_of`."""
        self.add(sums_of(x, y, weight))

    def add(self, sums: Sums) -> None:
        """Add rows that have been summed up."""
        if self.sample is None:
            self.sample = sums.rows.clone()
        self._xx, weight, a, b = None, sums.weight, sums.about_x, sums.about_y
        self.weight += weight
        self.x += sums.x + weight * a
        self.y += sums.y + weight * b
        start = 0
        for block in sums.xx:
            self._upper[start : start + len(block), start:] += block
            start += len(block)
        self._xy += sums.xy
        # x x^T = z z^T + z a^T + a z^T + a a^T for z = x - a, and the like with y
        self._centres.append((sums.x + weight / 2 * a, a, sums.x, b, sums.y + weight * b))

    def add_up_(self, share: Share) -> None:
        """Add what other processes have seen."""
        self._settle()
        self._xx = None
        share.add_up_(self.weight, self.x, self.y, self._upper, self._xy)
        if self.sample is not None:
            self.sample = share.of_first(self.sample)

    @property
    def xx(self) -> Tensor:
        """Sum of w x x^T, [m, m]."""
        self._settle()
        if self._xx is None:
            self._xx = self._upper.triu() + self._upper.triu(1).T
        return self._xx

    @property
    def xy(self) -> Tensor:
        """Sum of w x y^T, [m, n]."""
        self._settle()
        return self._xy

    def _settle(self) -> None:
        if self._centres:
            half, a, z, b, y = (torch.stack(each) for each in zip(*self._centres, strict=True))
            back = half.T @ a
            self._upper += back + back.T
            self._xy += z.T @ b + a.T @ y
            self._centres.clear()

    def mean(self) -> Tensor:
        """Return the mean of x, [m]."""
        return self.x / self.weight

    def covariance(self) -> Tensor:
        """Return the covariance of x, [m, m]."""
        mean = self.mean()
        return (self.xx / self.weight).addr_(mean, mean, alpha=-1)

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
        xx = self.xx[kept[:, None], kept]
        square = (xx / self.weight).addr_(mean_x, mean_x, alpha=-1)
        cross = self.xy[kept] / self.weight - torch.outer(mean_x, mean_y)
        start = weight[:, kept]
        square = _regular(square, xx.diagonal() / self.weight)
        root = torch.linalg.cholesky(damped(square, ridge))
        change = torch.cholesky_solve(cross - square @ start.T, root)
        fitted = start + change.T
        return fitted, mean_y - fitted @ mean_x


def _regular(covariance: Tensor, mean_squares: Tensor) -> Tensor:
    """Raise variances below a trillionth of the mean square to that.

    A covariance is the difference of large numbers. That of a constant is their rounding, of either sign.
    """
    regular = covariance.clone()
    regular.diagonal().add_((1e-12 * mean_squares - covariance.diagonal()).clamp_min(0))
    return regular


def damped(square: Tensor, ridge: float) -> Tensor:
    """Return a positive semidefinite matrix plus ``ridge`` times its mean diagonal, safely invertible."""
    # The floor keeps the Cholesky factorisation alive for duplicate or constant columns; it is far below any signal.
    level = max(ridge, 1e-9) * square.diagonal().mean() if len(square) else square.new_zeros(())
    result = square.clone()
    result.diagonal().add_(level + 1e-30)
    return result


def correlation(covariance: Tensor) -> Tensor:
    """Return the correlations that belong to a covariance [m, m]; those of a constant are 0, its own is 1."""
    inverse = covariance.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(inverse > 0, 1 / inverse, 0.0)
    return (covariance * torch.outer(inverse, inverse)).fill_diagonal_(1)
