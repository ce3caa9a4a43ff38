# SPDX-License-Identifier: Apache-2.0
"""Sensitivities against Jacobians that autograd computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gohsp.models.registry import open_model
from gohsp.pruning.calibration import embed
from gohsp.pruning.sensitivity import measure_sensitivities


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
