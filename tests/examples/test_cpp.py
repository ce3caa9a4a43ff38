# SPDX-License-Identifier: Apache-2.0
"""The C++ example prints the logits that Python computes for the same saved model."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import gohsp

PROGRAM = Path(__file__).parents[2] / "build" / "native" / "gohsp_example"
pytestmark = pytest.mark.skipif(not PROGRAM.exists(), reason="the example is not built (make setup does)")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True)


def saved(folder: Path, name: str, **arguments: object) -> torch.nn.Module:
    """A pruned model with random weights, heterogeneous in every part, as saved and loaded again."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **arguments)
    for parameter in model.parameters():  # so that no bias, norm or scale is trivial
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    mask = gohsp.ModelMask.random(model, keep=0.6, generator=torch.Generator().manual_seed(1))
    mask.blocks[0].heads[0] = False
    mask.blocks[1].mlp_in[:] = True
    mask.blocks[1].heads[:] = False
    gohsp.save(gohsp.compress(model.eval(), mask), folder)
    return gohsp.load(folder)


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [("deit_tiny_patch16_224", {}, 224), ("deit_tiny_patch16_224", {"init_values": 0.1, "img_size": 64}, 64)],
)
def test_logits_are_those_of_python(tmp_path: Path, name: str, arguments: dict[str, object], size: int) -> None:
    model = saved(tmp_path / "model", name, depth=3, **arguments)
    images = torch.randn(2, 3, size, size)
    save_file({"images": images}, tmp_path / "images.safetensors")
    done = run(tmp_path / "model", tmp_path / "images.safetensors")
    assert done.returncode == 0, done.stderr
    printed = torch.tensor([[float(x) for x in line.split()] for line in done.stdout.splitlines()])
    with torch.no_grad():
        logits = model(images)
    assert printed.shape == logits.shape
    assert torch.allclose(printed, logits, atol=2e-5), (printed - logits).abs().max()


def test_what_it_cannot_read_is_one_clear_error(tmp_path: Path) -> None:
    assert "usage" in run().stderr
    missing = run(tmp_path, tmp_path)
    assert missing.returncode == 1 and "model.safetensors: cannot be read" in missing.stderr
    saved(tmp_path, "deit_tiny_patch16_224", depth=2, global_pool="avg")
    refused = run(tmp_path, tmp_path)
    assert refused.returncode == 1 and "this example reads models with fc_norm = false" in refused.stderr
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "is no safetensors file" in run(tmp_path, tmp_path).stderr
