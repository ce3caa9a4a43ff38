# SPDX-License-Identifier: Apache-2.0
"""Models and masks for the tests of gohsp: small, quick, with weights that make every mistake visible."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import gohsp_kernels as gk
from gohsp.masks.mask import FIELDS, ModelMask

Make = Callable[..., Any]


@pytest.fixture(scope="session")
def make_model() -> Make:
    """Return a maker of small timm models in float64 and evaluation mode; each call gives a fresh copy."""
    made: dict[Any, nn.Module] = {}

    def make(name: str = "vit_tiny_patch16_224", **arguments: Any) -> Any:
        arguments = {"img_size": 48, "depth": 2, "num_classes": 5} | arguments
        key = (name, repr(sorted(arguments.items())))
        if key not in made:
            made[key] = randomize(timm.create_model(name, **arguments)).double().eval()
        return copy.deepcopy(made[key])

    return make


def randomize(model: nn.Module) -> nn.Module:
    """Draw all parameters anew: timm starts biases at 0 and layer scale near 0, which would hide mistakes in them."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2 and parameter.shape[0] > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                is_factor = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
                parameter.copy_(0.3 * noise + (1.0 if is_factor else 0.0))
    return model


@pytest.fixture(scope="session")
def images() -> Callable[..., Tensor]:
    """Return a maker of random images [batch, 3, side, side], float64."""

    def make(batch: int = 2, side: int = 48, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(batch, 3, side, side, generator=generator, dtype=torch.float64)

    return make


@pytest.fixture(scope="session")
def masks() -> Callable[[nn.Module], st.SearchStrategy[ModelMask]]:
    """Return a hypothesis strategy of random heterogeneous masks for a model, each field with a share of its own."""

    def strategy(model: nn.Module) -> st.SearchStrategy[ModelMask]:
        qk_norm = ModelMask.full(model).geometry.qk_norm
        share = st.sampled_from([0.0, 0.05, 0.3, 0.6, 0.9, 1.0])
        shares = st.fixed_dictionaries({name: share for name in FIELDS if not (qk_norm and name == "qk")})

        def draw(seed: int, keep: dict[str, float]) -> ModelMask:
            return ModelMask.random(model, keep, torch.Generator().manual_seed(seed))

        return st.builds(draw, st.integers(0, 2**31), shares)

    return strategy


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Return a function that gives the norm of the difference over the norm of what was wanted."""

    def error(got: Tensor, wanted: Tensor) -> float:
        assert got.shape == wanted.shape
        got, wanted = got.detach().double(), wanted.detach().double()
        return float((got - wanted).norm() / wanted.norm())

    return error


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Any:
    """Run the test on each backend that can run float32 here."""
    support = gk.backends()[request.param]
    if not support:
        pytest.skip(support.reason)
    with gk.use_backend(request.param):
        yield request.param
