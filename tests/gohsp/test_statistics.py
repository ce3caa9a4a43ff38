# SPDX-License-Identifier: Apache-2.0
"""Moments and regressions against direct formulas, tokens against the model's own, sensitivities against Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gohsp.models.hooks import evaluating, inputs_of
from gohsp.models.registry import open_model
from gohsp.pruning.calibration import embed, read_images
from gohsp.pruning.moments import Moments, damped
from gohsp.pruning.sensitivity import measure_sensitivities

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


def test_sublayers_are_the_model(make_model, images) -> None:
    model = make_model()
    x, size = embed(open_model(model), [images(3), images(2, seed=1)])
    assert size == (48, 48)
    for layer in open_model(model).sublayers:
        with inputs_of(layer.write.layers[0]) as caught:
            hidden, after = layer.trace(x)
        torch.testing.assert_close(caught[0], hidden)
        torch.testing.assert_close(after, x + layer.scale(layer.write(hidden)))
        x = after
    wanted = model.forward_features(torch.cat((images(3), images(2, seed=1))))
    torch.testing.assert_close(model.norm(x), wanted)


def test_distilled_models_have_two_prefix_tokens(make_model, images) -> None:
    model = make_model("deit_tiny_distilled_patch16_224")
    x, _ = embed(open_model(model), [images()])
    for layer in open_model(model).sublayers:
        x = layer(x)
    torch.testing.assert_close(model.norm(x), model.forward_features(images()))


def test_gain_is_the_layer_scale(make_model) -> None:
    scaled, plain = make_model(init_values=0.1), make_model()
    assert torch.equal(open_model(scaled).sublayers[1].gain(), scaled.blocks[0].ls2.gamma.double())
    assert torch.equal(open_model(plain).sublayers[1].gain(), torch.ones(192, dtype=torch.float64))


def jacobian_of_features(model, features, images: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """Return the features [F] and their Jacobian [F, N, D] by the stream after a sublayer, for one image."""
    layers = open_model(model).sublayers
    x, _ = embed(open_model(model), [images])
    for layer in layers[: index + 1]:
        x = layer(x)

    def rest(x: Tensor) -> Tensor:
        for layer in layers[index + 1 :]:
            x = layer(x)
        return features(model.norm(x)).flatten()

    return rest(x), torch.autograd.functional.jacobian(rest, x.detach())[:, 0]


@pytest.mark.parametrize(
    ("arguments", "features"),
    [
        ({"global_pool": "token"}, lambda x: x[:, 0]),
        ({"global_pool": "", "num_classes": 0}, lambda x: torch.cat((x[:, :1], x[:, 1:].mean(1, True)), 1)),
    ],
)
@pytest.mark.parametrize("index", [0, 3])
def test_sensitivity_is_the_jacobian_of_the_features_by_random_signs(
    make_model, images, arguments, features, index
) -> None:
    model, batch = make_model(embed_dim=24, img_size=32, **arguments), images(1, 32)
    stream, _ = embed(open_model(model), [batch])
    value, jacobian = jacobian_of_features(model, features, batch, index)
    signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(7)).mul(2).sub(1).double()
    gradient = torch.einsum("f,fnd->nd", signs, jacobian)
    got = measure_sensitivities(open_model(model), stream, seed=7)[index]
    torch.testing.assert_close(got.metric, gradient.T @ gradient, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(got.tokens, gradient.square().sum(dim=1), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("index", [0, 3])
def test_first_order_terms_are_gradients_by_a_factor_on_each_column(make_model, images, index: int) -> None:
    """Such a factor stands before a column's weights at all tokens, so their terms add up before they are squared."""
    model = make_model(embed_dim=24, img_size=32)
    stream, _ = embed(open_model(model), [images(1, 32)])
    layer, x = open_model(model).sublayers[index], stream
    for each in open_model(model).sublayers:
        x = each(x)
    features = model.norm(x)[:, 0].flatten()
    signs = torch.randint(0, 2, features.shape, generator=torch.Generator().manual_seed(7)).mul(2).sub(1).double()
    weights = layer.write.weight, layer.read.weight
    gradients = torch.autograd.grad((features * signs).sum(), weights)
    wanted = [(weight * gradient).sum(dim=0).square() for weight, gradient in zip(weights, gradients, strict=True)]
    got = measure_sensitivities(open_model(model), stream, seed=7)[index]
    torch.testing.assert_close(got.taylor, wanted[0].detach(), rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(got.taylor_in, wanted[1].detach(), rtol=1e-8, atol=1e-12)


def test_sensitivity_is_a_mean_over_images(make_model, images) -> None:
    model = make_model(embed_dim=24, img_size=32)
    once, _ = embed(open_model(model), [images(3, 32)])
    got = measure_sensitivities(open_model(model), once)[0]
    assert got.metric.trace().item() == pytest.approx(got.tokens.sum().item(), rel=1e-10)
    many = measure_sensitivities(open_model(model), once.repeat(8, 1, 1))[0]
    assert 0.5 < (many.metric.trace() / got.metric.trace()).item() < 2


def test_token_weights_follow_the_sensitivity_and_have_a_floor(make_model, images) -> None:
    model = make_model(global_pool="token")
    stream, _ = embed(open_model(model), [images()])
    last = measure_sensitivities(open_model(model), stream)[-1].weights()
    assert last[0].item() == pytest.approx(10**0.5)  # the root of ten times the mean
    assert last[1:].tolist() == pytest.approx([0.1] * 9)


def test_sensitivities_are_measured_where_gradients_are_off(make_model, images) -> None:
    model = make_model().requires_grad_(False)
    stream, _ = embed(open_model(model), [images()])
    wanted = measure_sensitivities(open_model(model), stream)[0].metric
    with torch.inference_mode():
        stream, _ = embed(open_model(model), [images()])
        torch.testing.assert_close(measure_sensitivities(open_model(model), stream)[0].metric, wanted)


def test_evaluating_restores_every_module_even_after_an_error(make_model) -> None:
    model = make_model().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == modes


def test_inputs_of_takes_its_hooks_away_even_after_an_error() -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="inside"), inputs_of(layer):
        raise RuntimeError("inside")
    assert not layer._forward_pre_hooks


def test_images_take_the_dtype_of_the_model() -> None:
    model = torch.nn.Linear(1, 1).to(torch.bfloat16)
    (got,) = read_images([[torch.ones(2, 3, 4, 4), "labels"]], model)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "batches: wanted at least one image, got none"),
        ([torch.zeros(0, 3, 4, 4)], ValueError, "batches: wanted at least one image, got none"),
        ([torch.zeros(3, 4, 4)], ValueError, r"batches: wanted images \[B, C, height, width\], got shape \(3, 4, 4\)"),
        (torch.zeros(1, 3, 4, 4), TypeError, "batches: wanted an iterable of batches of images, got Tensor"),
        (7, TypeError, "batches: wanted an iterable of batches of images, got int"),
        ([{"images": 1}], TypeError, r"batches: wanted tensors or \(images, ...\) sequences, got dict"),
    ],
)
def test_wrong_batches_are_refused(batches, error, message: str) -> None:
    with pytest.raises(error, match=message):
        list(read_images(batches, torch.nn.Linear(1, 1)))


def test_images_of_two_sizes_are_refused(make_model, images) -> None:
    model = make_model(dynamic_img_size=True)
    with pytest.raises(ValueError, match="batches: wanted images of one size, got"):
        embed(open_model(model), [images(1, 48), images(1, 32)])
