# SPDX-License-Identifier: Apache-2.0
"""Running a model in evaluation mode leaves it as it was."""

from __future__ import annotations

import pytest

from gohsp.models.hooks import evaluating


def test_evaluating_restores_every_module_even_after_an_error(make_model) -> None:
    model = make_model().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError, match="inside"), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError("inside")
    assert [module.training for module in model.modules()] == modes
