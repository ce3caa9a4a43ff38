# SPDX-License-Identifier: Apache-2.0
"""Looking into a model leaves it as it was."""

from __future__ import annotations

import pytest
import torch

from gohsp.models.hooks import evaluating, inputs_of


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
