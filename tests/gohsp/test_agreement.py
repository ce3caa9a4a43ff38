# SPDX-License-Identifier: Apache-2.0
"""Full-size models under random heterogeneous masks: logits in fp32 against the masked dense model in float64.

By default a few masks; `GOHSP_AGREEMENT_MASKS=200` spreads 200 over the models. Each instruction set needs a process of
its own, so this file is also a program: `GOHSP_CPU_CAPABILITY=avx2 python tests/gohsp/test_agreement.py 200`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import gohsp
import gohsp_kernels as gk
from gohsp.masks.mask import ModelMask

checks = pytest.importorskip("gohsp_kernels._checks", reason="the checks module is not built")

MODELS = (
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "deit_small_patch16_224",
    "deit_small_distilled_patch16_224",
)
TOLERANCE = 1e-5
ROOT = Path(__file__).parents[2]


def lively(name: str) -> nn.Module:
    """The model with weights under which every term of every sublayer weighs in."""
    model = timm.create_model(name, num_classes=100).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.dim() >= 2 and parameter.shape[0] > 1
            parameter.add_(torch.randn_like(parameter), alpha=0.03 if wide else 0.2)
    return model


def relative_error(result: Tensor, truth: Tensor) -> float:
    return float((result.double() - truth).norm() / truth.norm())


def worst_errors(masks: int) -> dict[str, float]:
    """Largest relative error of the logits for each backend, over that many masks spread over the models."""
    worst = dict.fromkeys(("reference", "cpu"), 0.0)
    generator = torch.Generator().manual_seed(2301)
    for index in range(masks):
        torch.manual_seed(index)
        model = lively(MODELS[index % len(MODELS)])
        keep = float(torch.rand(1, generator=generator)) * 0.8 + 0.2
        mask = ModelMask.random(model, keep, generator)
        small = gohsp.compress(model, mask)
        images = torch.randn(1, 3, 224, 224, generator=generator)
        with torch.no_grad():
            truth = mask.apply_(model.double())(images.double())
            for backend in worst:
                with gk.use_backend(backend):
                    worst[backend] = max(worst[backend], relative_error(small(images), truth))
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("capability", checks.capabilities())
def test_logits_agree(capability: str) -> None:
    masks = os.environ.get("GOHSP_AGREEMENT_MASKS", "4")
    environment = {**os.environ, "GOHSP_CPU_CAPABILITY": capability}
    run = subprocess.run([sys.executable, __file__, masks], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    worst = json.loads(run.stdout)
    assert set(worst) == {"reference", "cpu"}
    assert all(0 < error < TOLERANCE for error in worst.values()), worst


if __name__ == "__main__":
    print(json.dumps(worst_errors(int(sys.argv[1]))))
