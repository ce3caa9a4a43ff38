# SPDX-License-Identifier: Apache-2.0
"""Second moments, and the regressions that are done with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gohsp.pruning.moments import BLOCK, Moments, damped

ROWS, INPUTS, OUTPUTS = 200, 8, 3


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathered(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Moments:
    moments = Moments(x.shape[-1], y.shape[-1])
    moments.update(x, y, weight)
    return moments


def mean_error(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> float:
    return (x @ weight.T + bias - y).square().sum(dim=1).mean().item()


def test_moments_are_torchs_own() -> None:
    x = normal(ROWS, INPUTS) + 3
    moments = gathered(x, x[:, :0])
    torch.testing.assert_close(moments.mean(), x.mean(dim=0))
    torch.testing.assert_close(moments.covariance(), torch.cov(x.T, correction=0), rtol=1e-9, atol=1e-12)


def test_weights_are_repetitions() -> None:
    x, y = normal(5, INPUTS), normal(5, OUTPUTS, seed=1)
    times = torch.tensor([1, 3, 0, 2, 4])
    weighted, repeated = (
        gathered(x, y, times.double()),
        gathered(x.repeat_interleave(times, 0), y.repeat_interleave(times, 0)),
    )
    for name in ("weight", "x", "y", "xx", "xy"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))


def test_streaming_is_one_batch() -> None:
    x, y, weight = normal(6, 5, INPUTS), normal(6, 5, OUTPUTS, seed=1), normal(6, 5, seed=2).abs()
    streamed = Moments(INPUTS, OUTPUTS)
    for part in range(0, 6, 2):
        streamed.update(x[part : part + 2], y[part : part + 2], weight[part : part + 2])
    whole = gathered(x, y, weight)
    for name in ("weight", "x", "y", "xx", "xy"):
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_float32_rows_are_summed_in_float64() -> None:
    x = normal(ROWS, INPUTS).float() + 1000
    moments = gathered(x, x[:, :0])
    torch.testing.assert_close(moments.covariance(), torch.cov(x.double().T, correction=0), rtol=1e-5, atol=1e-8)


def test_many_columns_are_summed_in_blocks_of_the_upper_half() -> None:
    x, y, weight = normal(40, 2 * BLOCK + 3), normal(40, OUTPUTS, seed=1) + 5, normal(40, seed=2).abs()
    moments = gathered(x, y, weight)
    torch.testing.assert_close(moments.xx, x.T @ (x * weight[:, None]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(moments.xy, x.T @ (y * weight[:, None]), rtol=1e-10, atol=1e-10)


def test_large_means_in_float32_leave_the_fit_alone() -> None:
    x, y = normal(ROWS, INPUTS).float() + 300, normal(ROWS, OUTPUTS, seed=1).float() - 500
    got = gathered(x, y).fit(torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64), torch.arange(INPUTS), 0.0)
    wanted = gathered(x.double(), y.double()).fit(torch.zeros(OUTPUTS, INPUTS).double(), torch.arange(INPUTS), 0.0)
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-3, atol=1e-5)


def test_rows_without_weight_count_for_nothing() -> None:
    moments = Moments(INPUTS, OUTPUTS)
    moments.update(normal(4, INPUTS), normal(4, OUTPUTS), torch.zeros(4))
    moments.update(normal(9, INPUTS, seed=3), normal(9, OUTPUTS, seed=4))
    torch.testing.assert_close(moments.xx, gathered(normal(9, INPUTS, seed=3), normal(9, OUTPUTS, seed=4)).xx)


def test_fit_without_pull_is_least_squares() -> None:
    x, y = normal(ROWS, INPUTS) + 1, normal(ROWS, OUTPUTS, seed=1)
    kept = torch.tensor([0, 2, 3, 7])
    weight, bias = gathered(x, y).fit(torch.zeros(OUTPUTS, INPUTS, dtype=x.dtype), kept, 0.0)
    design = torch.cat((x[:, kept], torch.ones(ROWS, 1, dtype=x.dtype)), dim=1)
    wanted = torch.linalg.lstsq(design, y).solution.T
    torch.testing.assert_close(torch.cat((weight, bias[:, None]), dim=1), wanted, rtol=1e-6, atol=1e-8)


def test_fit_is_the_stationary_point_of_its_objective() -> None:
    """The gradient of the documented objective, taken by autograd on the rows themselves, vanishes at the result."""
    x, y, start = normal(ROWS, INPUTS) + 1, normal(ROWS, OUTPUTS, seed=1), normal(OUTPUTS, INPUTS, seed=2)
    kept, ridge = torch.tensor([1, 4, 5]), 0.3
    weight, bias = (part.requires_grad_() for part in gathered(x, y).fit(start, kept, ridge))
    part = x[:, kept]
    level = ridge * part.var(dim=0, correction=0).mean()
    objective = (part @ weight.T + bias - y).square().sum(dim=1).mean() + level * (
        weight - start[:, kept]
    ).square().sum()
    for gradient in torch.autograd.grad(objective, (weight, bias)):
        assert gradient.abs().max() < 1e-10


def test_fit_recovers_outputs_exactly_when_the_rest_follows_from_the_kept() -> None:
    x = normal(ROWS, INPUTS)
    kept, gone = torch.arange(5), torch.arange(5, INPUTS)
    x[:, gone] = x[:, kept] @ normal(5, len(gone), seed=1) + 0.7
    dense, shift = normal(OUTPUTS, INPUTS, seed=2), normal(OUTPUTS, seed=3)
    y = x @ dense.T + shift
    weight, bias = gathered(x, y).fit(dense, kept, 0.0)
    torch.testing.assert_close(x[:, kept] @ weight.T + bias, y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.3, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_fit_is_never_worse_than_the_mean_shift(ridge: float, seed: int) -> None:
    x = normal(ROWS, INPUTS, seed=seed) @ normal(INPUTS, INPUTS, seed=seed + 10) + 2
    dense, kept = normal(OUTPUTS, INPUTS, seed=seed + 20), torch.tensor([0, 1, 6])
    y = x @ dense.T
    weight, bias = gathered(x, y).fit(dense, kept, ridge)
    shifted = y.mean(dim=0) - dense[:, kept] @ x[:, kept].mean(dim=0)
    assert mean_error(x[:, kept], y, weight, bias) <= mean_error(x[:, kept], y, dense[:, kept], shifted)


def test_the_bias_makes_the_mean_of_the_outputs_exact() -> None:
    x, y = normal(ROWS, INPUTS) + 4, normal(ROWS, OUTPUTS, seed=1) - 2
    kept = torch.tensor([2, 3])
    weight, bias = gathered(x, y).fit(normal(OUTPUTS, INPUTS, seed=2), kept, 0.3)
    torch.testing.assert_close((x[:, kept] @ weight.T + bias).mean(dim=0), y.mean(dim=0), rtol=1e-12, atol=1e-12)


def test_without_intercept_there_is_no_bias_and_the_fit_goes_through_zero() -> None:
    x, y, kept = normal(ROWS, INPUTS) + 4, normal(ROWS, OUTPUTS, seed=1), torch.tensor([0, 5])
    weight, bias = gathered(x, y).fit(torch.zeros(OUTPUTS, INPUTS, dtype=x.dtype), kept, 0.0, intercept=False)
    assert not bias.any()
    torch.testing.assert_close(weight, torch.linalg.lstsq(x[:, kept], y).solution.T, rtol=1e-6, atol=1e-8)


def test_an_endless_pull_keeps_the_weights() -> None:
    x, y, start = normal(ROWS, INPUTS), normal(ROWS, OUTPUTS, seed=1), normal(OUTPUTS, INPUTS, seed=2)
    weight, _ = gathered(x, y).fit(start, torch.arange(3), 1e9)
    torch.testing.assert_close(weight, start[:, :3], rtol=1e-6, atol=1e-6)


def test_fit_survives_twins_and_constants_and_no_columns() -> None:
    x = normal(ROWS, INPUTS)
    x[:, 1], x[:, 2] = x[:, 0], 3.0
    y = x[:, :OUTPUTS]
    start = torch.zeros(OUTPUTS, INPUTS, dtype=x.dtype)
    weight, bias = gathered(x, y).fit(start, torch.arange(4), 0.0)
    assert mean_error(x[:, :4], y, weight, bias) < 1e-8
    weight, bias = gathered(x, y).fit(start, torch.arange(0), 0.1)
    assert weight.shape == (OUTPUTS, 0)
    torch.testing.assert_close(bias, y.mean(dim=0))


def test_damping_is_relative_to_the_mean_diagonal() -> None:
    square = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(damped(square, 0.5), torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)))
    assert bool(torch.isfinite(torch.linalg.cholesky(damped(torch.zeros_like(square), 0.5))).all())


@pytest.mark.parametrize("spread", [0.0, 1e-9, 1e-8])
def test_columns_that_hardly_vary_can_be_fitted(spread: float) -> None:
    """Their variance is a small difference of large numbers, and may come out below zero."""
    weight, kept = normal(OUTPUTS, INPUTS), torch.arange(INPUTS)
    for seed in range(20):
        x, y = 3 + spread * normal(19, INPUTS, seed=seed), normal(19, OUTPUTS, seed=seed + 1)
        moments = gathered(x, y)
        torch.linalg.cholesky(damped(moments.regular_covariance(), 1e-2))
        fitted, bias = moments.fit(weight, kept, 0.3)
        assert mean_error(x, y, fitted, bias) <= (y - y.mean(dim=0)).square().sum(dim=1).mean().item() + 1e-9


def test_variances_above_rounding_are_left_alone() -> None:
    x = 1e-4 * normal(ROWS, INPUTS) + 3
    moments = gathered(x, x[:, :0])
    assert torch.equal(moments.regular_covariance(), moments.covariance())
