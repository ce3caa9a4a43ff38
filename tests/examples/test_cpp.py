# SPDX-License-Identifier: Apache-2.0
"""The C++ example prints the logits that Python computes for the same saved model, on the CPU kernels and, in
emulation, on the CUDA kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

import gohsp

TREE = Path(__file__).parents[2] / "build" / "native"
PROGRAMS = [TREE / f"gohsp_example_{backend}" for backend in ("cpu", "emulated")]
pytestmark = pytest.mark.skipif(
    not all(program.exists() for program in PROGRAMS), reason="the examples are not built (make setup does)"
)


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


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


def compare(folder: Path, program: Path, **arguments: object) -> None:
    model = saved(folder / "model", "deit_tiny_patch16_224", **arguments)
    images = torch.randn(2, 3, *model.patch_embed.img_size)
    save_file({"images": images}, folder / "images.safetensors")
    done = run(program, folder / "model", folder / "images.safetensors")
    assert done.returncode == 0, done.stderr
    printed = torch.tensor([[float(x) for x in line.split()] for line in done.stdout.splitlines()])
    with torch.no_grad():
        logits = model(images)
    assert printed.shape == logits.shape
    assert torch.allclose(printed, logits, atol=2e-5), (printed - logits).abs().max()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_logits_are_those_of_python(tmp_path: Path, program: Path) -> None:
    compare(tmp_path, program, depth=3, init_values=0.1, img_size=64)


def test_a_whole_deit_tiny(tmp_path: Path) -> None:
    compare(tmp_path, PROGRAMS[0])


def test_what_it_cannot_read_is_one_clear_error(tmp_path: Path) -> None:
    program = PROGRAMS[0]
    assert "usage" in run(program).stderr
    missing = run(program, tmp_path, tmp_path)
    assert missing.returncode == 1 and "model.safetensors: cannot be read" in missing.stderr
    saved(tmp_path, "deit_tiny_patch16_224", depth=2, global_pool="avg")
    refused = run(program, tmp_path, tmp_path)
    assert refused.returncode == 1 and "this example reads models with fc_norm = false" in refused.stderr
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    assert "is no safetensors file" in run(program, tmp_path, tmp_path).stderr
