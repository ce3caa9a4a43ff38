# SPDX-License-Identifier: Apache-2.0
"""Evaluation on a test set."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gohsp.training.evaluation import evaluate

from . import digits_run as runs


def test_evaluation_counts_and_leaves_the_mode() -> None:
    model, data = runs.make_vit(drop_path_rate=0.9).train(), runs.Digits(30)
    found = evaluate(model, data, batch_size=7)
    assert model.training
    with torch.inference_mode():
        logits = model.eval()(data.images)
    labels = torch.tensor(data.labels)
    assert found["images"] == 30
    assert found["top1"] == pytest.approx(float((logits.argmax(dim=1) == labels).double().mean()))
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)


def test_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(runs.make_vit(), [])
